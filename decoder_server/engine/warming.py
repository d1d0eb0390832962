"""Warming: pre-fills a model's KV and prefix caches for passages of a collection, ahead of requests.

The same path as a request: the same checks, plan and pairs. Runs between forward passes, so that requests in flight
wait for one batch at most.
"""

from __future__ import annotations

from itertools import chain

from cache.errors import CacheError
from cache.states import EncodedPassage, all_at_ratio
from decoder_server.engine.engine import Engine
from decoder_server.engine.plan import check
from decoder_server.engine.scheduler import split_by_length
from decoder_server.models.backend import StatesBackend
from preread.errors import FailedPrecondition, InvalidRequest, Unavailable
from preread.values import RerankRequest, TierUse, Warmed

ANY_QUERY = "a query"  # stands for queries to come: cached keys and values do not depend on it


async def warm(engine: Engine, request: RerankRequest) -> Warmed:
    """Pre-fills for the ids of a request, whose query is not read.

    Raises as a request for the same; FailedPrecondition where the model has nothing to warm.
    """
    backend = engine.backend
    if not isinstance(backend, StatesBackend) or not any(cache.max_bytes for cache in backend.caches):
        message = f"model {engine.name!r} has nothing to warm: it is a cross-encoder, or its caches are disabled"
        raise FailedPrecondition("NOTHING_TO_WARM", engine.name, message)
    async with engine.track(request, "warm"):
        check(request, engine.limits)
        collection = await engine.open_collection(request.collection)
        if collection is None:
            raise InvalidRequest("collection", "", "the collection that holds the ids")
        ratios = {stage.compression_ratio for stage in engine.plan_of(request, collection).stages}
        prompt = await engine.prompt(ANY_QUERY, request.instruction)
        ids = list(dict.fromkeys(candidate.passage_id or "" for candidate in request.candidates))
        try:
            read = await engine.call(collection.get_encoded_many, ids)
        except CacheError as exc:
            raise Unavailable(f"the store could not be read: {exc}") from exc
        found = {i: passage for i, passage in zip(ids, read, strict=True) if isinstance(passage, EncodedPassage)}
        pooled = [await engine.call(all_at_ratio, list(found.values()), ratio) for ratio in ratios]
        pairs = list(chain.from_iterable(backend.pairs(prompt, list(chain.from_iterable(pooled)))))
        num_kept = [0] * len(backend.caches)
        for rows in split_by_length(pairs, engine.scheduler.batch_tokens):
            held = await engine.scheduler.between_passes(backend.fill, [pairs[i] for i in rows])
            num_kept = [total + now for total, now in zip(num_kept, held, strict=True)]
        kept = zip(backend.caches, num_kept, strict=True)
        tiers = tuple(TierUse(cache.name, num, cache.num_bytes, cache.max_bytes) for cache, num in kept)
        return Warmed(engine.name, len(found), len(pairs), tuple(i for i in ids if i not in found), tiers)
