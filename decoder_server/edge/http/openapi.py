"""GET /openapi.json: the paths of the routing table, described. A test compares the two. Knows no engine."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from decoder_server.edge.http.body import render
from decoder_server.edge.http.info import package_version
from decoder_server.edge.http.schemas import SCHEMAS

Schema = dict[str, Any]

ERRORS = {
    "400": "A field is out of range, or the request contradicts the state of the service",
    "401": "The API key is missing or unknown",
    "403": "The key has not the scope, or the host or origin is foreign",
    "404": "No such model, collection or path",
    "408": "The header or the body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is compressed, or a write is not JSON",
    "429": "The queue is full; retry-after and retry-after-ms say when to come back",
    "503": "Starting, stopping, or the store or encoder worker is away",
    "504": "The request's time was up",
}
READ_HEADERS = {
    "x-preread-read": "The ratio that was read, or the stages of a cascade: 32:100,4:20,1",
    "x-preread-degraded": "Read coarser than asked: deadline or queue",
    "x-preread-asked": "With x-preread-degraded: what would have been read",
    "x-preread-stopped-early": "true: the deadline came before the last stage was through",
    "x-preread-query-truncated": "true: the query was cut to the model's limit",
    "x-preread-truncated": "Positions of the documents that were cut: 0,3; at most 500, then ...",
    "x-preread-empty": "Positions of the empty documents, which have the lowest score: 0,3; at most 500, then ...",
}
TAGS = {
    "rerank": "Every reranking path takes every dialect: what the body has tells which one it is.",
    "collections": "Passages that are read once and ranked by id afterwards.",
    "server": "Models, limits and health.",
}


async def serve(request: Request) -> Response:
    from decoder_server.edge.http.app import PREFIXES, RERANK  # they need this module first

    return Response(render(document(RERANK, PREFIXES)), media_type="application/json")


def document(rerank_paths: tuple[str, ...], prefixes: tuple[str, ...]) -> Schema:
    """The OpenAPI 3.1 document. Prefixed paths are named in the description, not repeated."""
    paths: dict[str, Schema] = {}
    for path in rerank_paths:
        plain = path.replace(":path", "")
        parameters = [_parameter("model")] if "{model}" in plain else []
        paths[plain] = {"post": _rerank(plain, parameters)}
    collection, alias = _parameter("collection"), _parameter("alias")
    passage = _parameter("passage_id")
    paths |= {
        "/v1/models": {"get": _operation("server", "listModels", "Models served", "Models")},
        "/models": {"get": _operation("server", "listModelsShort", "Models served", "Models")},
        "/info": {"get": _operation("server", "info", "The first model and the limits", "Info")},
        "/health": {"get": _operation("server", "live", "The process answers", "State")},
        "/health/ready": {
            "get": _operation("server", "ready", "Ready: loaded, and every encoder has answered", "State")
        },
        "/metrics": {"get": _text(_operation("server", "metrics", "Prometheus metrics"))},
        "/openapi.json": {"get": _operation("server", "openapi", "This document", "Object")},
        "/v1/explain": {
            "post": _operation("rerank", "explain", "A few candidates at every ratio, and what was attended to")
            | {"requestBody": _body({"application/json": "Object"})}
        },
        "/v1/collections": {
            "get": _operation("collections", "listCollections", "Every collection of the store", "Collections")
        },
        "/v1/collections/{collection}": {
            "parameters": [collection],
            "get": _operation("collections", "getCollection", "One collection, by name or alias", "Collection"),
        },
        "/v1/collections/{collection}/passages": {
            "parameters": [collection],
            "post": _operation("collections", "addPassages", "Encode and store passages", "Upload") | _upload_body(),
            "delete": _operation("collections", "deletePassages", "Delete passages by id", "Deleted")
            | {"requestBody": _body({"application/json": "DeleteRequest"}, required=False)}
            | {
                "parameters": [
                    {
                        "name": "id",
                        "in": "query",
                        "description": "In place of a body; may be repeated",
                        "schema": {"type": "array", "items": {"type": "string"}},
                    }
                ]
            },
        },
        "/v1/collections/{collection}/passages/{passage_id}": {
            "parameters": [collection, passage],
            "delete": _operation("collections", "deletePassage", "Delete one passage", "Deleted"),
        },
        "/v1/aliases": {"get": _operation("collections", "listAliases", "Aliases and what they mean", "Aliases")},
        "/v1/aliases/{alias}": {
            "parameters": [alias],
            "put": _operation("collections", "setAlias", "Point an alias at a collection, in one step", "Alias")
            | {"requestBody": _body({"application/json": "SetAliasRequest"})},
            "delete": _operation("collections", "removeAlias", "Remove an alias", "AliasDeleted"),
        },
    }
    forced = ", ".join(prefixes)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Preread",
            "version": package_version(),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "Reranking from cached token states, in the dialects of Cohere, Jina, vLLM, llama.cpp, "
            "infinity, TEI, NIM, Voyage and mixedbread. Reranking paths also exist behind the prefixes "
            f"{forced}, which force that dialect. Unknown fields are ignored; null is absent.",
        },
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {"schemas": SCHEMAS},
    }


def _rerank(path: str, parameters: list[Schema]) -> Schema:
    requests = ("RerankRequest", "TeiRequest", "NimRequest", "VoyageRequest", "MixedbreadRequest", "ScoreRequest")
    answers = ("RerankAnswer", "TeiAnswer", "NimAnswer", "VoyageAnswer", "MixedbreadAnswer", "ScoreAnswer")
    operation = _operation("rerank", f"rerank{path.replace('/', '_')}".rstrip("}").replace("{", ""), "Rank passages")
    timeout = {
        "name": "x-request-timeout-ms",
        "in": "header",
        "description": "A shorter limit than the server's",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    }
    operation["parameters"] = [*parameters, timeout]
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": {"anyOf": [_ref(name) for name in requests]}}},
    }
    operation["responses"]["200"] = _answer({"anyOf": [_ref(name) for name in answers]})
    for name, says in READ_HEADERS.items():
        operation["responses"]["200"]["headers"][name] = {"description": says, "schema": {"type": "string"}}
    for status in ERRORS:
        schema = {"anyOf": [_ref("Error"), _ref("TeiError")]}
        operation["responses"][status]["content"] = {"application/json": {"schema": schema}}
    return operation


def _operation(tag: str, operation_id: str, summary: str, answer: str = "Object") -> Schema:
    responses: Schema = {"200": _answer(_ref(answer))}
    for status, description in ERRORS.items():
        content = {"application/json": {"schema": _ref("Error")}}
        responses[status] = {"description": description, "content": content}
    return {"tags": [tag], "operationId": operation_id, "summary": summary, "responses": responses}


def _text(operation: Schema) -> Schema:
    operation["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return operation


def _answer(schema: Schema) -> Schema:
    header = {"x-request-id": {"description": "The caller's, or a new one", "schema": {"type": "string"}}}
    return {"description": "Success", "headers": header, "content": {"application/json": {"schema": schema}}}


def _upload_body() -> Schema:
    settings = {"compression_ratio": "integer", "codec": "string", "store_text": "boolean"}
    return {
        "requestBody": _body({"application/json": "UploadRequest", "application/x-ndjson": "Passage"}),
        "parameters": [
            {"name": name, "in": "query", "description": "With NDJSON", "schema": {"type": kind}}
            for name, kind in settings.items()
        ],
    }


def _body(schemas: dict[str, str], *, required: bool = True) -> Schema:
    content = {media: {"schema": _ref(name)} for media, name in schemas.items()}
    return {"required": required, "content": content}


def _parameter(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
