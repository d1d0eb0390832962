"""The seam between checks and models: texts go in, margins come out. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tuning.health.compare import Margins
from tuning.health.pairs import TextTriple

Advance = Callable[[int], None]  # told how many pairs were scored


def unheard(num: int) -> None:
    """Progress that nobody watches."""


class Scorer(Protocol):
    """One way of serving one model."""

    number_format: str  # float32, bfloat16, or a runtime's name with int8 in it
    listwise: bool  # a score depends on the other pairs that are scored with it

    def margins(self, pairs: Sequence[TextTriple], advance: Advance = unheard) -> Margins:
        """Margins (len(pairs),) as a server computes them: pairs of like length share a pass."""
        ...

    def together(self, pairs: Sequence[TextTriple]) -> Margins:
        """Margins (len(pairs),) of one padded pass over all of them."""
        ...

    def scores(self, margins: Margins) -> Margins:
        """What a client is given for these margins."""
        ...

    def overlong(self) -> str | None:
        """A passage that does not fit the model's limit and is cut; None: too long a limit to try."""
        ...
