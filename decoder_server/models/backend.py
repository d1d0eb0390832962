"""The contract between the engine and a model: a prompt and passages become pairs, pairs become margins.
A backend reads passages as pooled states (fbnl) or as text (cross_encoder); the engine only carries them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from cache.states import AnyStates
from checkpoint import CheckpointSettings, EncoderIdentity

if TYPE_CHECKING:
    from decoder_server.models.fbnl.kv_cache import KVCache  # needs torch

Passage = AnyStates | str


class Prompt(Protocol):
    """Query and instruction, tokenized once for all candidates of a request."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_query_tokens(self) -> int: ...
    @property
    def query_truncated(self) -> bool: ...


class Pair(Protocol):
    """One prompt and one window of a passage, ready for a forward pass."""

    @property
    def num_prompt_tokens(self) -> int: ...  # tokens that attend
    @property
    def num_states(self) -> int: ...  # states attended to besides them
    @property
    def num_tokens(self) -> int: ...  # cost of the pair in a batch
    @property
    def truncated(self) -> bool: ...  # the passage was cut to fit, here or when it was encoded
    @property
    def identity(self) -> bytes: ...  # all that its margin depends on besides the model; b"": it has no name
    @property
    def key(self) -> bytes: ...  # names the window: a pass computes it once for all pairs of it; empty: shares nothing


@dataclass(frozen=True, slots=True)
class TextSettings:
    """The limits of a model that reads text, as listed to clients."""

    default_instruction: str
    max_passage_tokens: int
    max_query_tokens: int
    default_compression_ratio: int = 0


class Backend(Protocol):
    """A loaded model. `score`, `warm_up` and `fill` are called from one thread only; the rest is safe from any."""

    name: str  # fbnl or cross_encoder
    checkpoint_name: str
    dtype_name: str
    device_name: str
    notice: str  # required by the model's licence; mostly empty
    listwise: bool  # a score depends on the request's other candidates: all of them in one pass, no others

    @property
    def settings(self) -> CheckpointSettings | TextSettings: ...
    @property
    def num_compilations(self) -> int: ...  # fused steps compiled so far; constant once warm
    def identity(self) -> EncoderIdentity | None: ...  # the encoder whose states this model reads; None: it reads text
    def prompt(self, query: str, instruction: str | None = None) -> Prompt: ...  # tokenizes both

    # Per passage its windows under this backend's own prompt; ValueError where that leaves no room for a passage.
    def pairs(self, prompt: Any, passages: Sequence[Any]) -> Sequence[Sequence[Pair]]: ...

    # The beginning, or end, of a passage: at most `max_tokens` (None: the limit of a passage).
    def cut(self, text: str, max_tokens: int | None, *, keep_end: bool = False) -> str: ...
    def is_empty(self, text: str) -> bool: ...  # whether a passage's text has no tokens
    def score(self, pairs: Sequence[Any]) -> NDArray[np.float32]: ...  # margins (len(pairs),); NaN: a logit not finite
    def activate(self, margin: float) -> float: ...  # the published score of a margin: P(yes) for fbnl
    def warm_up(self) -> None: ...  # one forward pass, whose margin must be finite


@runtime_checkable
class StatesBackend(Backend, Protocol):
    """A backend that reads states: it may keep keys and values of passages, and its attention can be looked at."""

    @property
    def caches(self) -> Sequence[KVCache]: ...  # enabled, or disabled by a budget of 0; always in the same order
    def fill(self, pairs: Sequence[Any]) -> Sequence[int]: ...  # pre-fills; per cache, how many pairs it holds now
    def attention(self, pair: Any) -> NDArray[np.float32]: ...  # the readout token's weight on every state
    def spans(self, text: str) -> list[tuple[int, int]]: ...  # per token of a passage, its characters of `text`


def sigmoid(margins: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    """P(yes) of margins in float32, without overflow for any finite margin."""
    small = np.exp(-np.abs(margins))
    return np.where(margins >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
