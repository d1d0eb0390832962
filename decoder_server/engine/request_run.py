"""One planned request: it is admitted, passages arrive, their pairs are queued, margins come back, results go out.

Each stage of a cascade scores the best of the stage before at a finer ratio; a plain request has one stage. A request
of many queries reads each passage once, for all of them.
"""

import asyncio
import heapq
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import chain, islice, zip_longest
from typing import Any, Self

from decoder_server.engine.admission import Admission
from decoder_server.engine.fetch import Fetched, FetchedPassage, Fetcher, FetchRequest, Passages, mean_prompt_tokens
from decoder_server.engine.plan import Plan
from decoder_server.engine.scheduler import RequestQueue, Scheduler
from decoder_server.engine.score_cache import ScoreCache
from decoder_server.models.backend import Backend, Pair
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
    max_tokens: int | None  # prompt tokens and states over all pairs of all queries; None: no limit
    wanted: FetchRequest  # states at the plan's base ratio
    plan: Plan
    equal: Mapping[int, Sequence[int]]  # of candidates that are fetched: all that name the same passage
    num_tokens: int = 0  # submitted so far

    async def results(self, deadline: float | None) -> AsyncGenerator[tuple[int, list[Result]], None]:
        """Admits the request, then gives every query's result of every candidate once, as soon as it is settled.

        Each list is of one query, named by its index.

        Raises Overloaded where there is no room, FailedPrecondition where on_miss is fail and a candidate is missing,
        InvalidRequest for more tokens than a request may have, Unavailable when the scheduler has ended.
        """
        trace = self.wanted.trace
        stop_at = None  # when a cascade responds with what it has
        if self.plan.cascade and deadline is not None:
            stop_at = deadline - min(RESPONSE_SECONDS, RESPONSE_SHARE * (deadline - trace.start))
        cascades = [CascadeState(self.plan, self.wanted.indexes) for _ in self.wanted.prompts]
        reads = self.plan.reads(len(self.equal), len(cascades))
        with (
            self.admission.admit(reads, mean_prompt_tokens(self.wanted.prompts)) as reservation,
            self.scheduler.queued(reservation.num_tokens, deadline) as queue,
        ):
            queue.passes = trace.passes
            passages = self.fetcher.fetch(self.wanted, reads[0][1])
            for stage, (_, ratio) in enumerate(reads):
                if stage > 0:
                    best = zip_longest(*(cascade.advance() for cascade in cascades))
                    union = {one.index: one for rank in best for one in rank if one is not None}
                    passages = self.fetcher.at_ratio(self.wanted, [*union.values()], ratio)
                async with aclosing(self._scored(queue, passages, cascades, stage, stop_at)) as results:
                    async for query, scored in results:
                        reservation.finished(len(scored), stage)
                        if settled := cascades[query].settle(scored):
                            yield query, self._named(settled)
                if any(cascade.owed for cascade in cascades):  # the deadline is near
                    trace.stopped_early = True
                    for query, cascade in enumerate(cascades):
                        yield query, self._named(cascade.stop(self.wanted.candidates))
                    return

    async def _scored(
        self,
        queue: RequestQueue,
        passages: Passages,
        cascades: Sequence["CascadeState"],
        stage: int,
        stop_at: float | None,
    ) -> AsyncGenerator[tuple[int, list[_Scored]], None]:
        """Results of one stage, by query, as passages arrive and passes end; fewer when it is time to stop."""
        ratio = self.plan.stages[stage].compression_ratio
        scheduled: dict[_Margins, _PassagePairs] = {}
        arriving: asyncio.Task[Fetched] | None = asyncio.create_task(self._next(queue, passages))
        try:
            while arriving or scheduled:
                timeout = None
                if stop_at is not None and all(cascade.any_scored for cascade in cascades):
                    timeout = max(0.0, stop_at - time.monotonic())
                awaited: list[asyncio.Future[Any]] = [*scheduled, arriving] if arriving else [*scheduled]
                done, _ = await asyncio.wait(awaited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    return
                results: dict[int, list[_Scored]] = defaultdict(list)
                ended = [scheduled.pop(one).filled(one.result()) for one in [*scheduled] if one in done]
                self._keep(ended)
                if arriving in done:
                    chunk, read = arriving.result(), list[_PassagePairs]()
                    for one in chunk:
                        queries = [query for query, cascade in enumerate(cascades) if one.index in cascade.owed]
                        if one.passage is not None:
                            read.append(_PassagePairs.of(one, queries))
                            continue
                        for query in queries:
                            results[query].append((one, self._unscored(one)))
                    for pairs in self._known(read):
                        self._count(pairs, stage)
                        if left := pairs.left:
                            scheduled[self.scheduler.submit(queue, left)] = pairs
                        else:
                            ended.append(pairs)
                    arriving = asyncio.create_task(self._next(queue, passages)) if chunk else None
                for pairs in ended:
                    for query, margins in pairs.by_query():
                        results[query].append((pairs.passage, self._result(pairs.passage, query, margins, ratio)))
                for query, scored in results.items():
                    yield query, scored
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

    def _known(self, read: "list[_PassagePairs]") -> "list[_PassagePairs]":
        """With the margins of earlier requests."""
        if self.score_cache.enabled:
            for pairs in read:
                pairs.identities = [pair.identity for pair in pairs.pairs]
            identities = list(chain.from_iterable(pairs.identities for pairs in read))
            known = iter(self.score_cache.get(identities, self.scope))
            for pairs in read:
                pairs.margins = list(islice(known, len(pairs.pairs)))
        return read

    def _keep(self, ended: "list[_PassagePairs]") -> None:
        if ended and self.score_cache.enabled:
            identities = list(chain.from_iterable(pairs.identities for pairs in ended))
            margins = list(chain.from_iterable(pairs.margins for pairs in ended))
            self.score_cache.put(identities, margins, self.scope)

    def _count(self, pairs: "_PassagePairs", stage: int) -> None:
        self.num_tokens += sum(pair.num_tokens for pair in pairs.pairs)
        if self.max_tokens is not None and self.num_tokens > self.max_tokens:
            expected = f"at most {self.max_tokens}, prompt tokens and states over all candidates and queries"
            raise InvalidRequest("tokens of the request", self.num_tokens, expected)
        if stage == 0:
            query = pairs.queries[0]
            self.admission.learn(pairs.passage.num_tokens(self.wanted.prompts[query].num_tokens, query))

    def _result(self, one: FetchedPassage, query: int, margins: Sequence[float | None], ratio: int) -> Result:
        num_prompt_tokens = self.wanted.prompts[query].num_tokens
        return one.scored(margins, ratio, num_prompt_tokens, self.backend.activate, query)

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


@dataclass(slots=True, eq=False)
class _PassagePairs:
    """A passage under the prompts of some queries: window by window, of each those of all queries.

    So a batch computes a window once for them.
    """

    passage: FetchedPassage
    queries: Sequence[int]
    pairs: Sequence[Pair]
    margins: list[float | None]  # per pair; None: not known
    identities: list[bytes] = field(default_factory=list)  # per pair, where margins are kept

    @classmethod
    def of(cls, passage: FetchedPassage, queries: Sequence[int]) -> Self:
        windows = zip(*(passage.pairs[query] for query in queries), strict=True)
        pairs = [pair for window in windows for pair in window]
        return cls(passage, queries, pairs, [None] * len(pairs))

    @property
    def left(self) -> list[Pair]:
        """Those whose margin is not known."""
        return [pair for pair, margin in zip(self.pairs, self.margins, strict=True) if margin is None]

    def filled(self, margins: Iterable[float | None]) -> Self:
        """With margins of what was left."""
        computed = iter(margins)
        self.margins = [next(computed) if margin is None else margin for margin in self.margins]
        return self

    def by_query(self) -> Iterator[tuple[int, list[float | None]]]:
        """Each query with the margins of its windows."""
        return ((query, self.margins[i :: len(self.queries)]) for i, query in enumerate(self.queries))


class CascadeState:
    """How far the candidates of one query have come. In the last stage every result is settled as it comes.

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
