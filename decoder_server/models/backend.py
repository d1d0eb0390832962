"""The seam between serving and models: a prompt and a passage go in, a margin comes out.

Whoever serves knows this file and no model behind it. A backend reads passages as pooled states
(fbnl) or as text (cross_encoder); serving only carries them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from cache.states import AnyStates, Codes
from checkpoint import EncoderIdentity, TokenizedPrompt

Passage = AnyStates | str  # what a backend reads


if TYPE_CHECKING:
    from decoder_server.models.fbnl.kv_cache import Tiers


class Prompt(Protocol):
    """Query and instruction, tokenized once for all candidates of a request."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_query_tokens(self) -> int: ...

    @property
    def query_truncated(self) -> bool: ...


class Item(Protocol):
    """One prompt and one window of a passage, ready for a pass of the model."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that attend."""
        ...

    @property
    def num_states(self) -> int:
        """States attended to beside them."""
        ...

    @property
    def num_tokens(self) -> int:
        """What the item costs a batch."""
        ...

    @property
    def truncated(self) -> bool:
        """The passage was cut to fit, here or when it was encoded."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The item of a backend that reads states: a prompt and one window, at the ratio it is read at.

    What is read as it was stored stays encoded until its batch is put together (batch_states.py).
    """

    prompt: TokenizedPrompt
    states: NDArray[np.float32] | Codes  # (num_states, dim)
    truncated: bool = False
    key: bytes = b""  # names the states; empty: nothing computed of them is kept

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.ids)

    @property
    def num_states(self) -> int:
        return len(self.states)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.ids) + len(self.states)


class ModelSettings(Protocol):
    """What clients may want to know of a model before they ask it."""

    @property
    def default_instruction(self) -> str: ...

    @property
    def default_compression_ratio(self) -> int:
        """0 for a model that reads text."""
        ...

    @property
    def max_passage_tokens(self) -> int: ...

    @property
    def max_query_tokens(self) -> int: ...


@runtime_checkable
class KeepsContexts(Protocol):
    """A backend that may keep what a pass computed of a passage. `fill` is called from the model's thread only."""

    tiers: Tiers

    def fill(self, pairs: Sequence[Pair]) -> tuple[int, int]:
        """Fills the tiers with what passes over these pairs would need.

        Returns:
            Of how many pairs the passage's keys are kept now, and of how many the beginning of the prompt.
        """
        ...


class Backend(Protocol):
    """A loaded model. `score` and `warm_up` are called from one thread only."""

    name: str  # fbnl or cross_encoder
    checkpoint_name: str
    dtype_name: str
    device_name: str
    notice: str  # what its licence asks to be told; mostly empty
    listwise: bool  # a score depends on the request's other candidates: all of them in one pass, no other's beside

    @property
    def settings(self) -> ModelSettings: ...

    def identity(self) -> EncoderIdentity | None:
        """The encoder whose states this model reads; None: it reads text."""
        ...

    def prompt(self, query: str, instruction: str | None = None) -> Prompt:
        """Tokenizes query and instruction; safe from any thread."""
        ...

    def items(self, prompt: Any, passage: Any) -> Sequence[Item]:
        """A passage's windows under this backend's own prompt; safe from any thread."""
        ...

    def cut(self, text: str, max_tokens: int | None, *, keep_end: bool = False) -> str:
        """A passage's beginning, or end, of at most `max_tokens` (None: what a passage may have); from any thread."""
        ...

    def is_empty(self, text: str) -> bool:
        """Whether a passage's text is empty to this model: nothing of it is a token; safe from any thread."""
        ...

    def score(self, items: Sequence[Any]) -> NDArray[np.float32]:
        """Margins (len(items),) of this backend's own items; NaN where a logit was not finite."""
        ...

    def activate(self, margin: float) -> float:
        """The score that a margin stands for: P(yes) for fbnl, for others what their authors publish."""
        ...

    def warm_up(self) -> None:
        """One real forward pass, whose margin must be finite."""
        ...
