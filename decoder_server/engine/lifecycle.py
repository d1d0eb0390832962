"""Requests in flight: the trace each leaves behind, the observers that receive it, and draining.

Times are on time.monotonic's clock. Metrics, logs and spans are observers, in decoder_server.telemetry.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from preread.errors import FailedPrecondition, PrereadError, Unavailable
from preread.types import RerankRequest, Result, Timings

# Start, end and number of passages of one read of a request's passages, through the read cache if there is one, or of
# one call of the encoder.
Fetch = tuple[float, float, int]
# One forward pass with pairs of a request: since when they had been ready, start and end.
QueueInterval = tuple[float, float, float]


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
    kind: str = "rerank"  # or explain, or warm
    start: float = field(default_factory=time.monotonic)
    end: float = 0.0
    code: str = "internal"  # ok, or why not: snake_case of the error's name
    fetches: list[Fetch] = field(default_factory=list)
    encodings: list[Fetch] = field(default_factory=list)
    passes: list[QueueInterval] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)  # of every candidate, top_n or not
    degraded: str = ""  # scored coarser than requested: deadline or queue
    stopped_early: bool = False
    timings: Timings | None = None  # of a ranking that went well

    def timed(self) -> Timings:
        """Timings as of now."""
        return Timings(
            fetch_seconds=_covered(self.fetches),
            encode_seconds=_covered(self.encodings),
            queue_seconds=sum(start - ready for ready, start, _ in self.passes),
            compute_seconds=sum(end - start for _, start, end in self.passes),
            total_seconds=time.monotonic() - self.start,
        )


class Observer(Protocol):
    """Called on the event loop, so it must be quick; it must not raise."""

    def request_finished(self, trace: RequestTrace) -> None:
        """Every request, whether it succeeded or failed."""
        ...

    def pass_finished(self, one: PassRecord) -> None: ...


class InFlight:
    """The requests of one model in flight. Made and used on the event loop."""

    def __init__(self, model: str, observers: Sequence[Observer]) -> None:
        self._model = model
        self._observers = observers
        self._num_requests = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def track(self, request: RerankRequest, kind: str = "rerank") -> Iterator[RequestTrace]:
        """Reports to the observers how the request ended; a server that drains waits for it.

        Raises:
            Unavailable: this server is draining.
        """
        trace = RequestTrace(request, self._model, kind)
        self._num_requests += 1
        self._idle.clear()
        try:
            if self._draining:
                raise Unavailable("this server is shutting down")
            yield trace
            trace.code = "ok"
        except BaseException as exc:
            trace.code = _code_of(exc)
            raise
        finally:
            self._num_requests -= 1
            if self._num_requests == 0:
                self._idle.set()
            trace.end = time.monotonic()
            for observer in self._observers:
                observer.request_finished(trace)

    async def drain(self, grace_seconds: float) -> bool:
        """Rejects new requests and waits for those in flight; False when the grace period ended first."""
        self._draining = True
        try:
            async with asyncio.timeout(grace_seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


def _covered(intervals: Sequence[Fetch]) -> float:
    """Seconds during which at least one of them ran."""
    seconds, until = 0.0, 0.0
    for start, end, _ in sorted(intervals):
        seconds += max(0.0, end - max(start, until))
        until = max(until, end)
    return seconds


def _code_of(error: BaseException) -> str:
    """The error's name for logs and metrics: few and constant. InvalidRequest is invalid_request."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    if isinstance(error, FailedPrecondition):
        return "refused"
    if isinstance(error, PrereadError):
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    return "internal"
