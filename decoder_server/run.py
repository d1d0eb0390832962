"""One admitted request under way: states in, pairs to the queue, margins back, outcomes out.

Everything but pooling happens on the event loop. Does not know edges, limits or other requests; which
candidates are read on at a finer ratio is cascade's to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace

from cache.encoded import all_at_ratio
from decoder_server.admission import Admission, Place
from decoder_server.backend import Backend, Item, Prompt
from decoder_server.batcher import Batcher
from decoder_server.cascade import Contest
from decoder_server.errors import InvalidRequest, Refused
from decoder_server.observer import Turn
from decoder_server.passages import Found, Source, Wanted
from decoder_server.plan import Plan
from decoder_server.request import OnMiss, Outcome, Status
from decoder_server.tally import Tally, unscored
from decoder_server.ticket import Scored, Ticket, Work

Emit = Callable[[list[Outcome]], Awaitable[None]]

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
        self._finished: asyncio.Queue[list[Outcome] | BaseException] = asyncio.Queue()
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
    ) -> list[Outcome]:
        """Every candidate's outcome, unsorted.

        When the caller is cancelled, reading stops and what waits is dropped before the next pass.

        Args:
            stop_at: then the answer is what is finished, as soon as anything is; None: only all of it.

        Raises:
            Refused: on_miss is fail and a candidate is missing.
            InvalidRequest: the request has more tokens than one may.
        """
        outcomes: list[Outcome] = []
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

    async def _next(self, stop_at: float | None) -> list[Outcome] | None:
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
        outcomes: list[Outcome] = []
        for one in found:
            if one.passage is not None:
                self._contest.hold(one)
                ready.append(one)
            elif one.status is Status.MISSING and self._wanted.on_miss is OnMiss.FAIL:
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
            self._submit(ticket, [(one, one.items or self._wanted.items(one.passage)) for one in ready if one.passage])
        elif ready:
            self._start(self._pool(ticket, ready))

    async def _pool(self, ticket: Ticket, found: Sequence[Found]) -> None:
        """States at the present stage's ratio, made off the event loop, to the queue."""
        loop = asyncio.get_running_loop()
        self._submit(
            ticket, await loop.run_in_executor(self._executor, _pooled, self._wanted, self._contest.ratio, found)
        )

    def _submit(self, ticket: Ticket, ready: Iterable[tuple[Found, Sequence[Item]]]) -> None:
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

    def _num_passage_tokens(self, found: Found, items: Sequence[Item]) -> int:
        if found.states is not None:
            return found.states.num_tokens
        return sum(max(1, item.num_tokens - self._num_prompt_tokens) for item in items)

    def _scored(self, scored: list[Scored]) -> None:
        self._finished.put_nowait(self._tally.add(scored))


def _pooled(wanted: Wanted, ratio: int, found: Sequence[Found]) -> list[tuple[Found, Sequence[Item]]]:
    with_states = [(one, one.states) for one in found if one.states is not None]
    pooled = all_at_ratio([states for _, states in with_states], ratio)
    return [
        (replace(one, passage=states), wanted.items(states))
        for (one, _), states in zip(with_states, pooled, strict=True)
    ]


def _missing(found: Found) -> Refused:
    candidate = found.candidate
    name = repr(candidate.passage_id[:100]) if candidate.passage_id is not None else "an inline text"
    return Refused(
        "PASSAGE_MISSING",
        candidate.passage_id or f"candidates[{candidate.index}]",
        f"candidates[{candidate.index}] ({name}): {found.message}, and on_miss is fail",
    )
