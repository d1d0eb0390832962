"""/openapi.json, generated: paths from the table of operations, schemas from the structs that read and write bodies."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import msgspec

from decoder_server.edge.engines import VERSION
from decoder_server.edge.http.json_values import Schema
from decoder_server.edge.http.request import ERRORS, Endpoint

JSON = "application/json"

_REF = "#/components/schemas/"

_ERRORS = {
    "400": "A field is out of range, or the request contradicts the state of the service",
    "401": "The API key is missing or unknown",
    "403": "The key has not the scope, or the host or origin is foreign",
    "404": "No such model, collection or path",
    "408": "The header or the body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is compressed by anything but gzip, or a write is not JSON",
    "429": "The queue is full; retry-after and retry-after-ms say when to try again",
    "503": "Starting, stopping, or the store or encoder worker does not answer",
    "504": "The deadline passed",
}
_RERANK_HEADERS = {
    "x-preread-read": "The ratio that was used, or the stages of a cascade: 32:100,8:20,4",
    "x-preread-degraded": "Scored at a coarser ratio than requested: deadline or queue",
    "x-preread-asked": "With x-preread-degraded: the ratio or stages without the pressure",
    "x-preread-stopped-early": "true: the deadline ended the cascade before its last stage",
    "x-preread-lookup": "Texts that were found in collections, of those that were looked up: 97/100",
    "x-preread-query-truncated": "true: the query was cut to the model's limit",
    "x-preread-truncated": "Positions of the documents that were cut: 0,3; at most 500, then ...",
    "x-preread-empty": "Positions of the empty documents, which have the lowest score: 0,3; at most 500, then ...",
}
_TAGS = {
    "rerank": "Every reranking path takes every dialect: path, headers and the body's fields tell which one it is.",
    "collections": "Passages that are encoded once and ranked by id afterwards.",
    "server": "Models, limits and health.",
}


@dataclass(frozen=True)
class Operation:
    """One method of one path: its endpoint and its description."""

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    name: str = ""  # operationId; "": the endpoint's, in camel case
    tag: str = "server"
    answers: Sequence[Any] = ()  # structs, or a name before several alternatives; none: text
    bodies: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # the same, by media type
    body_required: bool = True
    query: Mapping[str, Schema] | None = None  # every parameter there is; None: any, and none is read


def document(operations: Iterable[Operation], prefixes: Iterable[str]) -> Schema:
    """The OpenAPI 3.1 document. Prefixes are named, not repeated."""
    paths: dict[str, Schema] = {}
    published = dict(map(_named, ERRORS))
    for operation in operations:
        path = operation.path.replace(":path", "")
        item = paths.setdefault(path, {})
        if names := re.findall(r"{(\w+)}", path):
            text = {"in": "path", "required": True, "schema": {"type": "string"}}
            item["parameters"] = [{"name": name} | text for name in names]
        item[operation.method.lower()] = _described(operation)
        for kinds in (operation.answers, *operation.bodies.values()):
            published |= map(_named, kinds)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Preread",
            "version": VERSION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "Reranking from cached token states, in the dialects of Cohere, Jina, vLLM, llama.cpp, "
            "infinity, TEI, NIM, Voyage, mixedbread, Pinecone, SGLang, isaacus, Weaviate and LiteLLM. Any other path "
            "that ends in a rerank word is served too. Reranking paths also exist behind the prefixes "
            f"{', '.join(prefixes)}, which force that dialect. Null is absent. Bodies may be gzip. "
            "Unknown fields of a reranking body are ignored, unless they are near misses of known ones.",
        },
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {"schemas": _schemas(published)},
    }


def _named(kind: Any) -> tuple[str, tuple[Any, ...]]:
    return (kind[0], kind[1:]) if isinstance(kind, tuple) else (kind.__name__.removeprefix("_"), (kind,))


def _schemas(published: Mapping[str, tuple[Any, ...]]) -> dict[str, Schema]:
    kinds = [kind for several in published.values() for kind in several]
    template, hook = _REF + "{name}", attrgetter("schema")
    found, components = msgspec.json.schema_components(kinds, schema_hook=hook, ref_template=template)

    def public(node: Any) -> Any:
        if isinstance(node, list):
            return [public(item) for item in node]
        if isinstance(node, dict):
            own = {key for key in ("title", "default") if not isinstance(node.get(key), dict)}  # a dict is a property
            return {key: public(item) for key, item in node.items() if key not in own}
        return node.replace(_REF + "_", _REF) if isinstance(node, str) else node

    result = {name.removeprefix("_"): public(schema) for name, schema in components.items()}
    schema_of = iter(found)
    for name, several in published.items():
        own = [public(next(schema_of)) for _ in several]
        result.setdefault(name, own[0] if len(own) == 1 else {"anyOf": own})
    return result


def _described(operation: Operation) -> Schema:
    name = getattr(operation.endpoint, "__name__", "").strip("_")
    headers: Schema = {"x-request-id": {"description": "The caller's, or a new one", "schema": {"type": "string"}}}
    parameters = [{"name": name, "in": "query", "schema": schema} for name, schema in (operation.query or {}).items()]
    problems: Sequence[Any] = ERRORS[:1]
    if len(operation.answers) > 1:  # of every dialect
        headers |= {name: {"description": text, "schema": {"type": "string"}} for name, text in _RERANK_HEADERS.items()}
        kind = {"type": "number", "exclusiveMinimum": 0}
        limit = {"schema": kind, "description": "A shorter limit than the server's"}
        parameters.append({"name": "x-request-timeout-ms", "in": "header"} | limit)
        problems = ERRORS
    content = _content({JSON if operation.answers else "text/plain": operation.answers})
    responses: Schema = {"200": {"description": "Success", "headers": headers, "content": content}}
    for status, text in _ERRORS.items():
        responses[status] = {"description": text, "content": _content({JSON: problems})}
    operation_id = operation.name or re.sub(r"_(.)", lambda match: match[1].upper(), name)
    described: Schema = {"tags": [operation.tag], "operationId": operation_id, "summary": operation.summary}
    described["responses"] = responses
    if parameters:
        described["parameters"] = parameters
    if operation.bodies:
        described["requestBody"] = {"required": operation.body_required, "content": _content(operation.bodies)}
    return described


def _content(by_media: Mapping[str, Sequence[Any]]) -> Schema:
    content: Schema = {}
    for media, kinds in by_media.items():
        refs = [{"$ref": _REF + _named(kind)[0]} for kind in kinds]
        content[media] = {"schema": ({"anyOf": refs} if len(refs) > 1 else refs[0]) if refs else {"type": "string"}}
    return content
