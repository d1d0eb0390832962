"""One request's place in the queue: its waiting pairs, its finished scores, its clock.

Only touched from the event loop. Does not know the model or the order among requests.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from decoder_server.backend import Item
from decoder_server.observer import Turn


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One item and whose it is."""

    ticket: Ticket
    index: int  # of the candidate in its request
    item: Item

    @property
    def num_prompt_tokens(self) -> int:
        return self.item.num_prompt_tokens

    @property
    def num_states(self) -> int:
        return self.item.num_states

    @property
    def num_tokens(self) -> int:
        return self.item.num_tokens


@dataclass(frozen=True, slots=True)
class Scored:
    """One margin; not finite where `error` says why there is none."""

    index: int  # of the candidate in its request
    margin: float
    error: str = ""


Deliver = Callable[[list[Scored]], None]


class Ticket:
    """Made by Batcher.ticket for one request."""

    def __init__(self, rank: float, deliver: Deliver, deadline: float | None) -> None:
        """
        Args:
            rank: virtual time at which an equal share of the machine would finish the request;
                lower goes first.
            deadline: on time.monotonic's clock; None: none.
        """
        self.rank = rank
        self.deadline = deadline
        self.waiting: deque[Work] = deque()
        self.waiting_tokens = 0
        self.closed = False
        self.queue_seconds = 0.0  # pairs were ready and none of them computed
        self.compute_seconds = 0.0
        self.turns: list[Turn] = []
        self._deliver = deliver
        self._taken = asyncio.Event()
        self._waiting_since: float | None = None
        self._ready: float | None = None  # when the pairs of the pass under way began to wait
        self._computing = False

    def add(self, works: Iterable[Work]) -> None:
        """Makes pairs ready to be scored."""
        for work in works:
            self.waiting.append(work)
            self.waiting_tokens += work.num_tokens
        if self.waiting and not self._computing and self._waiting_since is None:
            self._waiting_since = time.monotonic()

    def take(self) -> Work:
        """The next pair, for a batch that is being filled."""
        work = self.waiting.popleft()
        self.waiting_tokens -= work.num_tokens
        self._taken.set()
        return work

    def clear(self) -> int:
        """Forgets every waiting pair; returns how many there were."""
        dropped = len(self.waiting)
        self.waiting.clear()
        self.waiting_tokens = 0
        self._waiting_since = None
        self._taken.set()
        return dropped

    async def room(self, max_tokens: int) -> None:
        """Returns once fewer than `max_tokens` wait: then it is time to fetch more."""
        while self.waiting_tokens >= max_tokens and not self.closed:
            self._taken.clear()
            await self._taken.wait()

    def gone(self, now: float) -> bool:
        """Nobody waits for the answer any more."""
        return self.closed or (self.deadline is not None and now >= self.deadline)

    def computing(self, *, start: float) -> None:
        """A pass with pairs of this request began at `start`."""
        self._computing = True
        self._ready = self._waiting_since
        if self._waiting_since is not None:
            self.queue_seconds += start - self._waiting_since
            self._waiting_since = None

    def computed(self, scored: list[Scored], *, start: float, end: float) -> None:
        """The pass is over; hands its margins to the request."""
        self._computing = False
        self.compute_seconds += end - start
        self.turns.append(Turn(start if self._ready is None else self._ready, start, end))
        self._waiting_since = end if self.waiting else None
        if not self.closed:
            self._deliver(scored)
