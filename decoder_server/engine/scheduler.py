"""How long the model takes: seconds per prompt token and per state, learned from its passes. Pure arithmetic.

They differ by far (a state only feeds keys and values, a prompt token runs through every layer), and
what a coarser ratio saves is states: one rate for both would promise too much.

Cuts a batch into passes of similar length. Pure arithmetic; knows no model.

Dense layers see packed rows and never pad; attention pads every pair of a pass to the longest
prompt and the longest passage in it. So the waste is counted in attention cells.

One request's place in the queue: its waiting pairs, its finished scores, its clock.

Only touched from the event loop. Does not know the model or the order among requests.

The loop that turns waiting pairs into passes of the model. The model runs on its own thread.

Order among requests is the fair sojourn protocol (Friedman & Henderson, SIGMETRICS 2003): a
request ranks by when it would finish if the machine were shared equally. Equal requests go first
come, first served; a small one overtakes a large one that has more than that left; a large one
cannot be overtaken for ever, because virtual time passes with all work done. Does not know where
states come from or what a score means.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from decoder_server.engine.lifecycle import Pass, Turn
from decoder_server.models.backend import Backend, Pair

# Weight of the passes before, at each new one: the last hundred or so count.
PACE_MEMORY = 0.99
# How much, of the data's own scale, speaks for one rate for both as long as passes do not tell them apart.
PRIOR = 1e-3


class Pace:
    """Least squares of seconds over (prompt tokens, states), older passes fading."""

    def __init__(self) -> None:
        self._pp = self._ps = self._ss = self._pt = self._st = 0.0
        self._tokens = self._seconds = 0.0

    def learn(self, num_prompt_tokens: int, num_states: int, seconds: float) -> None:
        """One pass."""
        p, s, t = float(num_prompt_tokens), float(num_states), seconds
        # Every pass counts by its share, not by its square: a batch twice as large is no four times the evidence.
        weight = 1.0 / max(1.0, p + s)
        self._pp = PACE_MEMORY * self._pp + weight * p * p
        self._ps = PACE_MEMORY * self._ps + weight * p * s
        self._ss = PACE_MEMORY * self._ss + weight * s * s
        self._pt = PACE_MEMORY * self._pt + weight * p * t
        self._st = PACE_MEMORY * self._st + weight * s * t
        self._tokens = PACE_MEMORY * self._tokens + p + s
        self._seconds = PACE_MEMORY * self._seconds + t

    @property
    def known(self) -> bool:
        """Whether there was any pass."""
        return self._tokens > 0

    def seconds(self, num_prompt_tokens: float, num_states: float) -> float:
        """What so much would take, by itself; 0 before the first pass."""
        per_prompt_token, per_state = self._rates()
        return num_prompt_tokens * per_prompt_token + num_states * per_state

    def _rates(self) -> tuple[float, float]:
        if not self.known:
            return 0.0, 0.0
        mean = self._seconds / self._tokens
        prior = PRIOR * (self._pp + self._ss)
        pp, ss = self._pp + prior, self._ss + prior
        pt, st = self._pt + prior * mean, self._st + prior * mean
        determinant = pp * ss - self._ps * self._ps
        a, b = (pt * ss - st * self._ps) / determinant, (st * pp - pt * self._ps) / determinant
        if b < 0:  # noise: the other alone explains it
            a, b = pt / pp, 0.0
        elif a < 0:
            a, b = 0.0, st / ss
        return (a, b) if math.isfinite(a) and math.isfinite(b) else (mean, mean)


# Below this many cells another pass costs more than the padding it saves (about 70 prompt
# tokens of dense work at the Nano shape).
FREE_CELLS = 1 << 18
# Above it, padding may at most double attention's work.
MAX_PADDING = 2.0


class Sized(Protocol):
    """What has the two lengths of a pair."""

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_states(self) -> int: ...


S = TypeVar("S", bound=Sized)


def split_by_length(pairs: Sequence[S], max_tokens: int | None = None) -> list[list[S]]:
    """`pairs` in batches, each sorted by length, no batch wasting more than the constants above allow.

    Args:
        max_tokens: of one batch; a larger pair goes alone. None: no limit.
    """
    passes: list[list[S]] = []
    real = num_tokens = 0  # cells that the current pass needs, and its tokens
    longest_prompt = 0
    for pair in sorted(pairs, key=lambda p: (p.num_states, p.num_prompt_tokens)):
        own = _cells(pair.num_prompt_tokens, pair.num_states)
        longest = max(longest_prompt, pair.num_prompt_tokens)
        # Sorted by states, so this pair's are the longest so far.
        padded = (len(passes[-1]) + 1) * _cells(longest, pair.num_states) if passes else 0
        num_tokens += pair.num_prompt_tokens + pair.num_states
        fits = bool(passes) and (max_tokens is None or num_tokens <= max_tokens)
        if fits and (padded <= FREE_CELLS or padded <= MAX_PADDING * (real + own)):
            passes[-1].append(pair)
            real, longest_prompt = real + own, longest
        else:
            passes.append([pair])
            real, longest_prompt = own, pair.num_prompt_tokens
            num_tokens = pair.num_prompt_tokens + pair.num_states
    return passes


def num_cells(pairs: Sequence[Sized]) -> tuple[int, int]:
    """Attention cells of one pass: those the pairs need, and those computed with padding."""
    needed = sum(_cells(pair.num_prompt_tokens, pair.num_states) for pair in pairs)
    longest = _cells(max(pair.num_prompt_tokens for pair in pairs), max(pair.num_states for pair in pairs))
    return needed, len(pairs) * longest


def _cells(num_prompt_tokens: int, num_states: int) -> int:
    return num_prompt_tokens * (num_prompt_tokens + num_states)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One item and whose it is."""

    ticket: Ticket
    index: int  # of the candidate in its request
    item: Pair

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


T = TypeVar("T")

SCORING_FAILED = "the model failed on it; the server's log has the cause"

log = logging.getLogger(__name__)

# Who comes next waits for the batch under way, and who left is noticed after it: long enough that
# a pass's fixed cost does not show, short enough that a person does not notice.
BATCH_SECONDS = 0.1
# Where many requests wait, the wait is theirs and not the batch's: a pass may then take so much of what waits, up to
# so long. A model reads more a second in larger batches.
WAITING_SHARE, MAX_BATCH_SECONDS = 0.25, 0.6
# The weight of what was before, pass by pass, in the rate that the queue is bounded by: some fifty passes back.
MEMORY = 0.98


@dataclass
class BatchCounts:
    """What the loop has done since it began."""

    num_passes: int = 0
    num_pairs: int = 0  # scored, or tried to
    num_tokens: int = 0
    num_dropped_pairs: int = 0  # their caller left, or its deadline passed
    compute_seconds: float = 0.0
    _recent_tokens: float = 0.0
    _recent_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """The rate over all passes; 0 before the first."""
        return self.num_tokens / self.compute_seconds if self.compute_seconds else 0.0

    def drained(self, num_tokens: int, seconds: float) -> None:
        """A pass took that much from the queue; `seconds` since the pass before, if work waited then already."""
        self._recent_tokens = MEMORY * self._recent_tokens + num_tokens
        self._recent_seconds = MEMORY * self._recent_seconds + seconds

    @property
    def drain_rate(self) -> float:
        """Tokens a second that have left the queue of late, all that passes wait for included; 0 before the first.

        Under a flood the process has more to do than passes: who waits, waits for that, too.
        """
        return self._recent_tokens / self._recent_seconds if self._recent_seconds else self.tokens_per_second


class Batcher:
    """The queue in front of one model, and the loop that empties it."""

    def __init__(
        self,
        backend: Backend,
        executor: Executor,
        max_batch_tokens: int,
        min_batch_tokens: int | None = None,
        on_pass: Callable[[Pass], None] = lambda _: None,
    ) -> None:
        """
        Args:
            min_batch_tokens: where given, batches hold what the model reads in BATCH_SECONDS, but at
                least this and at most `max_batch_tokens`; None: always `max_batch_tokens`.
        """
        self.max_batch_tokens = max_batch_tokens
        self.min_batch_tokens = max_batch_tokens if min_batch_tokens is None else min_batch_tokens
        self.counts = BatchCounts()
        self.pace = Pace()
        self._backend = backend
        self._executor = executor
        self._on_pass = on_pass
        self._tickets: list[Ticket] = []  # by rank, then arrival
        self._virtual_time = 0.0
        self._ready = asyncio.Event()
        self._pass_before: float | None = None  # when it ended, if work has waited ever since

    @contextmanager
    def ticket(self, num_tokens: float, deliver: Deliver, deadline: float | None = None) -> Iterator[Ticket]:
        """A place for a request of about `num_tokens`.

        On leaving, for whatever reason, what still waits is dropped and never computed.

        Args:
            deliver: takes the margins of each finished pass; called on the event loop.
            deadline: on time.monotonic's clock.
        """
        ticket = Ticket(self._virtual_time + num_tokens, deliver, deadline)
        self._tickets.append(ticket)
        self._tickets.sort(key=lambda t: t.rank)  # stable: equal ranks keep their arrival order
        try:
            yield ticket
        finally:
            ticket.closed = True
            self.counts.num_dropped_pairs += ticket.clear()
            self._tickets.remove(ticket)

    def submit(self, ticket: Ticket, works: Sequence[Work]) -> None:
        """Pairs that are ready to be scored; ignored when the request has ended."""
        if not ticket.closed:
            ticket.add(works)
            self._ready.set()

    @property
    def batch_tokens(self) -> int:
        """The budget of the next batch."""
        rate = self.counts.tokens_per_second
        waiting = WAITING_SHARE * sum(ticket.waiting_tokens for ticket in self._tickets)
        measured = max(rate * BATCH_SECONDS, min(rate * MAX_BATCH_SECONDS, waiting))
        return min(self.max_batch_tokens, max(self.min_batch_tokens, int(measured)))

    def share_tokens(self) -> int:
        """How much of a request should be ready at most: two batches, shared by all requests."""
        return max(1, 2 * self.batch_tokens // max(1, len(self._tickets)))

    async def aside(self, function: Callable[[], T]) -> T:
        """Runs something else on the model's thread, between two passes."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    async def run(self) -> None:
        """Batches until cancelled."""
        while True:
            await self._ready.wait()
            batch = self._next_batch()
            for works in [batch] if self._backend.listwise and batch else split_by_length(batch):
                now = time.monotonic()
                alive = [work for work in works if not work.ticket.gone(now)]
                self.counts.num_dropped_pairs += len(works) - len(alive)
                if alive:
                    await self._pass(alive)

    def _next_batch(self) -> list[Work]:
        """Pairs of the best-ranked requests, up to the token budget; at least one where any waits."""
        now = time.monotonic()
        batch: list[Work] = []
        num_tokens, budget = 0, self.batch_tokens
        for ticket in self._tickets:
            if ticket.gone(now):
                self.counts.num_dropped_pairs += ticket.clear()
            if self._backend.listwise:
                if ticket.waiting:  # one request's list, whole
                    return [ticket.take() for _ in range(len(ticket.waiting))]
                continue
            while ticket.waiting and (not batch or num_tokens + ticket.waiting[0].num_tokens <= budget):
                work = ticket.take()
                batch.append(work)
                num_tokens += work.num_tokens
        if not batch:
            self._ready.clear()
            self._pass_before = None
        return batch

    async def _pass(self, works: list[Work]) -> None:
        start = time.monotonic()
        for ticket in {work.ticket for work in works}:
            ticket.computing(start=start)
        loop = asyncio.get_running_loop()
        scored = await loop.run_in_executor(self._executor, self._score, [(work.index, work.item) for work in works])
        end = time.monotonic()
        self._count(works, end - start)
        self.counts.drained(sum(work.num_tokens for work in works), end - (self._pass_before or start))
        self._pass_before = end
        owned: dict[Ticket, list[Scored]] = {}
        for work, result in zip(works, scored, strict=True):
            owned.setdefault(work.ticket, []).append(result)
        for ticket, results in owned.items():
            ticket.computed(results, start=start, end=end)

    def _count(self, works: list[Work], seconds: float) -> None:
        num_tokens = sum(work.num_tokens for work in works)
        self.counts.num_passes += 1
        self.counts.num_pairs += len(works)
        self.counts.num_tokens += num_tokens
        self.counts.compute_seconds += seconds
        num_prompt_tokens = sum(work.num_prompt_tokens for work in works)
        self.pace.learn(num_prompt_tokens, num_tokens - num_prompt_tokens, seconds)
        needed, computed = num_cells(works)
        self._on_pass(Pass(len(works), num_tokens, needed, computed - needed, seconds))
        self._virtual_time += num_tokens / max(1, len(self._tickets))

    def _score(self, works: list[tuple[int, Pair]]) -> list[Scored]:
        """On the model's thread. A pass that raises is repeated pair by pair: a bad one costs itself only.

        The pairs of a list cost each other: read alone they would have other scores.
        """
        try:
            margins = self._backend.score([item for _, item in works])
        except Exception as exc:  # whatever the model raises must not end the loop
            if len(works) > 1 and not self._backend.listwise:
                log.warning("a pass of %d pairs failed, repeating it pair by pair: %s", len(works), exc)
                return [scored for work in works for scored in self._score([work])]
            log.exception("a pass of %d could not be scored", len(works))
            return [Scored(index, float("nan"), SCORING_FAILED) for index, _ in works]
        return [
            Scored(index, float(margin), "" if np.isfinite(margin) else "the model's logits are not finite")
            for (index, _), margin in zip(works, margins, strict=True)
        ]
