"""What serving tells whoever watches: one word per answered request, one per pass of the model.

Times are on time.monotonic's clock. Does not know metrics, logs or traces; each of those is an Observer.

Wall time during which something was under way, however many times at once.

Which requests of a model are under way: who hears how each ended, and when a server that stops may go.

Does not know what a request does.
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
    outcomes: list[Result] = field(default_factory=list)  # of every candidate, top_n or not
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


class Stopwatch:
    """Runs while at least one `with` block of it is open. Only touched from the event loop."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._running = 0
        self._since = 0.0

    def __enter__(self) -> Stopwatch:
        if self._running == 0:
            self._since = time.monotonic()
        self._running += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._running -= 1
        if self._running == 0:
            self._seconds += time.monotonic() - self._since

    @property
    def seconds(self) -> float:
        return self._seconds + (time.monotonic() - self._since if self._running else 0.0)


class Running:
    """Made and used on the event loop."""

    def __init__(self, model: str, observers: Sequence[Observer]) -> None:
        """
        Args:
            observers: hear of every request that ends.
        """
        self._model = model
        self._observers = observers
        self._num_running = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self, request: RerankRequest, kind: str = "rerank") -> Iterator[Trail]:
        """Around a request: observers hear how it ended, and a server that stops waits for it.

        Raises:
            Unavailable: this server is stopping.
        """
        started, trail, code = time.monotonic(), Trail(), "internal"
        self._num_running += 1
        self._idle.clear()
        try:
            if self._draining:
                raise Unavailable("this server is shutting down")
            yield trail
            code = "ok"
        except BaseException as exc:
            code = _code_of(exc)
            raise
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self._idle.set()
            answered = Answered(request, self._model, code, started, time.monotonic(), trail.timings, trail, kind)
            for observer in self._observers:
                observer.answered(answered)

    async def drain(self, grace_seconds: float) -> bool:
        """Accepts nothing more and waits for what runs; False when the time was up first."""
        self._draining = True
        try:
            async with asyncio.timeout(grace_seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


def _code_of(error: BaseException) -> str:
    """The error's name for logs and metrics: few and constant. InvalidRequest is invalid_request."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    if isinstance(error, FailedPrecondition):
        return "refused"
    if isinstance(error, PrereadError):
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    return "internal"
