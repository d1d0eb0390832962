"""The seam between serving and models: a prompt and a passage go in, a margin comes out.

Whoever serves knows this file and no model behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from checkpoint import CheckpointSettings, EncoderIdentity, TokenizedPrompt


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One prompt and one window of a passage, at the ratio it is read at."""

    prompt: TokenizedPrompt
    states: NDArray[np.float32]  # (num_states, dim)

    @property
    def num_tokens(self) -> int:
        """What the pair costs a batch: prompt tokens and states attended to."""
        return len(self.prompt.ids) + len(self.states)


class Backend(Protocol):
    """A loaded model. `score` and `warm_up` are called from one thread only."""

    name: str
    settings: CheckpointSettings
    dtype_name: str
    device_name: str

    def identity(self) -> EncoderIdentity:
        """The encoder whose states this model reads."""
        ...

    def prompt(self, query: str, instruction: str | None = None) -> TokenizedPrompt:
        """Tokenizes query and instruction; safe from any thread."""
        ...

    def cut(self, text: str, max_tokens: int | None, *, keep_end: bool = False) -> str:
        """A passage's beginning, or end, of at most `max_tokens` (None: what a passage may have); from any thread."""
        ...

    def score(self, pairs: Sequence[Pair]) -> NDArray[np.float32]:
        """Margins (len(pairs),), yes-logit minus no-logit; NaN where a logit was not finite."""
        ...

    def warm_up(self) -> None:
        """One real forward pass, whose margin must be finite."""
        ...
