"""Rules of every edge: how models and collections are described, and which texts have a score.

Clients pair scores with documents by position or by count: a request of texts alone is scored in full, or fails, since
every text after one left out would get another's score. With ids each candidate has a status instead.
"""

import dataclasses
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cache.store import Store
from decoder_server.engine.collections import describe
from decoder_server.engine.engine import Engine
from preread.errors import DeadlineExceeded, InvalidRequest, Path, PrereadError, Unavailable, field_name
from preread.values import CollectionInfo, EncoderIdentity, ModelInfo, Result, Summary
from preread_edge.access import permits

# An empty text is read by no model and has these in every request. The margin is below every margin of a real model:
# its sigmoid is 0 in float32, and exp(500), which a client may compute of it, is still a finite float64.
FLOOR_SCORE, FLOOR_MARGIN = 0.0, -500.0

try:
    VERSION = version("preread")
except PackageNotFoundError:  # a checkout that is not installed
    VERSION = "0+unknown"


def every_scored(
    engine: Engine, results: Sequence[Result], summary: Summary, path: Callable[[int], Path]
) -> list[Result]:
    """The scored results of texts alone, best first, then the empty texts at the floor in request order.

    The first text without a score is an error; `path` is the caller's name of the candidate at an index.
    """
    for result in results:
        if result.margin is None and not result.empty:
            raise unscored(engine, result, summary, path(result.index))
    floor = [dataclasses.replace(r, margin=FLOOR_MARGIN, score=FLOOR_SCORE) for r in results if r.empty]
    return [result for result in results if result.margin is not None] + floor


def unscored(engine: Engine, result: Result, summary: Summary, path: Path) -> PrereadError:
    """Why a request fails for this candidate, which has no score."""
    field, message = field_name(path), result.message
    if result.status == "too_long" or result.empty:
        return InvalidRequest(path, result.status, f"a text that can be scored ({message})")
    if result.status == "missing" and (engine.encodes_on_demand or engine.reads_text):
        return InvalidRequest(path, result.status, f"an id that is stored, or a text and on_miss encode ({message})")
    if result.status == "missing":
        return Unavailable(f"{field}: {message}; start the server with --encoder-address, or without --no-encoder")
    if summary.stopped_early:
        return DeadlineExceeded(f"{field}: {message}")
    return Unavailable(f"{field} could not be scored: {message}")


def model_info(engine: Engine) -> ModelInfo:
    """A served model and its limits."""
    backend, settings, identity = engine.backend, engine.backend.settings, engine.backend.identity()
    return ModelInfo(
        name=engine.name,
        backend=backend.name,
        checkpoint=backend.checkpoint_name,
        encoder=EncoderIdentity(**dataclasses.asdict(identity)) if identity is not None else None,
        default_instruction=settings.default_instruction,
        default_compression_ratio=settings.default_compression_ratio,
        max_query_tokens=settings.max_query_tokens,
        max_candidates=engine.limits.max_candidates,
        max_message_bytes=engine.limits.max_message_bytes,
        dtype=backend.dtype_name,
        device=backend.device_name,
        encodes_on_demand=engine.encodes_on_demand,
        max_passage_tokens=settings.max_passage_tokens,
        notice=backend.notice,
    )


def tei_info(engine: Engine) -> dict[str, Any]:
    """What a TEI server says of itself, over HTTP and gRPC alike."""
    return {
        "version": VERSION,
        "model_id": engine.name,
        "model_dtype": engine.backend.dtype_name,
        "max_concurrent_requests": engine.limits.max_queue_requests,
        "max_input_length": engine.backend.settings.max_passage_tokens,
        "max_batch_tokens": engine.limits.max_queue_tokens,
        "max_client_batch_size": engine.limits.max_candidates,
        "tokenization_workers": 1,
    }


def collection_infos(store: Store) -> list[CollectionInfo]:
    """Every collection of a store that can be read, and that the caller's key may use.

    Blocks while the store counts, so on a thread that copies the call's context; raises the store's errors.
    """
    infos = []
    for stored in describe(store):
        if not permits(stored.manifest.collection, *stored.aliases):
            continue
        manifest, counts = stored.manifest, dataclasses.asdict(stored.stats)  # under the same names
        encoder = EncoderIdentity(**{one: getattr(manifest, one) for one in EncoderIdentity.__dataclass_fields__})
        own = {name: getattr(manifest, name) for name in ("compression_ratio", "codec", "stores_text")}
        infos.append(CollectionInfo(manifest.collection, stored.aliases, encoder, **own, **counts))
    return infos
