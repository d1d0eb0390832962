"""One planned request: it is admitted, passages arrive, their pairs are queued, margins come back, results go out.

Each stage of a cascade scores the best of the stage before at a finer ratio; a plain request has one stage.
"""

import asyncio
import heapq
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from decoder_server.engine.admission import Admission
from decoder_server.engine.fetch import Fetched, FetchedPassage, Fetcher, FetchRequest, Passages
from decoder_server.engine.plan import Plan
from decoder_server.engine.scheduler import RequestQueue, Scheduler
from decoder_server.engine.score_cache import ScoreCache
from decoder_server.models.backend import Backend
from preread.errors import FailedPrecondition, InvalidRequest
from preread.values import Candidate, Result, StageScore

NOT_REACHED = "the deadline came before it was scored"

# Share of its time, and most seconds, that a cascade leaves for the response's way back.
RESPONSE_SHARE, RESPONSE_SECONDS = 0.1, 0.2

_Margins = asyncio.Future[list[float | None]]
_Scored = tuple[FetchedPassage, Result]


@dataclass(slots=True, eq=False)
class RequestRun:
    """A planned request, with what scores it."""

    backend: Backend
    scheduler: Scheduler
    admission: Admission
    fetcher: Fetcher
    score_cache: ScoreCache
    scope: bytes  # of the caller: margins of other scopes are not read from the cache
    max_tokens: int | None  # prompt tokens and states over all pairs; None: no limit
    wanted: FetchRequest  # states at the plan's base ratio
    plan: Plan
    equal: Mapping[int, Sequence[int]]  # of candidates that are fetched: all that name the same passage
    num_tokens: int = 0  # submitted so far

    async def results(self, deadline: float | None) -> AsyncGenerator[list[Result], None]:
        """Admits the request, then gives every candidate's result once, as soon as it is settled.

        Raises Overloaded where there is no room, FailedPrecondition where on_miss is fail and a candidate is missing,
        InvalidRequest for more tokens than a request may have, Unavailable when the scheduler has ended.
        """
        trace = self.wanted.trace
        stop_at = None  # when a cascade responds with what it has
        if self.plan.cascade and deadline is not None:
            stop_at = deadline - min(RESPONSE_SECONDS, RESPONSE_SHARE * (deadline - trace.start))
        cascade = CascadeState(self.plan, self.wanted.indexes)
        reads = self.plan.reads(len(self.equal))
        with (
            self.admission.admit(reads, self.wanted.prompt.num_tokens) as reservation,
            self.scheduler.queued(reservation.num_tokens, deadline) as queue,
        ):
            trace.passes = queue.passes
            passages = self.fetcher.fetch(self.wanted, cascade.ratio)
            while True:
                async with aclosing(self._scored(queue, passages, cascade, stop_at)) as stage:
                    async for scored in stage:
                        reservation.finished(len(scored), cascade.stage)
                        if settled := cascade.settle(scored):
                            yield self._named(settled)
                if cascade.owed:  # the deadline is near
                    trace.stopped_early = True
                    yield self._named(cascade.stop(self.wanted.candidates))
                    return
                if not (best := cascade.advance()):
                    return
                passages = self.fetcher.at_ratio(self.wanted, best, cascade.ratio)

    async def _scored(
        self, queue: RequestQueue, passages: Passages, cascade: "CascadeState", stop_at: float | None
    ) -> AsyncGenerator[list[_Scored], None]:
        """Results of one stage, as passages arrive and passes end; fewer when it is time to stop."""
        num_prompt_tokens, activate = self.wanted.prompt.num_tokens, self.backend.activate
        scheduled: dict[_Margins, FetchedPassage] = {}
        arriving: asyncio.Task[Fetched] | None = asyncio.create_task(self._next(queue, passages))
        try:
            while arriving or scheduled:
                timeout = None if stop_at is None or not cascade.any_scored else max(0.0, stop_at - time.monotonic())
                awaited: list[asyncio.Future[Any]] = [*scheduled, arriving] if arriving else [*scheduled]
                done, _ = await asyncio.wait(awaited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    return
                ended = [(scheduled.pop(margins), margins.result()) for margins in [*scheduled] if margins in done]
                self._keep(ended)
                results = []
                if arriving in done:
                    chunk = arriving.result()
                    results += [(one, self._unscored(one)) for one in chunk if one.passage is None]
                    for one, known in self._known([one for one in chunk if one.passage is not None]):
                        self._count(one, cascade)
                        if None in known:
                            scheduled[self.scheduler.submit(queue, one.pairs)] = one
                        else:
                            ended.append((one, known))
                    arriving = asyncio.create_task(self._next(queue, passages)) if chunk else None
                results += [(one, one.scored(own, cascade.ratio, num_prompt_tokens, activate)) for one, own in ended]
                if results:
                    yield results
        finally:
            if arriving:
                arriving.cancel()
                await asyncio.gather(arriving, return_exceptions=True)
            await passages.aclose()

    async def _next(self, queue: RequestQueue, passages: Passages) -> Fetched:
        """The next passages, when the queue has room for their pairs; of a listwise model all; none at the end."""
        await self.scheduler.room(queue)
        if self.backend.listwise:
            return [one async for chunk in passages for one in chunk]
        return await anext(passages, [])

    def _known(self, passages: Fetched) -> list[tuple[FetchedPassage, list[float | None]]]:
        """Passages with their margins of earlier requests, per pair; None: not known."""
        pairs = [pair.identity for one in passages for pair in one.pairs] if self.score_cache.enabled else []
        known = iter(self.score_cache.get(pairs, self.scope))
        return [(one, [next(known, None) for _ in one.pairs]) for one in passages]

    def _keep(self, scored: Sequence[tuple[FetchedPassage, list[float | None]]]) -> None:
        if scored and self.score_cache.enabled:
            pairs = [pair.identity for one, _ in scored for pair in one.pairs]
            self.score_cache.put(pairs, [margin for _, own in scored for margin in own], self.scope)

    def _count(self, one: FetchedPassage, cascade: "CascadeState") -> None:
        self.num_tokens += sum(pair.num_tokens for pair in one.pairs)
        if self.max_tokens is not None and self.num_tokens > self.max_tokens:
            expected = f"at most {self.max_tokens}, prompt tokens and states over all candidates"
            raise InvalidRequest("tokens of the request", self.num_tokens, expected)
        if cascade.stage == 0:
            self.admission.learn(one.num_tokens(self.wanted.prompt.num_tokens))

    def _unscored(self, one: FetchedPassage) -> Result:
        passage_id = one.passage_id or ""
        if one.status == "missing" and self.wanted.on_miss == "fail":
            name = repr(one.passage_id[:100]) if one.passage_id is not None else "an inline text"
            message = f"({name}): {one.message}, and on_miss is fail"
            raise FailedPrecondition("PASSAGE_MISSING", passage_id, message, path=("candidates", one.index))
        return Result(one.index, passage_id, one.status, message=one.message, empty=one.empty)

    def _named(self, settled: Iterable[Result]) -> list[Result]:
        """A result for every candidate that names the passage."""
        return [one if i == one.index else replace(one, index=i) for one in settled for i in self.equal[one.index]]


class CascadeState:
    """How far the candidates of one request have come. In the last stage every result is settled as it comes.

    A passage that can no longer reach the next stage is dropped immediately, states and all.
    """

    def __init__(self, plan: Plan, indexes: Iterable[int]) -> None:
        self.stage = 0
        self.any_scored = False
        self._plan = plan
        self.owed = dict.fromkeys(indexes)  # candidates without a result of the present stage
        self._best: list[tuple[float, int]] = []  # a heap of (margin, -index): those that the next stage would score
        self._reached: dict[int, _Scored] = {}  # of candidates that are not settled, with states at the base ratio

    @property
    def ratio(self) -> int:
        return self._plan.stages[self.stage].compression_ratio

    @property
    def is_last_stage(self) -> bool:
        return self.stage == len(self._plan.stages) - 1

    def settle(self, results: Iterable[_Scored]) -> list[Result]:
        """Takes results of the present stage; returns the candidates that no later stage will score."""
        settled: list[Result] = []
        for one, result in results:
            self.owed.pop(result.index, None)
            _, before = self._reached.pop(result.index, (None, None))
            if result.margin is None or result.score is None:
                # Finer states that could not be scored do not undo the coarser score.
                settled.append(result if before is None else replace(before, message=result.message))
                continue
            self.any_scored = True
            if self._plan.cascade:
                score = StageScore(result.compression_ratio, result.score, result.margin, result.num_states)
                result = replace(result, stages=(*(before.stages if before is not None else ()), score))
            if self.is_last_stage:
                settled.append(result)
                continue
            self._reached[result.index] = one, result
            heapq.heappush(self._best, (result.margin or 0.0, -result.index))
            if len(self._best) > self._plan.stages[self.stage].keep:
                settled.append(self._reached.pop(-heapq.heappop(self._best)[1])[1])
        return settled

    def advance(self) -> Fetched:
        """After a stage: the passages of the next one, best first; empty when all candidates are settled."""
        if self.is_last_stage or not self._reached:
            return []
        passages = [self._reached[-negative][0] for _, negative in sorted(self._best, reverse=True)]
        self.stage += 1
        self.owed = dict.fromkeys(one.index for one in passages)
        self._best.clear()
        return passages

    def stop(self, candidates: Sequence[Candidate]) -> list[Result]:
        """Settles everything else: each candidate as far as it came."""
        unread = [i for i in self.owed if i not in self._reached]
        settled = [result for _, result in self._reached.values()]
        settled += [Result(i, candidates[i].passage_id or "", "failed", message=NOT_REACHED) for i in unread]
        self.owed.clear()
        self._reached.clear()
        return settled
