"""Which candidates of one request are read on, stage by stage, and what each ends with. Pure; knows no queue.

A passage that cannot be among those that go on any more is let go at once, states and all: what is
held of a thousand candidates is what may still be read.

Margins of windows to outcomes of candidates. Pure; knows no queue and no store.

One admitted request under way: states in, pairs to the queue, margins back, outcomes out.

Everything but pooling happens on the event loop. Does not know edges, limits or other requests; which
candidates are read on at a finer ratio is cascade's to say.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

from cache.states import all_at_ratio
from decoder_server.engine.admission import Admission, Place
from decoder_server.engine.fetch import Found, Source, Wanted
from decoder_server.engine.lifecycle import Turn
from decoder_server.engine.plan import Indexed, Plan
from decoder_server.engine.scheduler import Batcher, Scored, Ticket, Work
from decoder_server.models.backend import Backend, Pair, Prompt
from preread.errors import FailedPrecondition, InvalidRequest
from preread.types import Result, StageScore

NOT_REACHED = "the deadline came before it was scored"


class Sieve:
    """The best `keep` of what it was given, by margin, ties by index."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._heap: list[tuple[float, int]] = []  # (margin, -index), the worst first

    def add(self, index: int, margin: float) -> int | None:
        """The index that is out now, this one or another; None while there is room."""
        if len(self._heap) < self._keep:
            heapq.heappush(self._heap, (margin, -index))
            return None
        return -heapq.heappushpop(self._heap, (margin, -index))[1]

    def best(self) -> list[int]:
        """Indexes, best first."""
        return [-negative for _, negative in sorted(self._heap, reverse=True)]


class Contest:
    """One request's candidates under its plan. A plan of one stage settles each as it is scored."""

    def __init__(self, plan: Plan, candidates: Iterable[Indexed]) -> None:
        self.stage = 0
        self.any_scored = False
        self._plan = plan
        self._unread = {candidate.index: candidate for candidate in candidates}  # no outcome yet
        self._left = len(self._unread)  # outcomes that the present stage still owes
        self._sieve = self._new_sieve()
        self._found: dict[int, Found] = {}  # states at the base ratio of what may go on
        self._reached: dict[int, Result] = {}  # how far those came that are not settled

    @property
    def ratio(self) -> int:
        """What the present stage reads at."""
        return self._plan.stages[self.stage].compression_ratio

    @property
    def is_last_stage(self) -> bool:
        return self.stage == len(self._plan.stages) - 1

    @property
    def stage_over(self) -> bool:
        return self._left == 0

    def hold(self, found: Found) -> None:
        """States at the base ratio, as they were fetched: a later stage may need them."""
        if not self.is_last_stage:
            self._found[found.candidate.index] = found

    def scored(self, outcomes: Iterable[Result]) -> list[Result]:
        """Takes the present stage's outcomes; returns the candidates that are settled by them: read on by nobody."""
        settled: list[Result] = []
        for outcome in outcomes:
            self._left -= 1
            self._unread.pop(outcome.index, None)
            before = self._reached.pop(outcome.index, None)
            if outcome.margin is None:
                self._found.pop(outcome.index, None)
                # Finer states that could not be read do not undo what coarser ones said.
                settled.append(outcome if before is None else replace(before, message=outcome.message))
                continue
            self.any_scored = True
            settled += self._entered(self._with_stages(outcome, before))
        return settled

    def advance(self) -> list[Found]:
        """After a stage: what the next one reads, best first; empty when there is none, and all is settled."""
        best = [] if self.is_last_stage or not self._reached else self._sieve.best()
        found = [self._found[index] for index in best]
        if found:
            self.stage += 1
            self._left = len(found)
            self._sieve = self._new_sieve()
            if self.is_last_stage:
                self._found.clear()
        return found

    def stop(self) -> list[Result]:
        """Settles what is not: each as far as it came."""
        unread = [
            Result(candidate.index, candidate.passage_id or "", "failed", message=NOT_REACHED)
            for candidate in self._unread.values()
        ]
        reached = list(self._reached.values())
        self._unread.clear()
        self._reached.clear()
        self._found.clear()
        self._left = 0
        return [*reached, *unread]

    def _entered(self, outcome: Result) -> list[Result]:
        if self.is_last_stage:
            return [outcome]
        self._reached[outcome.index] = outcome
        out = self._sieve.add(outcome.index, outcome.margin or 0.0)
        if out is None:
            return []
        self._found.pop(out)
        return [self._reached.pop(out)]

    def _with_stages(self, outcome: Result, before: Result | None) -> Result:
        if not self._plan.cascade or outcome.margin is None or outcome.score is None:
            return outcome
        score = StageScore(outcome.compression_ratio, outcome.score, outcome.margin, outcome.num_states)
        return replace(outcome, stages=(*(before.stages if before is not None else ()), score))

    def _new_sieve(self) -> Sieve:
        return Sieve(self._plan.stages[self.stage].keep)


def ranked(outcomes: Iterable[Result], top_n: int) -> list[Result]:
    """Scored ones best first, ties by index, at most `top_n` (0: all); then the others in request order.

    In a cascade whoever reached a later stage comes before all that did not.
    """
    every = sorted(outcomes, key=lambda o: o.index)
    scored = sorted((o for o in every if o.margin is not None), key=lambda o: (-len(o.stages), -(o.margin or 0.0)))
    return (scored[:top_n] if top_n else scored) + [o for o in every if o.margin is None]


def unscored(found: Found) -> Result:
    """The outcome of a candidate without states."""
    candidate = found.candidate
    return Result(candidate.index, candidate.passage_id or "", found.status, message=found.message, empty=found.empty)


@dataclass(slots=True)
class _Pending:
    found: Found
    items: Sequence[Pair]
    scored: list[Scored] = field(default_factory=list)


class Tally:
    """Candidates whose windows are being scored; the best window of a passage counts."""

    def __init__(self, activate: Callable[[float], float], num_prompt_tokens: int) -> None:
        """
        Args:
            activate: a margin's score.
            num_prompt_tokens: what of an item's tokens is not the passage's.
        """
        self._activate = activate
        self._num_prompt_tokens = num_prompt_tokens
        self._pending: dict[int, _Pending] = {}

    def expect(self, found: Found, items: Sequence[Pair]) -> None:
        self._pending[found.candidate.index] = _Pending(found, items)

    def add(self, scored: Sequence[Scored]) -> list[Result]:
        """Takes margins; returns the candidates that are complete now."""
        complete = []
        for one in scored:
            pending = self._pending[one.index]
            pending.scored.append(one)
            if len(pending.scored) == len(pending.items):
                complete.append(self._outcome(self._pending.pop(one.index)))
        return complete

    def _outcome(self, pending: _Pending) -> Result:
        found = pending.found
        states = found.states
        if states is not None:
            # A ratio may be far above the passage's length: its one state stands for no more tokens than there are.
            num_tokens = states.num_states * min(states.compression_ratio, states.num_tokens)
        else:
            num_tokens = sum(max(0, item.num_tokens - self._num_prompt_tokens) for item in pending.items)
        outcome = Result(
            index=found.candidate.index,
            passage_id=found.candidate.passage_id or "",
            status=found.status,
            num_states=states.num_states if states is not None else 0,
            compression_ratio=states.compression_ratio if states is not None else 0,
            truncated=any(item.truncated for item in pending.items),
            num_passage_tokens=num_tokens,
        )
        # With one window unknown the best is unknown too.
        bad = next((one for one in pending.scored if not math.isfinite(one.margin)), None)
        if bad is not None:
            return replace(outcome, status="failed", message=bad.error)
        margin = max(one.margin for one in pending.scored)
        return replace(outcome, margin=margin, score=self._activate(margin))


Emit = Callable[[list[Result]], Awaitable[None]]

# Passages pooled at a time, so that the first of a stage reach the model early.
POOL_CHUNK = 32


class Run:
    """Made for one request inside its ticket."""

    def __init__(
        self,
        wanted: Wanted,
        plan: Plan,
        same: Mapping[int, Sequence[int]],
        prompt: Prompt,
        backend: Backend,
        batcher: Batcher,
        source: Source,
        admission: Admission,
        executor: Executor,
        max_tokens: int | None = None,
    ) -> None:
        """
        Args:
            wanted: states at the plan's base ratio.
            same: per index of a wanted candidate, every index of the request that names the same passage.
            executor: where states are pooled for a stage.
            max_tokens: of the request, prompt tokens and states over all its pairs; None: no limit.
        """
        self._wanted = wanted
        self._contest = Contest(plan, wanted.candidates)
        self._num_prompt_tokens = prompt.num_tokens
        self._batcher = batcher
        self._source = source
        self._admission = admission
        self._executor = executor
        self._tally = Tally(backend.activate, prompt.num_tokens)
        self._same = same
        self._finished: asyncio.Queue[list[Result] | BaseException] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self.stopped_early = False
        self._whole = backend.listwise
        self._held: list[Found] = []  # of a listwise model, until every candidate is here
        self._num_awaited = len(wanted.candidates)
        self.turns: list[Turn] = []
        self.queue_seconds = 0.0
        self.compute_seconds = 0.0

    async def gather(
        self, place: Place, deadline: float | None, emit: Emit | None, stop_at: float | None = None
    ) -> list[Result]:
        """Every candidate's outcome, unsorted.

        When the caller is cancelled, reading stops and what waits is dropped before the next pass.

        Args:
            stop_at: then the answer is what is finished, as soon as anything is; None: only all of it.

        Raises:
            FailedPrecondition: on_miss is fail and a candidate is missing.
            InvalidRequest: the request has more tokens than one may.
        """
        outcomes: list[Result] = []
        contest = self._contest
        with self._batcher.ticket(place.num_tokens, self._scored, deadline) as ticket:
            self._start(self._source_feed(ticket))
            try:
                while True:
                    fresh = await self._next(stop_at)
                    if fresh is None:
                        self.stopped_early = True
                        settled = contest.stop()
                    else:
                        place.finished(len(fresh), contest.stage)
                        settled = contest.scored(fresh)
                    named = [replace(outcome, index=i) for outcome in settled for i in self._same[outcome.index]]
                    outcomes += named
                    if emit is not None and named:
                        await emit(named)
                    if contest.stage_over and not self._read_on(ticket):
                        break
            finally:
                for task in self._tasks:
                    task.cancel()
                self.queue_seconds, self.compute_seconds = ticket.queue_seconds, ticket.compute_seconds
                self.turns = ticket.turns
        return outcomes

    async def _next(self, stop_at: float | None) -> list[Result] | None:
        """Outcomes of the present stage; None: it is time to stop, and there is something to show."""
        try:
            async with asyncio.timeout_at(stop_at):
                fresh = await self._finished.get()
        except TimeoutError:
            if self._contest.any_scored:
                return None
            fresh = await self._finished.get()
        if isinstance(fresh, BaseException):
            raise fresh
        return fresh

    def _read_on(self, ticket: Ticket) -> bool:
        """Begins the next stage, if there is one."""
        found = self._contest.advance()
        for first in range(0, len(found), POOL_CHUNK):
            self._start(self._pool(ticket, found[first : first + POOL_CHUNK]))
        return bool(found)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception as exc:  # a bug, or it would be a Found: the request must hear of it
                self._finished.put_nowait(exc)

        self._tasks.add(asyncio.create_task(guarded()))

    async def _source_feed(self, ticket: Ticket) -> None:
        await self._source.feed(
            self._wanted,
            room=lambda: ticket.room(self._batcher.share_tokens()),
            deliver=lambda found: self._arrived(ticket, found),
        )

    def _arrived(self, ticket: Ticket, found: list[Found]) -> None:
        ready: list[Found] = []
        outcomes: list[Result] = []
        for one in found:
            if one.passage is not None:
                self._contest.hold(one)
                ready.append(one)
            elif one.status == "missing" and self._wanted.on_miss == "fail":
                self._finished.put_nowait(_missing(one))
            else:
                outcomes.append(unscored(one))
        self._num_awaited -= len(found)
        self._held += ready
        if not self._whole or self._num_awaited == 0:
            self._begin(ticket, self._held)
            self._held = []
        if outcomes:
            self._finished.put_nowait(outcomes)

    def _begin(self, ticket: Ticket, ready: list[Found]) -> None:
        """Makes items of what is here; pooling goes elsewhere."""
        if self._contest.ratio == self._wanted.compression_ratio:
            self._submit(ticket, [(one, one.items or self._wanted.pairs(one.passage)) for one in ready if one.passage])
        elif ready:
            self._start(self._pool(ticket, ready))

    async def _pool(self, ticket: Ticket, found: Sequence[Found]) -> None:
        """States at the present stage's ratio, made off the event loop, to the queue."""
        loop = asyncio.get_running_loop()
        self._submit(
            ticket, await loop.run_in_executor(self._executor, _pooled, self._wanted, self._contest.ratio, found)
        )

    def _submit(self, ticket: Ticket, ready: Iterable[tuple[Found, Sequence[Pair]]]) -> None:
        works: list[Work] = []
        for one, items in ready:
            self._tally.expect(one, items)
            works += [Work(ticket, one.candidate.index, item) for item in items]
            if self._contest.stage == 0:
                self._admission.learn(self._num_passage_tokens(one, items))
        self._num_tokens += sum(work.num_tokens for work in works)
        if self._max_tokens is not None and self._num_tokens > self._max_tokens:
            expected = f"at most {self._max_tokens}, prompt tokens and states over all candidates"
            self._finished.put_nowait(InvalidRequest("tokens of the request", self._num_tokens, expected))
            return
        self._batcher.submit(ticket, works)

    def _num_passage_tokens(self, found: Found, items: Sequence[Pair]) -> int:
        if found.states is not None:
            return found.states.num_tokens
        return sum(max(1, item.num_tokens - self._num_prompt_tokens) for item in items)

    def _scored(self, scored: list[Scored]) -> None:
        self._finished.put_nowait(self._tally.add(scored))


def _pooled(wanted: Wanted, ratio: int, found: Sequence[Found]) -> list[tuple[Found, Sequence[Pair]]]:
    with_states = [(one, one.states) for one in found if one.states is not None]
    pooled = all_at_ratio([states for _, states in with_states], ratio)
    return [
        (replace(one, passage=states), wanted.pairs(states))
        for (one, _), states in zip(with_states, pooled, strict=True)
    ]


def _missing(found: Found) -> FailedPrecondition:
    candidate = found.candidate
    name = repr(candidate.passage_id[:100]) if candidate.passage_id is not None else "an inline text"
    return FailedPrecondition(
        "PASSAGE_MISSING",
        candidate.passage_id or "",
        f"({name}): {found.message}, and on_miss is fail",
        path=("candidates", candidate.index),
    )
