"""Fills a model's tiers ahead of requests: reads passages and computes what passes over them would need.

Takes the same path as a request: the same checks, the same plan of ratios, the same items; between two passes of the
model, so that requests under way wait for one batch at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from cache.collection import Collection
from cache.errors import CacheError
from cache.record import Damaged
from cache.states import AnyStates, EncodedPassage, all_at_ratio
from decoder_server.engine.engine import Engine
from decoder_server.engine.plan import check
from decoder_server.models.backend import Pair, StatesBackend
from preread.errors import FailedPrecondition, InvalidRequest, Unavailable
from preread.types import RerankRequest

# Stands for queries to come: what is kept does not depend on it.
ANY_QUERY = "a query"


@dataclass(frozen=True, slots=True)
class TierUse:
    """What one tier holds."""

    name: str
    num_kept: int  # of the windows that were warmed
    num_bytes: int  # of all passages
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Warmed:
    """What became of a call."""

    num_passages: int
    num_windows: int  # of passages, at every ratio
    missing_ids: tuple[str, ...]
    tiers: tuple[TierUse, ...]


async def warm(engine: Engine, request: RerankRequest) -> Warmed:
    """
    Args:
        request: ids of one collection; its query is not read.

    Raises:
        PrereadError: as of a request for the same; FailedPrecondition where the model keeps nothing.
    """
    backend = engine.backend
    if not isinstance(backend, StatesBackend) or not any(cache.max_bytes for cache in backend.caches):
        message = f"model {engine.name!r} keeps nothing between passes: it reads text, or its tiers are off"
        raise FailedPrecondition("NOTHING_TO_WARM", engine.name, message)
    with engine.under_way(request, "warm"):
        check(request, engine.limits)
        if request.collection is None:
            raise InvalidRequest("collection", "", "the collection that holds the ids")
        collection = await engine.open_collection(request.collection)
        ratios = {stage.compression_ratio for stage in engine.plan_of(request, collection).stages}
        prompt = await engine.prompt(ANY_QUERY, request.instruction)
        ids = list(dict.fromkeys(candidate.passage_id or "" for candidate in request.candidates))
        found = await engine.call(_read, collection, ids)
        passages = [passage for passage in found if isinstance(passage, EncodedPassage)]
        read = await engine.call(_at_ratios, passages, ratios)
        pairs = [pair for windows in backend.pairs(prompt, read) for pair in windows]
        kept = [0, 0]
        for batch in _batches(pairs, engine.batcher.batch_tokens):
            held = await engine.batcher.aside(partial(backend.fill, batch))
            kept = [total + now for total, now in zip(kept, held, strict=True)]
        uses = tuple(
            TierUse(tier.name, num, tier.num_bytes, tier.max_bytes)
            for tier, num in zip(backend.caches, kept, strict=True)
        )
        missing = tuple(i for i, passage in zip(ids, found, strict=True) if not isinstance(passage, EncodedPassage))
        return Warmed(len(passages), len(pairs), missing, uses)


def _read(collection: Collection, ids: Sequence[str]) -> list[EncodedPassage | Damaged | None]:
    try:
        return collection.get_encoded_many(ids)
    except CacheError as exc:
        raise Unavailable(f"the store could not be read: {exc}") from exc


def _at_ratios(passages: Sequence[EncodedPassage], ratios: Iterable[int]) -> list[AnyStates]:
    return [states for ratio in ratios for states in all_at_ratio(passages, ratio)]


def _batches(pairs: Sequence[Pair], max_tokens: int) -> Iterator[list[Pair]]:
    """Pairs of like length together, each batch within the budget or of one pair."""
    batch: list[Pair] = []
    num_tokens = 0
    for pair in sorted(pairs, key=lambda pair: pair.num_states):
        if batch and num_tokens + pair.num_tokens > max_tokens:
            yield batch
            batch, num_tokens = [], 0
        batch.append(pair)
        num_tokens += pair.num_tokens
    if batch:
        yield batch
