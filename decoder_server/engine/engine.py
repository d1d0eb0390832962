"""One served model: a request goes in, ranked outcomes come out.

check -> plan (which collection, which ratio or stages) -> admit -> run -> rank.
Knows neither gRPC nor HTTP; every edge calls `rerank`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import TypeVar

from cache.collection import Collection
from cache.errors import CacheError
from decoder_server.config import DecoderConfig
from decoder_server.engine.admission import Admission, Easing
from decoder_server.engine.collections import Catalogue
from decoder_server.engine.fetch import Source, Wanted, read_unless_unavailable
from decoder_server.engine.lifecycle import Observer, Running, Trail
from decoder_server.engine.plan import Defaults, Indexed, Plan, check, distinct, indexed, plan, text_plan
from decoder_server.engine.request_run import Emit, Run, ranked
from decoder_server.engine.scheduler import Batcher
from decoder_server.models.backend import Backend, Prompt
from preread.errors import DeadlineExceeded, InvalidRequest
from preread.types import RerankRequest, Result, Summary, Timings

T = TypeVar("T")

# Of the time a cascade is given, what it leaves for its answer's way back: a share, and at most seconds.
ANSWER_SHARE, ANSWER_SECONDS = 0.1, 0.2


class Engine:
    """Everything one model needs to answer, put together."""

    def __init__(
        self,
        name: str,
        backend: Backend,
        batcher: Batcher,
        admission: Admission,
        catalogue: Catalogue,
        passages: Source,
        executor: Executor,
        limits: DecoderConfig,
        observers: Sequence[Observer] = (),
    ) -> None:
        """
        Args:
            name: what clients call the model.
            executor: for tokenizing and the store; never the model's thread.
            observers: hear of every request that ends.
        """
        self.name = name
        self.backend = backend
        self.batcher = batcher
        self.admission = admission
        self.catalogue = catalogue
        self.passages = passages
        self.limits = limits
        self._executor = executor
        self._running = Running(name, observers)
        # What the prompt has beside query and instruction, to tell how long an instruction is.
        self._template_tokens = backend.prompt("a", "a").num_tokens - 2
        self.reads_text = backend.identity() is None
        eases = limits.degrade and not self.reads_text
        self._easing = Easing(batcher, admission, limits.degrade_queue_share) if eases else None

    @property
    def encodes_on_demand(self) -> bool:
        return self.passages.inline is not None

    async def rerank(
        self, request: RerankRequest, *, deadline: float | None = None, emit: Emit | None = None
    ) -> tuple[list[Result], Summary]:
        """Scores a request's candidates.

        Args:
            deadline: on time.monotonic's clock, which is also the event loop's.
            emit: takes outcomes as they come, unsorted and whatever top_n says.

        Returns:
            Outcomes, scored ones best first and cut to top_n, the others after them; and the summary.

        Raises:
            PrereadError: the request as a whole cannot be answered.
        """
        with self.under_way(request) as trail:
            check(request, self.limits)
            started = time.monotonic()
            try:
                async with asyncio.timeout_at(deadline):
                    outcomes, summary = await self._rerank(request, started, deadline, emit, trail)
            except TimeoutError:
                raise DeadlineExceeded(f"the deadline passed after {time.monotonic() - started:.3f} s") from None
            trail.timings = summary.timings
            return outcomes, summary

    def under_way(self, request: RerankRequest, kind: str = "rerank") -> AbstractContextManager[Trail]:
        """Around a request; see Running.request."""
        return self._running.request(request, kind)

    async def drain(self, grace_seconds: float) -> bool:
        """Accepts nothing more and waits for what runs; False when the time was up first."""
        return await self._running.drain(grace_seconds)

    async def _rerank(
        self, request: RerankRequest, started: float, deadline: float | None, emit: Emit | None, trail: Trail
    ) -> tuple[list[Result], Summary]:
        prompt = await self.prompt(request.query, request.instruction)
        # A listwise model reads the list as it was sent: a passage that is in it twice changes every score.
        every = {candidate: [candidate.index] for candidate in indexed(request.candidates)}
        same = every if self.backend.listwise else distinct(request.candidates)
        collection = await self.open_collection(request.collection) if request.collection is not None else None
        asked = self.plan_of(request, collection)
        read, degraded = asked, None
        if self._easing is not None:
            read, degraded = self._easing.ease(asked, len(same), prompt.num_tokens, deadline)
        wanted = self._wanted(request, list(same), collection, read, prompt, trail)

        async def emit_with_texts(outcomes: list[Result]) -> None:
            assert emit is not None
            await emit(await self._with_texts(request, wanted, outcomes))

        first, *later = read.reads(len(same))
        with self.admission.admit(first[0], prompt.num_tokens, first[1], later) as place:
            run = Run(
                wanted,
                read,
                {one.index: i for one, i in same.items()},
                prompt,
                self.backend,
                self.batcher,
                self.passages,
                self.admission,
                self._executor,
                self.limits.max_request_tokens,
            )
            stop_at = _stop_at(started, deadline) if read.cascade else None
            try:
                outcomes = await run.gather(place, deadline, emit_with_texts if emit is not None else None, stop_at)
            finally:
                trail.turns = run.turns
        trail.outcomes = outcomes
        trail.degraded = degraded.reason if degraded is not None else ""
        trail.stopped_early = run.stopped_early
        results = ranked(outcomes, request.top_n)
        if emit is None:
            results = await self._with_texts(request, wanted, results)
        timings = Timings(
            fetch_seconds=wanted.fetching.seconds,
            encode_seconds=wanted.encoding.seconds,
            queue_seconds=run.queue_seconds,
            compute_seconds=run.compute_seconds,
            total_seconds=time.monotonic() - started,
        )
        scored = [outcome for outcome in outcomes if outcome.margin is not None]
        return results, Summary(
            self.name,
            timings,
            len(scored),
            prompt.num_query_tokens,
            prompt.query_truncated,
            num_passage_tokens=sum(outcome.num_passage_tokens for outcome in scored),
            compression_ratio=0 if read.cascade else read.first.compression_ratio,
            stages=read.stages if read.cascade else (),
            stopped_early=run.stopped_early,
            degraded=degraded,
            truncated=tuple(sorted(outcome.index for outcome in scored if outcome.truncated)),
        )

    def plan_of(self, request: RerankRequest, collection: Collection | None) -> Plan:
        """What is read: one ratio, or stages of them, for every candidate, so that scores compare."""
        if self.reads_text:
            return text_plan(request)
        stored = collection.manifest.compression_ratio if collection is not None else None
        defaults = Defaults(self.limits.read_ratio, self.limits.stages)
        return plan(request, defaults, stored, self.backend.settings.default_compression_ratio)

    def _wanted(
        self,
        request: RerankRequest,
        candidates: Sequence[Indexed],
        collection: Collection | None,
        read: Plan,
        prompt: Prompt,
        trail: Trail,
    ) -> Wanted:
        on_miss = request.on_miss or ("encode" if self.encodes_on_demand else "skip")
        return Wanted(
            candidates,
            collection,
            read.base_ratio,
            on_miss,
            self.limits.max_text_bytes,
            lambda passage: self.backend.pairs(prompt, [passage])[0],
            self.backend.is_empty,
            fetches=trail.fetches,
            encodings=trail.encodings,
        )

    async def open_collection(self, name: str) -> Collection:
        """What the name, or alias, means now; raises as Catalogue.open does."""
        fresh = self.catalogue.fresh(name)
        return fresh if fresh is not None else await self.call(self.catalogue.open, name)

    async def prompt(self, query: str, instruction: str | None) -> Prompt:
        """The tokens before a passage. A long query is cut, and the prompt says so; an instruction never is.

        Raises:
            InvalidRequest: an instruction over its limit.
        """
        prompt = await self.call(self.backend.prompt, query, instruction)
        num_tokens = prompt.num_tokens - prompt.num_query_tokens - self._template_tokens
        if instruction and num_tokens > self.limits.max_instruction_tokens:
            expected = f"at most {self.limits.max_instruction_tokens} tokens"
            raise InvalidRequest("instruction", f"{num_tokens} tokens long", expected)
        return prompt

    async def _with_texts(self, request: RerankRequest, wanted: Wanted, outcomes: list[Result]) -> list[Result]:
        """Adds candidates' texts where they were asked for: inline ones, else stored ones."""
        if not request.return_text:
            return outcomes
        texts: dict[str, str | None] = {}
        # A text over the limit is not sent back: its status says why it was not read.
        wanting = [one for one in outcomes if one.status != "too_long"]
        given = {i: candidate.text for i, candidate in enumerate(request.candidates) if candidate.text}
        inline = {one.index: given[one.index] for one in wanting if one.index in given}
        ids = [one.passage_id for one in wanting if one.index not in inline and one.passage_id]
        if ids and wanted.collection is not None and wanted.collection.manifest.stores_text:
            try:
                get = wanted.collection.get_texts
                texts = dict(zip(ids, await self.call(read_unless_unavailable, wanted, get, ids), strict=True))
            except CacheError:  # the scores are there; a text that cannot be read is left out
                texts = {}
        found = {one.index: inline.get(one.index, texts.get(one.passage_id)) for one in wanting}
        return [dataclasses.replace(one, text=found.get(one.index)) for one in outcomes]

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """Runs what blocks, off the event loop and off the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)


def _stop_at(started: float, deadline: float | None) -> float | None:
    """When a cascade answers with what it has."""
    return None if deadline is None else deadline - min(ANSWER_SECONDS, ANSWER_SHARE * (deadline - started))
