"""Endpoints about the server: models, limits, health, metrics, the API; and the page at / with /v1/explain behind it.

Each answers in the words of the clients that read it: OpenAI's, TEI's, infinity's, NIM's and Weaviate's.
"""

import asyncio
import dataclasses
import time
from importlib.resources import files
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from decoder_server.edge.engines import model_info, tei_info
from decoder_server.edge.http.dialect_request import RerankBody
from decoder_server.edge.http.json_values import Count, Text, read
from decoder_server.edge.http.openapi import JSON, Operation
from decoder_server.edge.http.request import HttpRequest, respond
from decoder_server.engine.engine import Engine
from decoder_server.engine.explain import MAX_CANDIDATES, explain
from preread.errors import InvalidRequest, Unavailable

# Paths of probes, with their operationIds: ours, those that Kubernetes has made usual, NIM's and Weaviate's.
LIVE = {
    "/health": "live", "/healthz": "healthz", "/livez": "livez", "/v1/health/live": "nimLive",
    "/.well-known/live": "wellKnownLive",
}  # fmt: skip
READY = {
    "/health/ready": "ready", "/readyz": "readyz", "/v1/health/ready": "nimReady",
    "/.well-known/ready": "wellKnownReady",
}  # fmt: skip
# Paths that say what is served; /meta is Weaviate's.
DESCRIPTIONS = ("/v1/models", "/v1/models/{model:path}", "/models", "/info", "/meta")
_IS_READY = "Ready: loaded, and every encoder has answered"
CREATED = 1735689600  # the list of models has to have a date; 2025-01-01

_SCRIPTS = ("main", "api", "dom", "form", "numbers", "results", "uploads")  # main imports the others
_TYPES = {"page.html": "text/html", "page.css": "text/css", "icon.svg": "image/svg+xml"}
_TYPES |= {f"{name}.js": "text/javascript" for name in _SCRIPTS}
PAGE_PATHS = ("/", *(f"/page/{name}" for name in _TYPES if name != "page.html"))
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_FILES = {name: files(__package__).joinpath("page", name).read_bytes() for name in _TYPES}


class _Facts(Struct, kw_only=True):
    """What every description of a model has, next to the fields of a client."""

    backend: str
    checkpoint: str
    fingerprint: str | None
    dim: int | None
    notice: str | None
    dtype: str
    device: str
    default_instruction: str | None
    default_compression_ratio: int
    max_query_tokens: int
    max_passage_tokens: int
    max_candidates: int
    encodes_on_demand: bool


class _ModelObject(_Facts, kw_only=True, tag_field="object", tag="model"):
    id: str
    created: int = CREATED
    owned_by: str
    capabilities: list[str]
    stats: dict[str, int]


class _Models(Struct, kw_only=True, tag_field="object", tag="list"):
    data: list[_ModelObject]


class _Info(_Facts, kw_only=True):
    model_id: str
    model_sha: None = None
    model_dtype: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_client_batch_size: int
    auto_truncate: bool = True
    tokenization_workers: int = 1
    version: str
    max_body_bytes: int


class _State(Struct, kw_only=True):
    status: str
    degraded: str | UnsetType = UNSET
    object: Annotated[str | UnsetType, Meta(description="On NIM's paths: health.response")] = UNSET
    message: Annotated[str | UnsetType, Meta(description="On NIM's paths")] = UNSET


def _model(request: HttpRequest, engine: Engine) -> _ModelObject:
    path = request.url.path
    # infinity's client reads /models, and rejects any other owner.
    owner = "infinity" if path == "/models" or path.startswith("/infinity/") else "preread"
    stats = {"num_requests": engine.admission.num_requests, "num_refused": engine.admission.num_rejected}
    return _ModelObject(id=engine.name, owned_by=owner, capabilities=["rerank"], stats=stats, **_facts(engine))


async def _list_models(request: HttpRequest) -> Response:
    return await respond(_Models(data=[_model(request, engine) for engine in request.context.engines.values()]))


async def _get_model(request: HttpRequest) -> Response:
    return await respond(_model(request, request.context.engine(request.path_params["model"])))


async def _info(request: HttpRequest) -> Response:
    engine = request.context.engine("")
    model_type = {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
    max_bytes = request.context.config.max_body_bytes
    return await respond(_Info(model_type=model_type, max_body_bytes=max_bytes, **tei_info(engine), **_facts(engine)))


async def _live(request: HttpRequest) -> Response:
    return await respond(_state(request, "live") or _State(status="ok"))


async def _ready(request: HttpRequest) -> Response:
    """200 once a real forward pass has succeeded and every encoder has answered, until the server stops."""
    here = request.context
    if problem := "the server is stopping" if here.draining else here.readiness.problem:
        raise Unavailable(f"not ready: {problem}")
    state = _state(request, "ready") or _State(status="ready")
    state.degraded = here.readiness.degraded or UNSET
    return await respond(state)


def _state(request: HttpRequest, status: str) -> _State | None:
    """The response of NIM, on a path of NIM."""
    if "/v1/health/" not in request.url.path:
        return None
    return _State(status=status, object="health.response", message=f"Service is {status}.")


async def _metrics(request: HttpRequest) -> Response:
    text = await asyncio.to_thread(generate_latest, request.context.registry)  # collectors may read the store
    return Response(text, media_type=CONTENT_TYPE_LATEST)


async def _openapi(request: HttpRequest) -> Response:
    return await respond(request.app.state.openapi)


async def _file(request: Request) -> Response:
    name = request.url.path.rpartition("/")[2] or "page.html"
    return Response(_FILES[name], media_type=_TYPES[name], headers=_HEADERS)


class _ExplainRequest(RerankBody, kw_only=True, forbid_unknown_fields=True):
    first: Count | None = None  # passages of the collection, in place of passage_ids


class _Explanation(Struct, kw_only=True, tag_field="object", tag="explanation"):
    model: str
    seconds: float
    results: list[dict[str, Any]]


async def _explain(request: HttpRequest) -> Response:
    here, until = request.context, request.deadline()
    body = read(_ExplainRequest, await request.read_json(until))
    engine = here.engine(body.model or "")
    if body.collection and body.first and body.passage_ids is None:
        if body.first > MAX_CANDIDATES:
            raise InvalidRequest("first", body.first, f"1..{MAX_CANDIDATES}")
        body.passage_ids = [*map(Text, await engine.call(engine.catalogue.first_ids, body.collection, body.first))]
    parsed = body.request()
    start = time.monotonic()
    with parsed.naming():
        explained = await request.while_connected(explain(engine, parsed.request, until))
    results, seconds = [dataclasses.asdict(one) for one in explained], time.monotonic() - start
    return await respond(_Explanation(model=engine.name, seconds=seconds, results=results), is_large=True)


def _facts(engine: Engine) -> dict[str, Any]:
    info = model_info(engine)
    facts = {name: getattr(info, name) for name in _Facts.__struct_fields__ if hasattr(info, name)}
    facts |= {"notice": info.notice or None, "default_instruction": info.default_instruction or None}
    return facts | {name: getattr(info.encoder, name, None) for name in ("fingerprint", "dim")}


OPERATIONS = (
    Operation("GET", "/v1/models", _list_models, "Models served", answers=(_Models,)),
    Operation("GET", "/models", _list_models, "Models served", "listModelsShort", answers=(_Models,)),
    Operation("GET", "/v1/models/{model:path}", _get_model, "One model", answers=(_ModelObject,)),
    Operation("GET", "/info", _info, "The first model and the limits", answers=(_Info,)),
    Operation("GET", "/meta", _info, "The first model and the limits", "meta", answers=(_Info,)),
    *(Operation("GET", path, _live, "The process answers", name, answers=(_State,)) for path, name in LIVE.items()),
    *(Operation("GET", path, _ready, _IS_READY, name, answers=(_State,)) for path, name in READY.items()),
    Operation("GET", "/metrics", _metrics, "Prometheus metrics"),
    Operation("GET", "/openapi.json", _openapi, "This document", answers=(("Object", dict[str, Any]),)),
    Operation(
        "POST", "/v1/explain", _explain, "A few candidates at every ratio, and what was attended to", tag="rerank",
        answers=(_Explanation,), bodies={JSON: (_ExplainRequest,)}, query={},
    ),
)  # fmt: skip
PAGE = [Route(path, _file) for path in PAGE_PATHS]
