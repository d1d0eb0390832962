"""One served model, as the edges know it: check -> plan -> admit -> fetch -> score -> rank, awaited in order."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from cache.collection import Collection
from cache.errors import CacheError
from cache.states import EncodedPassage, all_at_ratio
from cache.store import Store
from decoder_server.config import ANY_MODEL, DecoderConfig
from decoder_server.engine.admission import Admission
from decoder_server.engine.collections import Catalogue
from decoder_server.engine.fetch import Fetcher, FetchRequest, mean_prompt_tokens
from decoder_server.engine.lifecycle import Observer, RequestTrace
from decoder_server.engine.lookup import Lookup, check_write_through
from decoder_server.engine.on_demand import Keep, OnDemandStates
from decoder_server.engine.plan import Plan, check, plan
from decoder_server.engine.request_run import RequestRun
from decoder_server.engine.scheduler import Scheduler, split_by_length
from decoder_server.engine.score_cache import ScoreCache
from decoder_server.models.backend import Backend, Prompt, StatesBackend
from decoder_server.models.loading import BATCH_TOKENS
from preread.errors import DeadlineExceeded, FailedPrecondition, InvalidRequest, NotFound, Unavailable
from preread.values import Candidate, RerankRequest, Result, Summary, TierUse, Warmed, ranked
from preread_edge.access import caller, caller_scope, permits, require

T = TypeVar("T")

ANY_QUERY = "a query"  # of `warm`, stands for queries to come: cached keys and values do not depend on it


class Engine:
    """Everything one model needs to respond, assembled."""

    def __init__(
        self,
        name: str,  # served to clients
        backend: Backend,
        store: Store,
        on_demand: OnDemandStates | None,  # None: no encoder is configured
        threads: tuple[Executor, Executor],  # one for the passes of all models, in turns; some to tokenize and read
        limits: DecoderConfig,
        observers: Sequence[Observer] = (),
    ) -> None:
        model_thread, self._executor = threads
        self.name = name
        self.backend = backend
        self.limits = limits
        self.reads_text = backend.identity() is None
        self.encodes_on_demand = on_demand is not None
        self._observers = observers
        self._num_in_flight, self._draining = 0, False
        self._idle = asyncio.Event()
        self._idle.set()
        self.catalogue = Catalogue(store, backend.identity(), limits.max_staleness_seconds)
        is_off = self.reads_text or limits.lookup == ()
        self._write_through = "" if is_off or on_demand is None else limits.write_through
        names = limits.lookup, limits.max_staleness_seconds, self._write_through
        self._lookup = None if is_off else Lookup(self.catalogue, *names)
        min_tokens, max_tokens = BATCH_TOKENS[backend.device_name.split(":")[0]]
        if limits.max_batch_tokens is not None:
            min_tokens = max_tokens = limits.max_batch_tokens
        self.scheduler = Scheduler(backend, model_thread, max_tokens, min_tokens, observers)
        most = limits.max_queue_requests, limits.max_queue_tokens, limits.max_queue_seconds
        self.admission = Admission(self.scheduler.stats, *most)
        # A listwise model's margin depends on the other candidates, too.
        self.score_cache = ScoreCache(0 if backend.listwise else limits.max_score_cache_bytes)
        # Candidates per read of the store: about a batch of short ones, a share of it for long ones.
        chunk = max(16, max_tokens // 128)
        self.fetcher = Fetcher(backend, self._executor, on_demand, chunk=chunk, max_text_bytes=limits.max_text_bytes)
        # Tokens of the prompt besides query and instruction, which tell how long an instruction is.
        self._template_tokens = backend.prompt("a", "a").num_tokens - 2

    async def rerank(self, request: RerankRequest, *, deadline: float | None = None) -> tuple[list[Result], Summary]:
        """Results, scored ones best first and cut to top_n, the others after them in request order; and the summary.

        `deadline` is on time.monotonic's clock. Raises PrereadError where the request as a whole failed.
        """
        async with self.track(request, deadline=deadline) as trace:
            check(request, self.limits)
            run = await self._plan(request, [request.query], deadline, trace)
            async with aclosing(run.results(deadline)) as batches:  # admits, fetches, scores
                trace.results = [one async for _, batch in batches for one in batch]
            best = ranked(trace.results, request.top_n)
            return await self._with_texts(run.wanted, best), self._summarize(run, trace.results)

    async def rerank_many(
        self, request: RerankRequest, queries: Sequence[str], *, deadline: float | None = None
    ) -> AsyncGenerator[tuple[list[Result], Summary], None]:
        """The responses of `rerank` to each query over the candidates of a request, in the order of the queries.

        A passage is fetched once for all, and of its keys and values what depends on no query is computed once. A model
        that reads text shares nothing: it takes one query after the other. Timings and counts of looked up texts are
        the call's.
        """
        async with self.track(request, "rerank_many", queries) as trace:
            check(request, self.limits, queries)
            together = 1 if self.reads_text else len(queries)
            for first in range(0, len(queries), together):
                some = queries[first : first + together]
                rankings: list[list[Result]] = [[] for _ in some]
                async with _until(deadline, trace):
                    run = await self._plan(request, some, deadline, trace)
                    async with aclosing(run.results(deadline)) as batches:
                        async for query, batch in batches:
                            rankings[query] += batch
                            trace.results += batch
                for query, results in enumerate(rankings):
                    async with _until(deadline, trace):  # not across a yield: the time between is the caller's
                        best = await self._with_texts(run.wanted, ranked(results, request.top_n))
                    yield best, self._summarize(run, results, query)

    async def stream(
        self, request: RerankRequest, *, deadline: float | None = None
    ) -> AsyncGenerator[list[Result] | Summary, None]:
        """The same as results are settled, unsorted and whatever top_n says; the summary comes last."""
        async with self.track(request) as trace:
            check(request, self.limits)
            async with _until(deadline, trace):
                run = await self._plan(request, [request.query], deadline, trace)
            async with aclosing(run.results(deadline)) as batches:
                while True:
                    async with _until(deadline, trace):  # not across a yield: the time between is the caller's
                        settled = await anext(batches, None)
                        if settled is None:
                            break
                        _, batch = settled
                        trace.results += batch
                        with_texts = await self._with_texts(run.wanted, batch)
                    yield with_texts
            yield self._summarize(run, trace.results)

    async def warm(self, request: RerankRequest) -> Warmed:
        """Pre-fills the caches for the ids of a request, whose query is not read.

        Requests in flight wait for one batch at most. Raises as `rerank`, and FailedPrecondition: nothing to warm.
        """
        backend = self.backend
        if not isinstance(backend, StatesBackend) or not any(cache.max_bytes for cache in backend.caches):
            message = f"model {self.name!r} has nothing to warm: it is a cross-encoder, or its caches are disabled"
            raise FailedPrecondition("NOTHING_TO_WARM", self.name, message)
        async with self.track(request, "warm"):
            check(request, self.limits)
            collection = await self.open_collection(request.collection)
            if collection is None:
                raise InvalidRequest("collection", "", "the collection that holds the ids")
            ratios = {stage.compression_ratio for stage in self._plan_of(request, collection).stages}
            (prompt,) = await self.prompts([ANY_QUERY], request.instruction)
            ids = list(dict.fromkeys(candidate.passage_id or "" for candidate in request.candidates))
            try:
                read = await self.call(collection.get_encoded_many, ids)
            except CacheError as exc:
                raise Unavailable(f"the store could not be read: {exc}") from exc
            found = {i: passage for i, passage in zip(ids, read, strict=True) if isinstance(passage, EncodedPassage)}
            pooled = [await self.call(all_at_ratio, list(found.values()), ratio) for ratio in ratios]
            pairs = list(chain.from_iterable(backend.pairs(prompt, list(chain.from_iterable(pooled)))))
            num_kept = [0] * len(backend.caches)
            for rows in split_by_length(pairs, self.scheduler.batch_tokens):
                held = await self.scheduler.between_passes(backend.fill, [pairs[i] for i in rows])
                num_kept = [total + now for total, now in zip(num_kept, held, strict=True)]
            kept = zip(backend.caches, num_kept, strict=True)
            tiers = tuple(TierUse(cache.name, num, cache.num_bytes, cache.max_bytes) for cache, num in kept)
            return Warmed(self.name, len(found), len(pairs), tuple(i for i in ids if i not in found), tiers)

    @asynccontextmanager
    async def track(
        self,
        request: RerankRequest,
        kind: str = "rerank",
        queries: Sequence[str] = (),
        *,
        deadline: float | None = None,
    ) -> AsyncIterator[RequestTrace]:
        """Reports to the observers how it ended. Raises Unavailable while draining, DeadlineExceeded when late."""
        trace = RequestTrace(request, self.name, kind, queries)
        self._num_in_flight += 1
        self._idle.clear()
        try:
            if self._draining:
                raise Unavailable("this server is shutting down")
            async with _until(deadline, trace):
                yield trace
            trace.code = "ok"
        except BaseException as exc:
            trace.failed(exc)
            raise
        finally:
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self._idle.set()
            trace.end = time.monotonic()
            for observer in self._observers:
                observer.request_finished(trace)

    async def drain(self, grace_seconds: float) -> bool:
        """Rejects new requests and waits for those in flight; False when the grace period ended first."""
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await self._idle.wait()
        return self._idle.is_set()

    def check(self) -> None:
        """Raises ValueError where `write_through` names a collection that was indexed. Blocks on the store."""
        if self._write_through:
            check_write_through(self.catalogue, self._write_through)

    async def open_collection(self, name: str | None) -> Collection | None:
        """The collection that a name or alias means now; raises as Catalogue.open does, and PermissionDenied."""
        if name is None:
            return None
        require(name)
        return self.catalogue.fresh(name) or await self.call(self.catalogue.open, name)

    async def prompts(self, queries: Sequence[str], instruction: str | None) -> list[Prompt]:
        """The tokens before a passage. A long query is cut, and its prompt says so; a long instruction is rejected."""
        prompts = await self.call(lambda: [self.backend.prompt(query, instruction) for query in queries])
        num_tokens = prompts[0].num_tokens - prompts[0].num_query_tokens - self._template_tokens
        if instruction and num_tokens > self.limits.max_instruction_tokens:
            expected = f"at most {self.limits.max_instruction_tokens} tokens"
            raise InvalidRequest("instruction", f"{num_tokens} tokens long", expected)
        return prompts

    def _plan_of(self, request: RerankRequest, named: Collection | None, lookup: Sequence[Collection] = ()) -> Plan:
        """Texts alone are scored at the ratio of the first collection they may be found in, so their scores compare."""
        default = lookup[0].manifest.compression_ratio if lookup else self.backend.settings.default_compression_ratio
        return plan(request, self.limits, named.manifest.compression_ratio if named is not None else None, default)

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """Runs what blocks, off the event loop and off the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def _plan(
        self, request: RerankRequest, queries: Sequence[str], deadline: float | None, trace: RequestTrace
    ) -> RequestRun:
        prompts = await self.prompts(queries, request.instruction)
        collection = await self.open_collection(request.collection)
        # A passage named twice is scored once, which also makes it a tie to the last bit. A listwise model reads the
        # list as it was sent: a passage that is in it twice changes every score.
        groups: dict[Candidate | int, list[int]] = {}
        for i, candidate in enumerate(request.candidates):
            groups.setdefault(i if self.backend.listwise else candidate, []).append(i)
        equal = {same[0]: same for same in groups.values()}
        lookup = await self._lookup_of(request, collection)
        chosen, limits = self._plan_of(request, collection, lookup), self.limits
        if limits.degrade and not self.reads_text:
            share = limits.degrade_queue_share
            size = len(equal), mean_prompt_tokens(prompts)
            chosen, trace.degraded = self.admission.degrade(chosen, *size, deadline, share, len(prompts))
        where = collection, chosen.base_ratio, request.on_miss
        able = [one for one in lookup if chosen.base_ratio % one.manifest.compression_ratio == 0]
        wanted = FetchRequest(request.candidates, list(equal), *where, prompts, trace, able, self._keep())
        scored_by = self.backend, self.scheduler, self.admission, self.fetcher, self.score_cache, caller_scope()
        return RequestRun(*scored_by, limits.max_request_tokens, wanted, chosen, equal)

    async def _lookup_of(self, request: RerankRequest, named: Collection | None) -> list[Collection]:
        """Where texts of the request may be stored: in the collection that it names, then in those of the lookup."""
        if self._lookup is None or all(candidate.text is None for candidate in request.candidates):
            return []
        looked_up = self._lookup.fresh()
        looked_up = await self.call(self._lookup.open) if looked_up is None else looked_up
        permitted = (one.collection for one in looked_up if permits(*one.names))
        own = [named] if named is not None else []
        return list({one.name: one for one in (*own, *permitted)}.values())

    def _keep(self) -> Keep | None:
        """Where what is encoded for this caller is kept: not in a collection that its key may not use."""
        if not self._write_through or self._lookup is None:
            return None
        names = self._lookup.names_of(self._write_through)
        return Keep(self._write_through, names, caller()) if permits(*names) else None

    async def _with_texts(self, wanted: FetchRequest, results: list[Result]) -> list[Result]:
        if not wanted.trace.request.return_text:
            return results
        # A text over the limit is not sent back: its status says why it was not read.
        indexes = [one.index for one in results if one.status != "too_long"]
        # Only a collection's texts are waited for.
        texts = await self.call(wanted.texts, indexes) if wanted.collection is not None else wanted.texts(indexes)
        return [replace(one, text=texts.get(one.index) or None) for one in results]

    def _summarize(self, run: RequestRun, results: Sequence[Result], query: int = 0) -> Summary:
        trace, prompt = run.wanted.trace, run.wanted.prompts[query]
        trace.timings = trace.timed()
        scored = [one for one in results if one.margin is not None]
        counts = self.name, trace.timings, len(scored), prompt.num_query_tokens, prompt.query_truncated
        ended = trace.stopped_early, trace.degraded
        num_tokens = sum(one.num_passage_tokens for one in scored)
        truncated = tuple(sorted(one.index for one in scored if one.truncated))
        looked_up = trace.num_looked_up, trace.num_found
        return Summary(*counts, *run.plan.summary, *ended, *looked_up, num_tokens, truncated)


@asynccontextmanager
async def _until(deadline: float | None, trace: RequestTrace) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        seconds = time.monotonic() - trace.start
        raise DeadlineExceeded(f"the deadline passed after {seconds:.3f} s") from None


def choose(engines: Mapping[str, Engine], name: str = "", aliases: Container[str] = ()) -> Engine:
    """The engine of a served name, the first for "" or an alias; raises NotFound, or Unavailable during the load."""
    if not engines:
        raise Unavailable("this server is still loading its model")
    if name in engines:
        return engines[name]
    if not name or name in aliases or ANY_MODEL in aliases:
        return next(iter(engines.values()))
    raise NotFound("model", name, f"model is {name[:100]!r}; served here: {', '.join(engines)}")
