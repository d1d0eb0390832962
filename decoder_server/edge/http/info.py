"""GET endpoints about the server itself: models, limits, health. Each in the words of the clients that read it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from decoder_server.edge.http.body import render
from decoder_server.edge.http.context import context
from decoder_server.engine.engine import Engine
from preread.errors import Unavailable

CREATED = 1735689600  # the list of models has to have a date; 2025-01-01


async def models(request: Request) -> Response:
    """OpenAI's list of models, with our facts beside it."""
    path = request.url.path
    # infinity's client asks here, and rejects any other owner.
    owner = "infinity" if path == "/models" or path.startswith("/infinity/") else "preread"
    data = [
        {
            "id": engine.name,
            "object": "model",
            "created": CREATED,
            "owned_by": owner,
            "capabilities": ["rerank"],
            "stats": {"num_requests": engine.admission.num_requests, "num_refused": engine.admission.num_refused},
            **_facts(engine),
        }
        for engine in context(request).engines.values()
    ]
    return _json({"object": "list", "data": data})


async def info(request: Request) -> Response:
    """TEI's description of the first model, with our facts beside it."""
    here = context(request)
    engine = here.engine("")
    facts = _facts(engine)
    return _json(
        {
            "model_id": engine.name,
            "model_sha": None,
            "model_dtype": engine.backend.dtype_name,
            "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            "max_concurrent_requests": engine.limits.max_queue_requests,
            "max_input_length": engine.backend.settings.max_passage_tokens,
            "max_batch_tokens": engine.limits.max_queue_tokens,
            "max_client_batch_size": engine.limits.max_candidates,
            "auto_truncate": True,
            "tokenization_workers": 1,
            "version": package_version(),
            "max_body_bytes": here.config.max_body_bytes,
            **facts,
        }
    )


async def live(request: Request) -> Response:
    return _json({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 once a real forward pass has succeeded and every encoder has answered, until the server stops."""
    here = context(request)
    if here.unready:
        raise Unavailable(f"not ready: {here.unready}")
    degraded = here.readiness.degraded
    return _json({"status": "ready"} | ({"degraded": degraded} if degraded else {}))


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    here = context(request)
    text = await here.administer(generate_latest, here.registry)  # collectors may ask the store
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def package_version() -> str:
    try:
        return version("preread")
    except PackageNotFoundError:  # run from a checkout that nobody installed
        return "0+unknown"


def _facts(engine: Engine) -> dict[str, Any]:
    backend = engine.backend
    identity = backend.identity()
    return {
        "backend": backend.name,
        "checkpoint": backend.checkpoint_name,
        "fingerprint": identity.fingerprint if identity is not None else None,
        "dim": identity.dim if identity is not None else None,
        "notice": backend.notice or None,
        "dtype": backend.dtype_name,
        "device": backend.device_name,
        "default_instruction": backend.settings.default_instruction or None,
        "default_compression_ratio": backend.settings.default_compression_ratio,
        "max_query_tokens": backend.settings.max_query_tokens,
        "max_passage_tokens": backend.settings.max_passage_tokens,
        "max_candidates": engine.limits.max_candidates,
        "encodes_on_demand": engine.encodes_on_demand,
    }


def _json(document: object) -> Response:
    return Response(render(document), media_type="application/json")
