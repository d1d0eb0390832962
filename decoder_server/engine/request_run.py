"""One admitted request: passages arrive, their pairs are queued, margins come back, results go out.

A cascade is a loop over its stages: each scores the best of the stage before at a finer ratio. A plain request has
one stage. Everything here runs on the event loop, and is awaited in order.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from decoder_server.engine.admission import Admission, Reservation
from decoder_server.engine.fetch import FetchedPassage, Fetcher, FetchRequest
from decoder_server.engine.plan import Plan
from decoder_server.engine.scheduler import RequestQueue, Scheduler
from decoder_server.models.backend import Backend
from preread.errors import FailedPrecondition, InvalidRequest
from preread.types import Candidate, Result, StageScore

SCORING_FAILED = "the model failed on it; the server's log has the cause"
NOT_FINITE = "the model's logits are not finite"
NOT_REACHED = "the deadline came before it was scored"

Margins = asyncio.Future[list[float | None]]


@dataclass(frozen=True, slots=True)
class EngineParts:
    """The parts of an engine that a run needs."""

    backend: Backend
    scheduler: Scheduler
    admission: Admission
    fetcher: Fetcher
    max_request_tokens: int | None = None  # prompt tokens and states over all pairs; None: no limit


class RequestRun:
    """The scoring of one request, made inside its reservation."""

    def __init__(
        self,
        parts: EngineParts,
        wanted: FetchRequest,
        plan: Plan,
        equal: Mapping[int, Sequence[int]],
        reservation: Reservation,
    ) -> None:
        """
        Args:
            wanted: states at the plan's base ratio.
            equal: per index of `wanted`, every index of the request that names the same passage.
        """
        self._parts = parts
        self._wanted = wanted
        self._plan = plan
        self._equal = equal
        self._reservation = reservation
        self._num_tokens = 0

    async def results(self, deadline: float | None) -> AsyncGenerator[list[Result], None]:
        """Every candidate's result once, as soon as it is settled.

        When the caller stops, fetching stops, and queued pairs are dropped before the next pass.

        Raises:
            FailedPrecondition: on_miss is fail and a candidate is missing.
            InvalidRequest: the request has more tokens than one may have.
            Unavailable: the scheduler has ended.
        """
        trace = self._wanted.trace
        stop_at = _stop_at(trace.start, deadline) if self._plan.cascade else None
        cascade = CascadeState(self._plan, self._wanted.indexes)
        passages = self._parts.fetcher.fetch(self._wanted, cascade.ratio)
        with self._parts.scheduler.queued(self._reservation.num_tokens, deadline) as queue:
            trace.passes = queue.passes
            while True:
                async with aclosing(self._scored(queue, passages, cascade, stop_at)) as stage:
                    async for scored in stage:
                        self._reservation.finished(len(scored), cascade.stage)
                        settled = cascade.settle(scored)
                        if settled:
                            yield self._named(settled)
                if not cascade.stage_over:  # the deadline is near
                    trace.stopped_early = True
                    yield self._named(cascade.stop(self._wanted.candidates))
                    return
                best = cascade.advance()
                if not best:
                    return
                passages = self._parts.fetcher.at_ratio(self._wanted, best, cascade.ratio)

    async def _scored(
        self,
        queue: RequestQueue,
        passages: AsyncGenerator[list[FetchedPassage], None],
        cascade: CascadeState,
        stop_at: float | None,
    ) -> AsyncGenerator[list[Result], None]:
        """Results of one stage, as passages arrive and passes end; fewer when it is time to stop."""
        scheduled: dict[Margins, FetchedPassage] = {}
        arriving: asyncio.Task[list[FetchedPassage]] | None = asyncio.create_task(self._next(queue, passages))
        try:
            while arriving or scheduled:
                timeout = None if stop_at is None or not cascade.any_scored else max(0.0, stop_at - time.monotonic())
                awaited: list[asyncio.Future[list[FetchedPassage]] | Margins] = [*scheduled]
                awaited += [arriving] if arriving else []
                done, _ = await asyncio.wait(awaited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    return
                results = [
                    self._result(one, margins.result(), cascade.ratio)
                    for margins, one in scheduled.items()
                    if margins in done
                ]
                scheduled = {margins: one for margins, one in scheduled.items() if margins not in done}
                if arriving in done:
                    chunk = arriving.result()
                    cascade.hold(chunk)
                    results += [self._unscored(one) for one in chunk if one.passage is None]
                    scheduled |= {self._submit(queue, one, cascade): one for one in chunk if one.passage is not None}
                    arriving = asyncio.create_task(self._next(queue, passages)) if chunk else None
                if results:
                    yield results
        finally:
            if arriving:
                arriving.cancel()
                await asyncio.gather(arriving, return_exceptions=True)
            await passages.aclose()

    async def _next(
        self, queue: RequestQueue, passages: AsyncGenerator[list[FetchedPassage], None]
    ) -> list[FetchedPassage]:
        """The next passages, when the queue has room for their pairs; of a listwise model all; none at the end."""
        await self._parts.scheduler.room(queue)
        if self._parts.backend.listwise:
            return [one async for chunk in passages for one in chunk]
        return await anext(passages, [])

    def _submit(self, queue: RequestQueue, one: FetchedPassage, cascade: CascadeState) -> Margins:
        self._num_tokens += sum(pair.num_tokens for pair in one.pairs)
        most = self._parts.max_request_tokens
        if most is not None and self._num_tokens > most:
            expected = f"at most {most}, prompt tokens and states over all candidates"
            raise InvalidRequest("tokens of the request", self._num_tokens, expected)
        if cascade.stage == 0:
            self._parts.admission.learn(num_passage_tokens(one, self._wanted.prompt.num_tokens))
        return self._parts.scheduler.submit(queue, one.pairs)

    def _result(self, one: FetchedPassage, margins: Sequence[float | None], ratio: int) -> Result:
        return scored_result(one, margins, ratio, self._wanted.prompt.num_tokens, self._parts.backend.activate)

    def _unscored(self, one: FetchedPassage) -> Result:
        if one.status == "missing" and self._wanted.on_miss == "fail":
            name = repr(one.passage_id[:100]) if one.passage_id is not None else "an inline text"
            raise FailedPrecondition(
                "PASSAGE_MISSING",
                one.passage_id or "",
                f"({name}): {one.message}, and on_miss is fail",
                path=("candidates", one.index),
            )
        return Result(one.index, one.passage_id or "", one.status, message=one.message, empty=one.empty)

    def _named(self, settled: Iterable[Result]) -> list[Result]:
        """A result for every candidate that names the passage."""
        return [one if i == one.index else replace(one, index=i) for one in settled for i in self._equal[one.index]]


class CascadeState:
    """How far the candidates of one request have come. In the last stage every result is settled as it comes.

    A passage that can no longer reach the next stage is dropped immediately, states and all.
    """

    def __init__(self, plan: Plan, indexes: Iterable[int]) -> None:
        self.stage = 0
        self.any_scored = False
        self._plan = plan
        self._unread = dict.fromkeys(indexes)  # no result yet
        self._left = len(self._unread)  # results that the present stage still owes
        self._best = TopK(plan.stages[0].keep)
        self._held: dict[int, FetchedPassage] = {}  # states at the base ratio, for later stages
        self._reached: dict[int, Result] = {}  # of candidates that are not settled

    @property
    def ratio(self) -> int:
        """The ratio of the present stage."""
        return self._plan.stages[self.stage].compression_ratio

    @property
    def is_last_stage(self) -> bool:
        return self.stage == len(self._plan.stages) - 1

    @property
    def stage_over(self) -> bool:
        return self._left == 0

    def hold(self, passages: Iterable[FetchedPassage]) -> None:
        """Keeps passages for later stages."""
        if not self.is_last_stage:
            self._held |= {one.index: one for one in passages if one.passage is not None}

    def settle(self, results: Iterable[Result]) -> list[Result]:
        """Takes results of the present stage; returns the candidates that no later stage will score."""
        settled: list[Result] = []
        for result in results:
            self._left -= 1
            self._unread.pop(result.index, None)
            before = self._reached.pop(result.index, None)
            if result.margin is None or result.score is None:
                self._held.pop(result.index, None)
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
            self._reached[result.index] = result
            out = self._best.add(result.index, result.margin or 0.0)
            if out is not None:
                self._held.pop(out)
                settled.append(self._reached.pop(out))
        return settled

    def advance(self) -> list[FetchedPassage]:
        """After a stage: the passages of the next one, best first; empty when all candidates are settled."""
        if self.is_last_stage or not self._reached:
            return []
        passages = [self._held[index] for index in self._best.indexes()]
        self.stage += 1
        self._left = len(passages)
        self._best = TopK(self._plan.stages[self.stage].keep)
        if self.is_last_stage:
            self._held.clear()
        return passages

    def stop(self, candidates: Sequence[Candidate]) -> list[Result]:
        """Settles everything else: each candidate as far as it came."""
        unread = [Result(i, candidates[i].passage_id or "", "failed", message=NOT_REACHED) for i in self._unread]
        reached = list(self._reached.values())
        self._unread.clear()
        self._reached.clear()
        self._held.clear()
        self._left = 0
        return [*reached, *unread]


class TopK:
    """The best `k` so far, by margin, ties by index."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._heap: list[tuple[float, int]] = []  # (margin, -index), the worst first

    def add(self, index: int, margin: float) -> int | None:
        """The index that is out now, this one or another; None while there is room."""
        if len(self._heap) < self._k:
            heapq.heappush(self._heap, (margin, -index))
            return None
        return -heapq.heappushpop(self._heap, (margin, -index))[1]

    def indexes(self) -> list[int]:
        """Best first."""
        return [-negative for _, negative in sorted(self._heap, reverse=True)]


def num_passage_tokens(one: FetchedPassage, num_prompt_tokens: int) -> int:
    """Tokens of a passage, its prompt's left out."""
    if one.states is not None:
        return one.states.num_tokens
    return sum(max(0, pair.num_tokens - num_prompt_tokens) for pair in one.pairs)


def scored_result(
    one: FetchedPassage,
    margins: Sequence[float | None],
    ratio: int,
    num_prompt_tokens: int,
    activate: Callable[[float], float],
) -> Result:
    """The result of a passage, of which the best window counts; with one window unknown the best is unknown too."""
    num_states = sum(pair.num_states for pair in one.pairs)
    num_tokens = num_passage_tokens(one, num_prompt_tokens)
    result = Result(
        one.index,
        one.passage_id or "",
        one.status,
        num_states=num_states,
        compression_ratio=ratio,
        truncated=any(pair.truncated for pair in one.pairs),
        # A ratio may be far above the passage's length: its one state stands for no more tokens than there are.
        num_passage_tokens=num_states * min(ratio, num_tokens) if ratio else num_tokens,
    )
    known = [margin for margin in margins if margin is not None and math.isfinite(margin)]
    if len(known) < len(margins):
        return replace(result, status="failed", message=SCORING_FAILED if None in margins else NOT_FINITE)
    margin = max(known)
    return replace(result, margin=margin, score=activate(margin))


def ranked(results: Iterable[Result], top_n: int) -> list[Result]:
    """Scored ones best first, ties by index, at most `top_n` (0: all); then the others in request order.

    Candidates that reached a later stage rank first.
    """
    every = sorted(results, key=lambda one: one.index)
    scored = sorted(
        (one for one in every if one.margin is not None), key=lambda one: (-len(one.stages), -(one.margin or 0.0))
    )
    return (scored[:top_n] if top_n else scored) + [one for one in every if one.margin is None]


# Share of its time, and most seconds, that a cascade leaves for the response's way back.
RESPONSE_SHARE, RESPONSE_SECONDS = 0.1, 0.2


def _stop_at(start: float, deadline: float | None) -> float | None:
    """When a cascade responds with what it has."""
    return None if deadline is None else deadline - min(RESPONSE_SECONDS, RESPONSE_SHARE * (deadline - start))
