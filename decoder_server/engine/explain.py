"""A few candidates looked at closely: scores at every ratio, and what the decoder attended to.

For people, beside `Engine.rerank`: every candidate is scored alone, so that its time is its own, on
the model's thread between the batcher's passes. Knows no edge.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from cache.collection import Collection
from cache.states import PassageStates
from decoder_server.engine.engine import Engine
from decoder_server.engine.fetch import Found, Wanted
from decoder_server.engine.plan import Indexed, check, indexed
from decoder_server.engine.scheduler import SCORING_FAILED
from decoder_server.models.backend import Backend, Prompt, StatesBackend
from preread.errors import DeadlineExceeded, InvalidRequest
from preread.types import OnMiss, RerankRequest, Result, Status

log = logging.getLogger(__name__)

RATIOS = (1, 2, 4, 8, 16, 32)
MAX_CANDIDATES = 16  # each is as much work as a dozen of a ranking


@dataclass(frozen=True, slots=True)
class RatioScore:
    """A candidate at one ratio, scored alone."""

    compression_ratio: int
    num_states: int
    margin: float
    score: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Part:
    """What one pooled state stands for: characters of the text, and the readout token's weight on it."""

    begin: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Explained:
    """One candidate."""

    index: int
    passage_id: str
    status: Status
    text: str | None = None
    message: str = ""
    scores: tuple[RatioScore, ...] = ()
    parts: tuple[Part, ...] = ()
    passage_weight: float = 0.0  # over all states, template included; the rest to 1 went to the prompt


async def first_ids(engine: Engine, name: str, num_ids: int) -> list[str]:
    """Some passages of a collection, the store's first.

    Raises:
        CacheError: no such collection, or of another encoder.
    """

    def scan() -> list[str]:
        collection = engine.catalogue.open(name)
        return [passage_id for passage_id, _ in islice(collection.store.scan(collection.name), num_ids)]

    return await asyncio.to_thread(scan)


async def explain(engine: Engine, request: RerankRequest, deadline: float) -> list[Explained]:
    """Every candidate, the best at the ratio asked for (else the finest) first.

    Raises:
        PrereadError: the request as a whole cannot be answered.
    """
    with engine.under_way(request, "explain") as trail:
        explained = await _explain(engine, request, deadline)
        trail.outcomes = [Result(one.index, one.passage_id, one.status) for one in explained]
        return explained


async def _explain(engine: Engine, request: RerankRequest, deadline: float) -> list[Explained]:
    if len(request.candidates) > MAX_CANDIDATES:
        raise InvalidRequest("candidates", f"{len(request.candidates)} of them", f"1..{MAX_CANDIDATES}")
    check(request, engine.limits)
    if engine.reads_text:
        raise InvalidRequest("model", engine.name, "a model that reads states: this one reads text, at no ratio")
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout_at(deadline):
            prompt = await engine.prompt(request.query, request.instruction)
            collection = await _opened(engine, request.collection)
            stored = collection.manifest.compression_ratio if collection is not None else 1
            chosen = request.compression_ratio or stored
            if chosen % stored:
                raise InvalidRequest("compression_ratio", chosen, f"a multiple of {stored}, the collection's ratio")
            ratios = sorted({ratio for ratio in RATIOS if ratio % stored == 0} | {chosen})
            with engine.admission.admit(len(request.candidates) * len(ratios), prompt.num_tokens, stored):
                found = await _found(engine, request, prompt, collection, stored)
                texts = await loop.run_in_executor(None, _texts, collection, found)
                explained = []
                for one in found:
                    text = texts[one.candidate.index]
                    spans = await loop.run_in_executor(None, _spans, engine.backend, one, text)
                    look = _looker(engine.backend, prompt, one, text, spans, ratios, chosen)
                    explained.append(await engine.batcher.aside(look))
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before every candidate was looked at") from None
    return sorted(explained, key=lambda e: (-_margin(e, chosen), e.index))


async def _opened(engine: Engine, name: str | None) -> Collection | None:
    if name is None:
        return None
    return engine.catalogue.fresh(name) or await asyncio.to_thread(engine.catalogue.open, name)


async def _found(
    engine: Engine, request: RerankRequest, prompt: Prompt, collection: Collection | None, ratio: int
) -> list[Found]:
    on_miss: OnMiss = "encode" if engine.encodes_on_demand else "skip"
    wanted = Wanted(
        indexed(request.candidates),
        collection,
        ratio,
        on_miss,
        engine.limits.max_text_bytes,
        lambda passage: engine.backend.pairs(prompt, [passage])[0],
        engine.backend.is_empty,
    )
    found: list[Found] = []

    async def room() -> None:
        """There is always room for a few."""

    await engine.passages.feed(wanted, room, found.extend)
    return found


def _texts(collection: Collection | None, found: Sequence[Found]) -> dict[int, str | None]:
    texts = {one.candidate.index: one.candidate.text for one in found}
    ids = {one.candidate.index: one.candidate.passage_id for one in found if not one.candidate.text}
    named = {index: passage_id for index, passage_id in ids.items() if passage_id}
    if collection is not None and collection.manifest.stores_text and named:
        texts |= dict(zip(named, collection.get_texts(list(named.values())), strict=True))
    return texts


def _spans(backend: Backend, found: Found, text: str | None) -> list[tuple[int, int]]:
    """Of the text's tokens. Tokenizes, perhaps a megabyte: not on the model's thread, where every request waits."""
    return backend.spans(text) if text and found.states is not None and isinstance(backend, StatesBackend) else []


def _looker(
    backend: Backend,
    prompt: Prompt,
    found: Found,
    text: str | None,
    spans: Sequence[tuple[int, int]],
    ratios: Sequence[int],
    chosen: int,
) -> Callable[[], Explained]:
    """What to run on the model's thread for one candidate."""
    candidate: Indexed = found.candidate
    empty = Explained(candidate.index, candidate.passage_id or "", found.status, text, found.message)

    def look() -> Explained:
        try:
            return looked()
        except Exception:
            log.exception("candidates[%d] could not be looked at", candidate.index)
            return replace(empty, status="failed", message=SCORING_FAILED)

    def looked() -> Explained:
        if found.states is None:
            return empty
        states = found.states.decoded()  # once, for all ratios
        scores = []
        for ratio in ratios:
            pooled = states.at_ratio(ratio)
            start = time.perf_counter()
            margin = float(backend.score(backend.pairs(prompt, [pooled])[0]).max())
            seconds = time.perf_counter() - start
            if not np.isfinite(margin):
                return replace(empty, status="failed", message="the model's logits are not finite")
            scores.append(RatioScore(ratio, pooled.num_states, margin, backend.activate(margin), seconds))
        parts, weight = _parts(backend, prompt, states.at_ratio(chosen), spans)
        return replace(empty, scores=tuple(scores), parts=parts, passage_weight=weight)

    return look


def _parts(
    backend: Backend, prompt: Prompt, states: PassageStates, spans: Sequence[tuple[int, int]]
) -> tuple[tuple[Part, ...], float]:
    """Nothing where the backend cannot be looked at, the text is not kept, or its tokens cannot be told apart."""
    if not isinstance(backend, StatesBackend) or len(states.window_tokens) > 1:
        return (), 0.0
    ((item,),) = backend.pairs(prompt, [states])
    weights = backend.attention(item)
    if len(spans) < states.num_tokens:
        return (), float(weights.sum())
    parts = []
    for i, weight in enumerate(weights.tolist()):
        first = i * states.compression_ratio
        own = spans[first : min(first + states.compression_ratio, states.num_tokens)]
        real = [(begin, end) for begin, end in own if begin < end]
        if real:  # the template's own tokens are left out
            parts.append(Part(min(begin for begin, _ in real), max(end for _, end in real), weight))
    return tuple(parts), float(weights.sum())


def _margin(explained: Explained, ratio: int) -> float:
    return next((s.margin for s in explained.scores if s.compression_ratio == ratio), -np.inf)
