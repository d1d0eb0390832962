"""Explains a few candidates: their scores at every ratio, and the states that the decoder attended to.

Every candidate is scored alone, so that its time is its own, on the model's thread between forward passes.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cache.states import AnyStates, decode_all
from decoder_server.engine.engine import Engine
from decoder_server.engine.fetch import NOT_FINITE, SCORING_FAILED, FetchRequest
from decoder_server.engine.plan import check
from decoder_server.models.backend import Prompt, StatesBackend
from preread.errors import InvalidRequest
from preread.values import RerankRequest, Result, Status

log = logging.getLogger(__name__)

RATIOS = (1, 2, 4, 8, 16, 32)
MAX_CANDIDATES = 16  # each is as much work as a dozen of a ranking


@dataclass(frozen=True, slots=True)
class _Explained:
    index: int
    passage_id: str
    status: Status
    text: str | None = None
    message: str = ""
    scores: list[dict[str, float]] = field(default_factory=list)  # at each ratio, scored alone
    parts: list[dict[str, float]] = field(default_factory=list)  # characters of the text and the weight on their state
    passage_weight: float = 0.0  # over all states, template included; the rest to 1 went to the prompt


async def explain(engine: Engine, request: RerankRequest, deadline: float) -> list[_Explained]:
    """Every candidate, the best at the requested ratio (else the finest) first; raises as Engine.rerank does."""
    async with engine.track(request, "explain", deadline=deadline) as trace:
        if len(request.candidates) > MAX_CANDIDATES:
            raise InvalidRequest("candidates", f"{len(request.candidates)} of them", f"1..{MAX_CANDIDATES}")
        check(request, engine.limits)
        backend = engine.backend
        if not isinstance(backend, StatesBackend):
            raise InvalidRequest("model", engine.name, "a model that reads states: this one reads text, at no ratio")
        (prompt,) = await engine.prompts([request.query], request.instruction)
        collection = await engine.open_collection(request.collection)
        stored = collection.manifest.compression_ratio if collection is not None else 1
        chosen = request.compression_ratio or stored
        if chosen % stored:
            raise InvalidRequest("compression_ratio", chosen, f"a multiple of {stored}, the collection's ratio")
        ratios = sorted({ratio for ratio in RATIOS if ratio % stored == 0} | {chosen})
        indexes = range(len(request.candidates))
        explained = []
        with engine.admission.admit([(len(indexes) * len(ratios), stored)], prompt.num_tokens):
            wanted = FetchRequest(request.candidates, indexes, collection, stored, None, [prompt], trace)
            async for chunk in engine.fetcher.fetch(wanted, stored):
                texts = await engine.call(wanted.texts, [one.index for one in chunk])
                for one in chunk:
                    text = texts[one.index]
                    explained.append(_Explained(one.index, one.passage_id or "", one.status, text, one.message))
                    if one.states is not None:
                        # Tokenizes, perhaps a megabyte: not on the model's thread, where every request waits.
                        spans = await engine.call(backend.spans, text) if text else []
                        what = backend, one.states, explained[-1], prompt, spans, ratios, chosen
                        explained[-1] = await engine.scheduler.between_passes(_explained, *what)
        trace.results = [Result(one.index, one.passage_id, one.status) for one in explained]
        margins = {one.index: s["margin"] for one in explained for s in one.scores if s["compression_ratio"] == chosen}
        return sorted(explained, key=lambda one: (-margins.get(one.index, -np.inf), one.index))


def _explained(
    backend: StatesBackend,
    encoded: AnyStates,
    unscored: _Explained,
    prompt: Prompt,
    spans: Sequence[tuple[int, int]],
    ratios: Sequence[int],
    chosen: int,
) -> _Explained:
    """One candidate, on the model's thread; its failure costs no other candidate."""
    try:
        (states,), scores = decode_all([encoded]), []  # once, for all ratios
        for ratio in ratios:
            pooled = states.at_ratio(ratio)
            start = time.perf_counter()
            margin = float(backend.score(backend.pairs(prompt, [pooled])[0]).max())
            seconds = time.perf_counter() - start
            if not np.isfinite(margin):
                return replace(unscored, status="failed", message=NOT_FINITE)
            measured = {"num_states": pooled.num_states, "margin": margin, "score": backend.activate(margin)}
            scores.append({"compression_ratio": ratio, **measured, "seconds": seconds})
        pooled = states.at_ratio(chosen)
        if len(pooled.window_tokens) > 1:  # each window attends for itself
            return replace(unscored, scores=scores)
        ((pair,),) = backend.pairs(prompt, [pooled])
        weights, parts = backend.attention(pair), []
        # No parts where the text is not stored, or tokens and states do not match.
        for i, weight in enumerate(weights.tolist() if len(spans) >= pooled.num_tokens else ()):
            own = spans[i * chosen : min((i + 1) * chosen, pooled.num_tokens)]
            if real := [(begin, end) for begin, end in own if begin < end]:  # the template's own tokens are left out
                begin, end = min(begin for begin, _ in real), max(end for _, end in real)
                parts.append({"begin": begin, "end": end, "weight": weight})
        return replace(unscored, scores=scores, parts=parts, passage_weight=float(weights.sum()))
    except Exception:
        log.exception("candidates[%d] could not be explained", unscored.index)
        return replace(unscored, status="failed", message=SCORING_FAILED)
