"""Collections over HTTP: passages in and out through the encoder worker, descriptions and aliases from the store.

The worker writes because only it can encode; what is described is what this server reads.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cache.errors import CollectionNotFound
from cache.record import check_name
from decoder_server.edge.http import body, errors
from decoder_server.edge.http.context import check_encoding, check_written, content_type, context, read_json
from decoder_server.edge.http.fields import Fields, as_text
from decoder_server.edge.http.page.uploads import NDJSON, from_document, from_lines
from decoder_server.engine.collections import Described, describe
from preread import Passage, UpsertResult
from preread.errors import InvalidRequest
from preread_edge.steps import Step, stepped

IDS_AT_ONCE = 1000  # of one call of the worker
MAX_DIGITS = 20  # of a count, whose greatest has fewer
MAX_REFUSED_SHOWN = 1000  # an answer to an endless stream is not endless


async def add_passages(request: Request) -> Response:
    """POST: encodes and stores; answers when the store has everything, with what it refused."""
    here = context(request)
    worker = here.encoder()
    name = check_name("collection", request.path_params["collection"])
    check_written(request, *NDJSON)
    items: Iterable[Passage | UpsertResult] | AsyncIterable[Passage | UpsertResult]
    if content_type(request) in NDJSON:
        check_encoding(request)
        settings = Fields({key: _literal(value) for key, value in request.query_params.items()})
        items = from_lines(request, here.config.max_line_bytes, here.config.timeout_seconds)
    else:
        document = await read_json(request)
        settings = Fields({"passages": document} if isinstance(document, list) else document)
        items = await stepped(from_document, settings)
    store_text = settings.flag("store_text")
    received = Received(name)
    try:
        async for result in worker.upsert(
            received.sendable(items),
            collection=name,
            compression_ratio=settings.count("compression_ratio") or 0,
            codec=settings.text("codec") or "",
            store_text=True if store_text is None else store_text,
        ):
            received.add(result)
    except Exception as exc:  # what was acknowledged stays, and the caller should know how much that is
        return _cut_short(exc, received)
    return _json(received.as_document())


async def _each(items: Iterable[Passage | UpsertResult]) -> AsyncIterator[Passage | UpsertResult]:
    for item in items:
        yield item


class Received:
    """Acknowledgements, counted."""

    def __init__(self, collection: str) -> None:
        self._collection = collection
        self.num = {"stored": 0, "unchanged": 0, "refused": 0}
        self._num_truncated = self._num_clipped = 0
        self._refused: list[dict[str, str]] = []

    async def sendable(
        self, items: Iterable[Passage | UpsertResult] | AsyncIterable[Passage | UpsertResult]
    ) -> AsyncIterator[Passage]:
        """The passages; what is refused before it is sent is counted here."""
        if not isinstance(items, AsyncIterable):
            items = _each(items)
        async for item in items:
            if isinstance(item, Passage):
                yield item
            else:
                self.add(item)

    def add(self, result: UpsertResult) -> None:
        self.num[result.status] = self.num.get(result.status, 0) + 1
        self._num_truncated += result.truncated
        self._num_clipped += result.num_clipped
        if result.status == "refused" and len(self._refused) < MAX_REFUSED_SHOWN:
            named = {"id": result.passage_id} if result.passage_id else {}  # a line that was not read has none
            self._refused.append(named | {"message": result.message})

    def as_document(self) -> dict[str, Any]:
        return {
            "object": "collection.upload",
            "collection": self._collection,
            "num_stored": self.num["stored"],
            "num_unchanged": self.num["unchanged"],
            "num_refused": self.num["refused"],
            "num_truncated": self._num_truncated,
            "num_clipped": self._num_clipped,
            "refused": self._refused,
        }


async def delete_passages(request: Request) -> Response:
    """DELETE: ids in the path, in `?id=`, or in a body's `ids`."""
    worker = context(request).encoder()
    name = check_name("collection", request.path_params["collection"])
    if "passage_id" in request.path_params:
        ids = [as_text(request.path_params["passage_id"], "passage_id")]
    elif "id" in request.query_params:
        ids = request.query_params.getlist("id")
    else:
        check_written(request)
        fields = Fields(await read_json(request))
        ids = await stepped(_ids, fields)
    if not ids:
        raise InvalidRequest("ids", "empty", "at least one passage id")
    num_deleted = 0
    for first in range(0, len(ids), IDS_AT_ONCE):
        num_deleted += await worker.delete(ids[first : first + IDS_AT_ONCE], collection=name)
    return _json({"object": "collection.deleted", "collection": name, "num_deleted": num_deleted})


def _ids(step: Step, fields: Fields) -> list[str]:
    """Ids that a body names; there may be hundreds of thousands."""
    name = "ids" if fields.get("ids") else "passage_ids"
    ids = []
    for i, item in enumerate(fields.items(name) or ()):
        ids.append(as_text(item, f"{name}[{i}]"))
        step()
    return ids


async def list_collections(request: Request) -> Response:
    here = context(request)
    described = await here.administer(describe, here.store)
    return _json({"object": "list", "data": [_document(one) for one in described]})


async def get_collection(request: Request) -> Response:
    """GET: by name or alias."""
    here = context(request)
    name = check_name("collection", request.path_params["collection"])
    described = await here.administer(describe, here.store)
    # An alias first: it may have taken the place of a collection of its name.
    for one in sorted(described, key=lambda one: name not in one.aliases):
        if name == one.manifest.collection or name in one.aliases:
            return _json(_document(one))
    raise CollectionNotFound(f"collection: no collection or alias {name!r}")


async def list_aliases(request: Request) -> Response:
    here = context(request)
    aliases = await here.administer(here.store.aliases)
    return _json(
        {"object": "list", "data": [{"alias": alias, "collection": to} for alias, to in sorted(aliases.items())]}
    )


async def set_alias(request: Request) -> Response:
    """PUT: points an alias at a collection, in one step for all readers."""
    here = context(request)
    check_written(request)
    alias = check_name("alias", request.path_params["alias"])
    collection = check_name("collection", Fields(await read_json(request)).needed_text("collection"))
    await here.administer(here.store.set_alias, alias, collection)
    return _json({"object": "alias", "alias": alias, "collection": collection})


async def remove_alias(request: Request) -> Response:
    here = context(request)
    alias = check_name("alias", request.path_params["alias"])
    if not await here.administer(here.store.remove_alias, alias):
        raise CollectionNotFound(f"alias: there is no alias {alias!r}")
    return _json({"object": "alias.deleted", "alias": alias})


def _document(described: Described) -> dict[str, Any]:
    manifest, stats = described.manifest, described.stats
    return {
        "object": "collection",
        "id": manifest.collection,
        "aliases": list(described.aliases),
        "checkpoint": manifest.checkpoint,
        "fingerprint": manifest.fingerprint,
        "dim": manifest.dim,
        "compression_ratio": manifest.compression_ratio,
        "codec": manifest.codec,
        "num_passages": stats.num_passages,
        "num_states": stats.num_states,
        "num_tokens": stats.num_tokens,
        "num_truncated": stats.num_truncated,
        "num_clipped": stats.num_clipped,
        "size_bytes": stats.size_bytes,
        "stores_text": manifest.stores_text,
    }


def _cut_short(exc: Exception, received: Received) -> Response:
    found = errors.problem(exc)
    if found is None:
        raise exc
    kept = received.num["stored"] + received.num["unchanged"]
    return errors.respond(
        errors.Problem(
            found.status,
            found.kind,
            found.code,
            f"{found.message} ({kept} passages before that are stored)",
            found.param,
            found.retry_after_seconds,
        )
    )


def _literal(value: str) -> object:
    """A query parameter as the JSON it would have been: 4, true; else the string."""
    lowered = value.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    return int(value[:MAX_DIGITS]) if value.isascii() and value.isdecimal() else value


def _json(document: object) -> Response:
    return Response(body.render(document), media_type="application/json")
