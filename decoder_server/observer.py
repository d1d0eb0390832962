"""What serving tells whoever watches: one word per answered request, one per pass of the model.

Times are on time.monotonic's clock. Does not know metrics, logs or traces; each of those is an Observer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from decoder_server.request import Outcome, RerankRequest, Timings


@dataclass(frozen=True, slots=True)
class Fetch:
    """Candidates' states on their way here: a read, through whatever tier is in front of the store, or an encoding."""

    start: float
    end: float
    num_passages: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One pass that held pairs of a request, and since when they had been ready."""

    ready: float
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass, of however many requests. Cells are attention's, see lengths.py."""

    num_pairs: int
    num_tokens: int
    num_cells: int  # that the pairs need
    num_padding_cells: int  # computed beside them
    seconds: float


@dataclass(slots=True)
class Trail:
    """What a request leaves behind while it runs."""

    fetches: list[Fetch] = field(default_factory=list)
    encodings: list[Fetch] = field(default_factory=list)  # calls of the encoder, waiting for another's included
    turns: list[Turn] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)  # of every candidate, top_n or not
    degraded: str = ""  # read coarser than asked: deadline or queue
    stopped_early: bool = False
    timings: Timings | None = None  # of a ranking that went well


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that ended, well or not."""

    request: RerankRequest
    model: str
    code: str  # ok, or why not: snake_case of the error's name
    start: float
    end: float
    timings: Timings | None  # None unless ok
    trail: Trail
    kind: str = "rerank"  # or explain, or warm


class Observer(Protocol):
    """Called on the event loop, so it must be quick; it must not raise."""

    def answered(self, answered: Answered) -> None: ...

    def passed(self, one: Pass) -> None: ...
