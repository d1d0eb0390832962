"""What a request leaves behind: its trace, a record of each forward pass, and the observers that receive them.

Times are on time.monotonic's clock. Metrics, logs and spans are observers, in decoder_server.telemetry.
"""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from preread.errors import FailedPrecondition, PrereadError
from preread.values import Degraded, RerankRequest, Result, Timings

# Start, end and number of passages of one read through the read cache, if there is one, or of one call of the encoder.
Fetch = tuple[float, float, int]
QueueInterval = tuple[float, float, float]  # of one forward pass: since when its pairs had been ready, start and end


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One forward pass, of however many requests. Cells are of attention."""

    num_pairs: int
    num_tokens: int
    num_cells: int  # needed by the pairs
    num_padding_cells: int
    seconds: float


@dataclass(slots=True)
class RequestTrace:
    """The record of one request, filled while it runs."""

    request: RerankRequest
    model: str
    kind: str = "rerank"  # or rerank_many, explain, warm
    queries: Sequence[str] = ()  # of rerank_many, in place of the request's own
    start: float = field(default_factory=time.monotonic)
    end: float = 0.0
    code: str = "internal"  # ok, or why not: snake_case of the error's name
    fetches: list[Fetch] = field(default_factory=list)
    encodings: list[Fetch] = field(default_factory=list)
    passes: list[QueueInterval] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)  # of every query and candidate, top_n or not
    num_looked_up: int = 0  # texts that were looked up in collections
    num_found: int = 0  # of those
    degraded: Degraded | None = None  # scored coarser than requested
    stopped_early: bool = False
    timings: Timings | None = None  # of a ranking that went well

    def timed(self) -> Timings:
        queued = sum(start - ready for ready, start, _ in self.passes)
        computed = sum(end - start for _, start, end in self.passes)
        total = time.monotonic() - self.start
        return Timings(_covered(self.fetches), _covered(self.encodings), queued, computed, total)

    def failed(self, error: BaseException) -> None:
        """Takes the error's name as the code, for logs and metrics: few and constant."""
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.code = "cancelled"
        elif isinstance(error, FailedPrecondition):
            self.code = "refused"
        elif isinstance(error, PrereadError):
            self.code = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()


class Observer(Protocol):
    """Called on the event loop, so it must be quick; it must not raise."""

    def request_finished(self, trace: RequestTrace) -> None: ...  # every request, whether it succeeded or failed

    def pass_finished(self, one: PassRecord) -> None: ...


def _covered(intervals: Sequence[Fetch]) -> float:
    """Seconds during which at least one of them ran."""
    seconds, until = 0.0, 0.0
    for start, end, _ in sorted(intervals):
        seconds += max(0.0, end - max(start, until))
        until = max(until, end)
    return seconds
