"""The queue in front of one model and the loop that empties it: ready pairs become batches, batches forward passes.

Order among requests is the fair sojourn protocol (Friedman & Henderson, SIGMETRICS 2003): a request ranks by when it
would finish if the machine were shared equally. Equal requests go first come, first served; a small one overtakes a
large one that has more than that left, but not forever: virtual time passes with all work done.
"""

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from decoder_server.engine.lifecycle import Observer, PassRecord, QueueInterval
from decoder_server.models.backend import Backend, Pair
from preread.errors import Unavailable

T = TypeVar("T")

log = logging.getLogger(__name__)

STOPPED = "the batching loop has ended; the server's log has the cause"

# Target duration of a batch: a new request waits at most this long, and a cancelled one is noticed after it. Long
# enough that a pass's fixed cost does not show, short enough that a person does not notice.
BATCH_SECONDS = 0.1
# Where many requests queue, a batch may take this share of the queued tokens, up to so long: a model computes more
# tokens a second in larger batches.
QUEUED_SHARE, MAX_BATCH_SECONDS = 0.25, 0.6
# Weight of the past at each new pass, in the rate that bounds the queue (some fifty passes) and in the learned time.
RATE_MEMORY, TIME_MEMORY = 0.98, 0.99
# Share of the data's own scale that pulls the two learned rates together as long as passes do not tell them apart.
PRIOR = 1e-3
# Fewer attention cells than this cost less than another pass would (about 70 prompt tokens of dense work at the Nano
# shape); above it, padding may at most double attention's work.
FREE_CELLS, MAX_PADDING = 1 << 18, 2.0
# Prompts of one batch over the same passage: up to so many times the shortest one, their padding stays below the bound.
LENGTH_SPREAD = 1.5


@dataclass
class SchedulerStats:
    """Counts and rates since the start; seconds of a pass over (prompt tokens, states) are learned by least squares.

    The two rates differ by far: a state only feeds keys and values, a prompt token runs through every layer.
    """

    num_passes: int = 0
    num_pairs: int = 0  # scored, or tried to
    num_tokens: int = 0
    num_dropped_pairs: int = 0  # of cancelled requests, or past their deadline
    compute_seconds: float = 0.0
    _recent: tuple[float, float] = 0.0, 0.0  # tokens that left the queue, and seconds
    _fit: tuple[float, ...] = (0.0,) * 7  # fading sums of p², p s, s², p t, s t; tokens; seconds

    @property
    def tokens_per_second(self) -> float:
        """The rate over all passes; 0 before the first."""
        return self.num_tokens / self.compute_seconds if self.compute_seconds else 0.0

    def drained(self, num_tokens: int, seconds: float) -> None:
        """A pass took that much from the queue; `seconds` since the pass before, if pairs were queued by then."""
        tokens_before, seconds_before = self._recent
        self._recent = RATE_MEMORY * tokens_before + num_tokens, RATE_MEMORY * seconds_before + seconds

    @property
    def drain_rate(self) -> float:
        """Tokens a second that recently left the queue; under a flood passes wait for other work, too. 0: none yet."""
        recent_tokens, recent_seconds = self._recent
        return recent_tokens / recent_seconds if recent_seconds else self.tokens_per_second

    def count(self, pairs: Sequence[Pair], seconds: float) -> PassRecord:
        """Counts one pass and describes it."""
        num_tokens, num_prompt_tokens = sum(p.num_tokens for p in pairs), sum(p.num_prompt_tokens for p in pairs)
        self.num_passes += 1
        self.num_pairs += len(pairs)
        self.num_tokens += num_tokens
        self.compute_seconds += seconds
        self.learn(num_prompt_tokens, num_tokens - num_prompt_tokens, seconds)
        needed = sum(_cells(p.num_prompt_tokens, p.num_states) for p in pairs)
        longest = _cells(max(p.num_prompt_tokens for p in pairs), max(p.num_states for p in pairs))
        return PassRecord(len(pairs), num_tokens, needed, len(pairs) * longest - needed, seconds)

    def learn(self, num_prompt_tokens: int, num_states: int, seconds: float) -> None:
        p, s, t = float(num_prompt_tokens), float(num_states), seconds
        # Every pass counts by its share, not by its square: a batch twice as large is not four times the evidence.
        w = 1.0 / max(1.0, p + s)
        new = (w * p * p, w * p * s, w * s * s, w * p * t, w * s * t, p + s, t)
        self._fit = tuple(TIME_MEMORY * old + one for old, one in zip(self._fit, new, strict=True))

    @property
    def knows_pass_time(self) -> bool:
        return self._fit[5] > 0

    def pass_seconds(self, num_prompt_tokens: float, num_states: float) -> float:
        """Expected seconds of such a pass; 0 before the first pass."""
        if not self.knows_pass_time:
            return 0.0
        pp, ps, ss, pt, st, tokens, seconds = self._fit
        mean = seconds / tokens
        prior = PRIOR * (pp + ss)
        pp, ss, pt, st = pp + prior, ss + prior, pt + prior * mean, st + prior * mean
        determinant = pp * ss - ps * ps
        per_token, per_state = (pt * ss - st * ps) / determinant, (st * pp - pt * ps) / determinant
        if per_state < 0:  # noise: the other alone explains it
            per_token, per_state = pt / pp, 0.0
        elif per_token < 0:
            per_token, per_state = 0.0, st / ss
        if not (math.isfinite(per_token) and math.isfinite(per_state)):
            per_token = per_state = mean
        return num_prompt_tokens * per_token + num_states * per_state


@dataclass(slots=True, eq=False)
class _Submission:
    """One submission: the windows of one passage, under every prompt of its request."""

    queue: "RequestQueue"
    margins: list[float | None]  # of its pairs, in their order
    num_left: int  # that are not scored yet
    future: asyncio.Future[list[float | None]]

    def scored(self, row: int, margin: float | None) -> None:
        self.margins[row] = margin
        self.num_left -= 1
        if self.num_left == 0 and not self.future.done():
            self.future.set_result(self.margins)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # retrieved: the request may have ended for another reason


_Queued = tuple[_Submission, int, Pair]  # the pair's row in its submission


@dataclass(slots=True, eq=False)
class RequestQueue:
    """The queued pairs of one request. Made by Scheduler.queued."""

    rank: float  # virtual time at which an equal share of the machine would finish it; lower goes first
    deadline: float | None  # on time.monotonic's clock; None: none
    num_tokens: int = 0  # that are queued
    closed: bool = False
    computing: bool = False
    passes: list[QueueInterval] = field(default_factory=list)
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: deque[_Queued] = field(default_factory=deque)
    since: float | None = None  # pairs have been ready and none of them computed

    def unit(self, max_tokens: int) -> tuple[int, int]:
        """How many of the next pairs are of one window, and their tokens: up to `max_tokens`, but at least one pair."""
        key, num_pairs, num_tokens = self.waiting[0][2].key, 0, 0
        for *_, pair in self.waiting:
            if num_pairs and not (key and pair.key == key and num_tokens + pair.num_tokens <= max_tokens):
                break
            num_pairs, num_tokens = num_pairs + 1, num_tokens + pair.num_tokens
        return num_pairs, num_tokens

    def take(self) -> _Queued:
        """The next pair, for a batch that is being filled."""
        passage, row, pair = self.waiting.popleft()
        self.num_tokens -= pair.num_tokens
        self.taken.set()
        return passage, row, pair

    def clear(self, error: Exception | None = None) -> int:
        """Drops everything queued, or fails it with `error`; how many pairs that were.

        The futures of dropped pairs stay pending: their request has ended, or is about to by its deadline.
        """
        dropped, self.num_tokens = list(self.waiting), 0
        self.waiting.clear()
        self.since = self.since if self.computing else None
        self.taken.set()
        if error is not None:
            for passage, *_ in dropped:
                passage.fail(error)
        return len(dropped)

    def expired(self, now: float) -> bool:
        return self.closed or (self.deadline is not None and now >= self.deadline)

    def pass_finished(self, start: float, end: float) -> None:
        self.computing = False
        self.passes.append((start if self.since is None else self.since, start, end))
        self.since = end if self.waiting else None


class Scheduler:
    """The queues of all requests to one model, and the loop that batches them."""

    def __init__(
        self,
        backend: Backend,
        executor: Executor,  # the model's thread
        max_batch_tokens: int,
        min_batch_tokens: int | None = None,  # of batches that hold what is computed in BATCH_SECONDS; None: the same
        observers: Sequence[Observer] = (),
    ) -> None:
        self.stats = SchedulerStats()
        self._max_tokens = max_batch_tokens
        self._min_tokens = max_batch_tokens if min_batch_tokens is None else min_batch_tokens
        self._backend = backend
        self._executor = executor
        self._observers = observers
        self.queues: list[RequestQueue] = []  # by rank, then arrival
        self._virtual_time = 0.0
        self._ready = asyncio.Event()
        self._batch: list[_Queued] = []  # taken from the queues and not scored yet
        self._last_pass: float | None = None  # when it ended, if pairs were queued ever since
        self._stopped = False

    @contextmanager
    def queued(self, num_tokens: float, deadline: float | None = None) -> Iterator[RequestQueue]:
        """A queue for a request of about `num_tokens`; pairs still in it at the end are dropped, never computed."""
        queue = RequestQueue(self._virtual_time + num_tokens, deadline)
        self.queues.append(queue)
        self.queues.sort(key=lambda one: one.rank)  # stable: equal ranks keep their arrival order
        try:
            yield queue
        finally:
            queue.closed = True
            self.stats.num_dropped_pairs += queue.clear()
            self.queues.remove(queue)

    def submit(self, queue: RequestQueue, pairs: Sequence[Pair]) -> asyncio.Future[list[float | None]]:
        """Queues the pairs of one passage; their margins: NaN for a logit that is not finite, None: the pass failed.

        Pairs of the same window, under one prompt and another, are to be next to each other: a batch takes them
        together, and what they share is computed once.
        """
        if self._stopped:
            raise Unavailable(STOPPED)
        future = asyncio.get_running_loop().create_future()
        passage = _Submission(queue, [None] * len(pairs), len(pairs), future)
        queue.waiting.extend((passage, row, pair) for row, pair in enumerate(pairs))
        queue.num_tokens += sum(pair.num_tokens for pair in pairs)
        if not queue.computing and queue.since is None:
            queue.since = time.monotonic()
        self._ready.set()
        return passage.future

    async def room(self, queue: RequestQueue) -> None:
        """Returns when the queue should be fed: less than its share of two batches is in it."""
        max_tokens = max(1, 2 * self.batch_tokens // max(1, len(self.queues)))
        while queue.num_tokens >= max_tokens and not queue.closed:
            queue.taken.clear()
            await queue.taken.wait()

    @property
    def batch_tokens(self) -> int:
        """The token budget of the next batch."""
        rate = self.stats.tokens_per_second
        queued = QUEUED_SHARE * sum(queue.num_tokens for queue in self.queues)
        measured = max(rate * BATCH_SECONDS, min(rate * MAX_BATCH_SECONDS, queued))
        return min(self._max_tokens, max(self._min_tokens, int(measured)))

    async def between_passes(self, function: Callable[..., T], *args: object) -> T:
        """Runs something else on the model's thread, between two passes."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def run(self) -> None:
        """Batches until cancelled. However it ends, no call is left waiting."""
        try:
            while True:
                await self._ready.wait()
                self._batch = self._next_batch()
                every = [range(len(self._batch))]
                for rows in every if self._backend.listwise else split_by_length([pair for *_, pair in self._batch]):
                    await self._pass([self._batch[i] for i in rows])
        finally:
            self._stopped = True
            error = Unavailable(STOPPED)
            for passage, *_ in self._batch:
                passage.fail(error)
            for queue in self.queues:
                queue.clear(error)

    def _next_batch(self) -> list[_Queued]:
        """Pairs of the best-ranked requests, up to the token budget; at least one where any are queued.

        Pairs of one window are not divided: all but the first, which add a query alone, may exceed the budget, up to
        the largest one.
        """
        now, left = time.monotonic(), self.batch_tokens
        spare = self._max_tokens - left
        batch: list[_Queued] = []
        for queue in self.queues:
            if queue.expired(now):
                self.stats.num_dropped_pairs += queue.clear()
            if self._backend.listwise and queue.waiting:  # one request's list, whole
                return [queue.take() for _ in range(len(queue.waiting))]
            while queue.waiting:
                num_pairs, num_tokens = queue.unit(self._max_tokens)
                if batch and (queue.waiting[0][2].num_tokens > left or num_tokens > left + spare):
                    break
                batch += [queue.take() for _ in range(num_pairs)]
                left -= num_tokens
        if not batch:
            self._ready.clear()
            self._last_pass = None
        return batch

    async def _pass(self, batch: list[_Queued]) -> None:
        start = time.monotonic()
        alive = [one for one in batch if not one[0].queue.expired(start)]
        self.stats.num_dropped_pairs += len(batch) - len(alive)
        if not alive:
            return
        pairs = [pair for *_, pair in alive]
        queues = {passage.queue for passage, *_ in alive}
        for queue in queues:
            queue.computing = True
        margins = await self.between_passes(self._score, pairs)
        end = time.monotonic()
        counted = self.stats.count(pairs, end - start)
        self.stats.drained(counted.num_tokens, end - (self._last_pass or start))
        self._virtual_time += counted.num_tokens / max(1, len(self.queues))
        self._last_pass = end
        for observer in self._observers:
            observer.pass_finished(counted)
        for queue in queues:
            queue.pass_finished(start, end)
        for (passage, row, _), margin in zip(alive, margins, strict=True):
            passage.scored(row, margin)

    def _score(self, pairs: list[Pair]) -> list[float | None]:
        """On the model's thread. A pass that raises is repeated pair by pair: a bad one costs itself only."""
        try:
            margins: list[float | None] = self._backend.score(pairs).tolist()
        except Exception as exc:  # whatever the model raises must not end the loop
            if len(pairs) > 1 and not self._backend.listwise:  # pairs of a list would have other scores alone
                log.warning("a pass of %d pairs failed, repeating it pair by pair: %s", len(pairs), exc)
                return [margin for pair in pairs for margin in self._score([pair])]
            log.exception("a pass of %d could not be scored", len(pairs))
            return [None] * len(pairs)
        if len(margins) != len(pairs):
            raise AssertionError(f"{len(margins)} margins of {len(pairs)} pairs")
        return margins


def split_by_length(pairs: Sequence[Pair], max_tokens: int | None = None) -> list[list[int]]:
    """Indexes of `pairs` in batches, each sorted by length, none wasting more than FREE_CELLS and MAX_PADDING allow.

    Dense layers see packed rows and never pad; attention pads every pair of a batch to the longest prompt and the
    longest passage in it, so the waste is counted in attention cells. Of prompts of about one length those over the
    same passage stay together, since a pass computes it once for them. `max_tokens` is of one batch, a larger pair goes
    alone; None: no limit.
    """
    batches: list[list[int]] = []
    real = num_tokens = 0  # cells that the current batch needs, and its tokens
    longest_prompt = 0
    for unit, longest_own, own, own_tokens in _units(pairs, max_tokens):
        longest = max(longest_prompt, longest_own)
        # Sorted by states, so this unit's are the longest so far.
        padded = (len(batches[-1]) + len(unit)) * _cells(longest, pairs[unit[0]].num_states) if batches else 0
        fits = bool(batches) and (max_tokens is None or num_tokens + own_tokens <= max_tokens)
        if fits and (padded <= FREE_CELLS or padded <= MAX_PADDING * (real + own)):
            batches[-1] += unit
            real, longest_prompt, num_tokens = real + own, longest, num_tokens + own_tokens
        else:
            batches.append(unit)
            real, longest_prompt, num_tokens = own, longest_own, own_tokens
    return batches


_Unit = tuple[list[int], int, int, int]  # indexes of pairs; their longest prompt, cells and tokens


def _units(pairs: Sequence[Pair], max_tokens: int | None) -> Iterator[_Unit]:
    """By length what a batch should not divide: pairs of one window, under prompts of about one length.

    So far as `max_tokens` allows; a larger pair is a unit.
    """
    sizes = [(pair.num_states, pair.num_prompt_tokens) for pair in pairs]
    counts = Counter(pair.key for pair in pairs)
    if all(num == 1 for key, num in counts.items() if key):  # nothing is shared, the common case: lengths alone decide
        for i in sorted(range(len(pairs)), key=sizes.__getitem__):
            num_states, length = sizes[i]
            yield [i], length, _cells(length, num_states), pairs[i].num_tokens
        return
    begins = _about_one_length({length for _, length in sizes})
    shared = [pair.key if counts[pair.key] > 1 else b"" for pair in pairs]
    groups = [(num_states, begins[length], key) for (num_states, length), key in zip(sizes, shared, strict=True)]
    unit: list[int] = []
    longest = cells = num_tokens = 0
    for i in sorted(range(len(pairs)), key=lambda i: (groups[i], sizes[i])):
        fits = max_tokens is None or num_tokens + pairs[i].num_tokens <= max_tokens
        if unit and not (shared[i] and groups[i] == groups[unit[0]] and fits):
            yield unit, longest, cells, num_tokens
            unit, longest, cells, num_tokens = [], 0, 0, 0
        unit.append(i)
        num_states, length = sizes[i]
        longest, cells = max(longest, length), cells + _cells(length, num_states)
        num_tokens += pairs[i].num_tokens
    if unit:
        yield unit, longest, cells, num_tokens


def _about_one_length(lengths: Iterable[int]) -> dict[int, int]:
    """Per length the shortest one that it may share a batch with: none is more than LENGTH_SPREAD times that."""
    begins: dict[int, int] = {}
    begin = 0
    for length in sorted(lengths):
        begin = begin if length <= LENGTH_SPREAD * begin else length
        begins[length] = begin
    return begins


def _cells(num_prompt_tokens: int, num_states: int) -> int:
    return num_prompt_tokens * (num_prompt_tokens + num_states)
