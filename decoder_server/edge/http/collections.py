"""Collections over HTTP: the encoder worker writes passages, since only it can encode; the store is described directly.

An upload is one JSON document, or NDJSON read line by line as it arrives. Lines are read no faster than the worker
takes passages, so that its backpressure reaches the client's socket.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Annotated, Any, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType, field
from starlette.responses import Response

from cache.errors import CollectionNotFound
from cache.record import check_name
from decoder_server.edge.engines import collection_infos
from decoder_server.edge.http import names
from decoder_server.edge.http.dialect_request import Size
from decoder_server.edge.http.json_steps import parse
from decoder_server.edge.http.json_values import Count, RawText, Text, read
from decoder_server.edge.http.openapi import JSON, Operation
from decoder_server.edge.http.request import EXPECTED, HttpRequest, Problem, respond
from decoder_server.edge.word_search import MAX_RESULTS
from decoder_server.engine.collections import MAX_PAGE_SIZE, PAGE_SIZE, drop_throwaway, list_ids
from preread import Passage, UpsertResult
from preread.errors import InvalidRequest, Path
from preread.values import CollectionInfo, join_title
from preread_edge.access import permits, require
from preread_edge.steps import Pauses, Step, stepped

NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines")
NUM_RESULTS = 10  # of a search that says nothing else
IDS_AT_ONCE = 1000  # of one call of the worker
MAX_DIGITS = 20  # of a count, whose greatest has fewer
MAX_REFUSED_SHOWN = 1000  # the response to an endless stream is not endless

T = TypeVar("T")


# Lists of hundreds of thousands are read in steps: the struct has their values as they are.
_Ids = Annotated[list[Any], Meta(extra_json_schema={"items": {"type": "string"}})] | None
_PASSAGE = {"items": {"$ref": "#/components/schemas/_Passage"}}


class _Passage(Struct, kw_only=True):
    id: Text | None = None
    other_id: Text | None = field(name="_id", default=None)
    passage_id: Text | None = None
    title: RawText | None = None
    text: RawText


_COLUMNS = dict.fromkeys(names.fields_of(_Passage)).keys()
_ID_COLUMNS = _COLUMNS - {"title", "text"}


class _UploadSettings(Struct, kw_only=True):
    compression_ratio: Count | None = None
    codec: Text | None = None
    store_text: bool | None = None


class _UploadObject(_UploadSettings, kw_only=True, forbid_unknown_fields=True):
    passages: Annotated[list[Any], Meta(extra_json_schema=_PASSAGE)] | None = None


class _Refused(Struct, kw_only=True):
    id: Annotated[str | UnsetType, Meta(description="Absent: a line too long to read")] = UNSET
    message: str


class _Upload(Struct, kw_only=True, tag_field="object", tag="collection.upload"):
    """Acknowledgements of the worker, counted."""

    collection: str
    num_stored: Size = 0
    num_unchanged: Size = 0
    num_refused: Size = 0
    num_truncated: Size = 0
    num_clipped: Size = 0
    refused: list[_Refused]

    def add(self, result: UpsertResult) -> None:
        self.num_stored += result.status == "stored"
        self.num_unchanged += result.status == "unchanged"
        self.num_truncated += result.truncated
        self.num_clipped += result.num_clipped
        if result.status == "refused":
            self.num_refused += 1
            if len(self.refused) < MAX_REFUSED_SHOWN:
                self.refused.append(_Refused(id=result.passage_id or UNSET, message=result.message))


class _DeleteRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    ids: _Ids = None
    passage_ids: _Ids = None


class _Deleted(Struct, kw_only=True, tag_field="object", tag="collection.deleted"):
    collection: str
    num_deleted: Size


class _Collection(Struct, kw_only=True, tag_field="object", tag="collection"):
    id: str
    aliases: list[str]
    checkpoint: str  # of the encoder, under the same names, up to dim
    fingerprint: str
    dim: Size
    compression_ratio: Size  # under the same names in CollectionInfo, like the rest
    codec: str
    num_passages: Size
    num_states: Size
    num_tokens: Size
    num_truncated: Size
    num_clipped: Size
    size_bytes: Size
    stores_text: bool


class _Collections(Struct, kw_only=True, tag_field="object", tag="list"):
    data: list[_Collection]


class _PassageId(Struct, kw_only=True):
    id: str


class _PassageIds(Struct, kw_only=True, tag_field="object", tag="list"):
    data: list[_PassageId]
    next_page_token: str  # "": this was the last page


class _PageSettings(Struct, kw_only=True):
    page_size: Count | None = None
    page_token: Text | None = None


class _SearchRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    query: Text
    top_n: Annotated[Count | None, Meta(description=f"At most {MAX_RESULTS}; 0 or absent: {NUM_RESULTS}")] = None


class _FoundPassage(Struct, kw_only=True):
    id: str
    score: Annotated[float, Meta(description="BM25: greater is better; of one collection and query")]


class _FoundPassages(Struct, kw_only=True, tag_field="object", tag="list"):
    """Passages that share a word with the query, best first."""

    collection: str
    data: list[_FoundPassage]


class _CollectionDropped(Struct, kw_only=True, tag_field="object", tag="collection.dropped"):
    collection: str
    num_passages: Size


class _AliasRow(Struct, kw_only=True):
    alias: str
    collection: str


class _Aliases(Struct, kw_only=True, tag_field="object", tag="list"):
    data: list[_AliasRow]


class _Alias(_AliasRow, kw_only=True, tag_field="object", tag="alias"):
    """An alias that was set."""


class _AliasDeleted(Struct, kw_only=True, tag_field="object", tag="alias.deleted"):
    alias: str


class _SetAliasRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    collection: Text


async def _add_passages(request: HttpRequest) -> Response:
    """Responds when the store has everything, and lists refused passages."""
    worker = request.context.encoder()
    name = check_name("collection", request.path_params["collection"])
    if request.check_written(*NDJSON) in NDJSON:
        request.check_encoding()
        settings = _from_query(request, _UploadSettings)
        items = _from_lines(request)
    else:
        if misplaced := next(iter(request.query_params.items()), None):
            raise InvalidRequest(*misplaced, "a field of the JSON object, next to passages; NDJSON has it in the query")
        document = await request.read_json()
        body = read(_UploadObject, {"passages": document} if isinstance(document, list) else document)
        if not body.passages:
            raise InvalidRequest("passages", "absent" if body.passages is None else "empty", "a list of objects")
        settings, items = body, _each(await stepped(_read_each, _passage, body.passages, "passages"))
    upload = _Upload(collection=name, refused=[])

    async def sendable() -> AsyncIterator[Passage]:
        async for item in items:
            if isinstance(item, Passage):
                yield item
            else:
                upload.add(item)

    try:
        async for result in worker.upsert(
            sendable(),
            collection=name,
            compression_ratio=settings.compression_ratio or 0,
            codec=str(settings.codec or ""),
            store_text=settings.store_text is not False,
        ):
            upload.add(result)
    except EXPECTED as exc:  # the caller should know how much was stored before
        problem = Problem.of(exc)
        problem.message += f" ({upload.num_stored + upload.num_unchanged} passages before that are stored)"
        return problem.response()
    return await respond(upload)


async def _delete_passages(request: HttpRequest) -> Response:
    """Ids are in the path, in `?id=`, or in a body's `ids`."""
    worker = request.context.encoder()
    name = check_name("collection", request.path_params["collection"])
    if "passage_id" in request.path_params:
        ids = [str(read(Text, request.path_params["passage_id"], ("passage_id",)))]
    elif "id" in request.query_params:
        ids = request.query_params.getlist("id")
    else:
        request.check_written()
        body = read(_DeleteRequest, await request.read_json())
        field, given = ("ids", body.ids) if body.ids else ("passage_ids", body.passage_ids or ())
        ids = await stepped(_read_each, lambda item, path: str(read(Text, item, path)), given, field)
    if not ids:
        raise InvalidRequest("ids", "empty", "at least one passage id")
    num_deleted = 0
    for first in range(0, len(ids), IDS_AT_ONCE):
        num_deleted += await worker.delete(ids[first : first + IDS_AT_ONCE], collection=name)
    return await respond(_Deleted(collection=name, num_deleted=num_deleted))


async def _list_collections(request: HttpRequest) -> Response:
    # Not on the threads of requests: counting takes as long as the store does.
    infos = await asyncio.to_thread(collection_infos, request.context.store)
    return await respond(_Collections(data=[_pack(info) for info in infos]))


async def _get_collection(request: HttpRequest) -> Response:
    name = check_name("collection", request.path_params["collection"])
    infos = await asyncio.to_thread(collection_infos, request.context.store)
    # An alias first: it may have taken the place of a collection of its name.
    for info in sorted(infos, key=lambda info: name not in info.aliases):
        if name in (info.name, *info.aliases):
            return await respond(_pack(info))
    raise CollectionNotFound(f"collection: no collection or alias {name!r}")


async def _list_passages(request: HttpRequest) -> Response:
    page = _from_query(request, _PageSettings)
    where = request.context.store, request.path_params["collection"], int(page.page_size or 0)
    ids, token = await asyncio.to_thread(list_ids, *where, str(page.page_token or ""))
    passages = _PassageIds(data=[_PassageId(id=one) for one in ids], next_page_token=token)
    return await respond(passages, is_large=True)


async def _search(request: HttpRequest) -> Response:
    """Passages of a collection by the words of a query: BM25 over its stored texts."""
    until, name = request.deadline(), check_name("collection", request.path_params["collection"])
    body = read(_SearchRequest, await request.read_json(until))
    top_n, limits = int(body.top_n or NUM_RESULTS), request.context.engine("").limits
    if top_n > MAX_RESULTS:
        raise InvalidRequest("top_n", top_n, f"0..{MAX_RESULTS}")
    if not body.query.strip():
        raise InvalidRequest("query", str(body.query), "words to search for")
    if (num_bytes := len(body.query.encode())) > limits.max_query_bytes:
        raise InvalidRequest("query", f"{num_bytes} bytes", f"at most {limits.max_query_bytes}")
    found = await request.while_connected(request.context.word_search.search(name, str(body.query), top_n, until))
    passages = [_FoundPassage(id=one.passage_id, score=one.score) for one in found]
    return await respond(_FoundPassages(collection=name, data=passages), is_large=True)


async def _drop_collection(request: HttpRequest) -> Response:
    name = request.path_params["collection"]
    num_passages = await asyncio.to_thread(drop_throwaway, request.context.store, name)
    return await respond(_CollectionDropped(collection=name, num_passages=num_passages))


async def _list_aliases(request: HttpRequest) -> Response:
    aliases = await asyncio.to_thread(request.context.store.aliases)
    permitted = (row for row in sorted(aliases.items()) if permits(*row))
    rows = [_AliasRow(alias=alias, collection=collection) for alias, collection in permitted]
    return await respond(_Aliases(data=rows))


async def _set_alias(request: HttpRequest) -> Response:
    request.check_written()
    alias = check_name("alias", request.path_params["alias"])
    collection = check_name("collection", str(read(_SetAliasRequest, await request.read_json()).collection))
    require(collection)
    await asyncio.to_thread(request.context.store.set_alias, alias, collection)
    return await respond(_Alias(alias=alias, collection=collection))


async def _remove_alias(request: HttpRequest) -> Response:
    alias = check_name("alias", request.path_params["alias"])
    if not await asyncio.to_thread(request.context.store.remove_alias, alias):
        raise CollectionNotFound(f"alias: there is no alias {alias!r}")
    return await respond(_AliasDeleted(alias=alias))


async def _from_lines(request: HttpRequest) -> AsyncIterator[Passage | UpsertResult]:
    """One passage per line, or its refusal; empty lines are skipped. A line over the limit is not kept."""
    config, stream = request.context.config, request.chunks()
    chunk: bytes | None = b""
    number, waited = 0, 0.0  # of lines, which errors name from 1; for the end of the present one
    rest = bytearray()  # of a line that has not ended
    too_long = False  # the part of that line that was dropped
    while chunk is not None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(config.timeout_seconds - waited):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise Problem(408, Problem.TOO_SLOW) from None
        received = b"\n" if chunk is None else chunk  # the end ends the last line too
        waited = 0.0 if b"\n" in received else waited + time.monotonic() - began
        start = len(rest)  # no line ends before
        if not start and not too_long and not received.strip():  # nothing but empty lines
            number += received.count(b"\n")
            continue
        rest += received
        pace = Pauses()
        while (end := rest.find(b"\n", start)) >= 0:
            number += 1
            too_long = too_long or end > config.max_line_bytes
            line = b"" if too_long else bytes(rest[:end]).strip()
            del rest[: end + 1]
            start = 0
            if too_long:
                yield UpsertResult("", "refused", 0, 0, False, f"line {number} is over {config.max_line_bytes} bytes")
                too_long = False
            elif line:
                yield _passage(await parse(line, f"line {number}"), (f"line {number}",))
            await pace.worked()  # many short lines arrive together
        if len(rest) > config.max_line_bytes:
            too_long = True
            rest.clear()


def _read_each(step: Step, read_one: Callable[[object, Path], T], items: Sequence[object], name: str) -> list[T]:
    found = []
    for i, item in enumerate(items):
        found.append(read_one(item, (name, i)))
        step()
    return found


async def _each(items: list[Passage | UpsertResult]) -> AsyncIterator[Passage | UpsertResult]:
    for item in items:
        yield item


def _passage(item: object, path: Path) -> Passage | UpsertResult:
    if isinstance(item, dict) and not item.keys() <= _COLUMNS:
        names.check(item, _COLUMNS, _missing(item), path)
    body = read(_Passage, item, path)
    passage_id = str(body.id or body.other_id or body.passage_id or "")
    if not passage_id:
        raise InvalidRequest((*path, "id"), "absent or empty", "the passage's id, a string")
    text = str(join_title(body.title, body.text))
    if not RawText.is_utf8(text):
        return UpsertResult(passage_id, "refused", 0, 0, False, "text is {}; expected {}".format(*RawText.HALF_A_PAIR))
    return Passage(passage_id, text)


def _missing(row: dict[str, Any]) -> names.Names:
    """Fields that a passage lacks: others of a corpus may be near misses of those that it has."""
    has_id = any(row.get(name) is not None for name in _ID_COLUMNS)
    return tuple(name for name in _COLUMNS if row.get(name) is None and not (has_id and name in _ID_COLUMNS))


def _pack(info: CollectionInfo) -> _Collection:
    own = {name: getattr(info.encoder, name) for name in _Collection.__struct_fields__[2:5]}
    own |= {name: getattr(info, name) for name in _Collection.__struct_fields__[5:]}
    return _Collection(id=info.name, aliases=list(info.aliases), **own)


def _from_query(request: HttpRequest, kind: type[T]) -> T:
    """Settings in the query string, read as the JSON they would have been: 4, true; else strings."""

    def literal(value: str) -> object:
        if value.isascii() and value.isdecimal():
            return int(value[:MAX_DIGITS])
        return {"true": True, "false": False}.get(value.lower(), value)

    return read(kind, {key: literal(value) for key, value in request.query_params.items()})


_IDS = {"id": {"description": "In place of a body; may be repeated", "type": "array", "items": {"type": "string"}}}
_TYPES = {"compression_ratio": "integer", "codec": "string", "store_text": "boolean"}
_WITH_NDJSON = {name: {"description": "With NDJSON", "type": kind} for name, kind in _TYPES.items()}
_PAGE: dict[str, dict[str, Any]] = {
    "page_size": {
        "description": f"About how many; at most {MAX_PAGE_SIZE}",
        "type": "integer",
        "default": PAGE_SIZE,
    },
    "page_token": {"description": "next_page_token of the page before", "type": "string"},
}
_COLLECTION, _ALIAS = "/v1/collections/{collection}", "/v1/aliases/{alias}"
_PASSAGES = f"{_COLLECTION}/passages"
_UPLOADS = {JSON: (("UploadRequest", _UploadObject, list[_Passage]),), NDJSON[0]: (_Passage,)}
_operation = partial(Operation, tag="collections", query={})
OPERATIONS = (
    _operation("GET", "/v1/collections", _list_collections, "Every collection of the store", answers=(_Collections,)),
    _operation("GET", _COLLECTION, _get_collection, "One collection, by name or alias", answers=(_Collection,)),
    _operation(
        "DELETE", _COLLECTION, _drop_collection, "Drop a throw-away collection of the page at /",
        answers=(_CollectionDropped,),
    ),
    _operation(
        "POST", f"{_COLLECTION}/search", _search, "Find passages by words: BM25 over the stored texts",
        "searchCollection", answers=(_FoundPassages,), bodies={JSON: (_SearchRequest,)},
    ),
    _operation(
        "GET", _PASSAGES, _list_passages, "Ids of the passages, page by page", answers=(_PassageIds,), query=_PAGE
    ),
    _operation(
        "POST", _PASSAGES, _add_passages, "Encode and store passages", answers=(_Upload,), bodies=_UPLOADS,
        query=_WITH_NDJSON,
    ),
    _operation(
        "DELETE", _PASSAGES, _delete_passages, "Delete passages by id", answers=(_Deleted,),
        bodies={JSON: (_DeleteRequest,)}, body_required=False, query=_IDS,
    ),
    _operation(
        "DELETE", _PASSAGES + "/{passage_id:path}", _delete_passages, "Delete one passage", "deletePassage",
        answers=(_Deleted,),
    ),
    _operation("GET", "/v1/aliases", _list_aliases, "Aliases and their collections", answers=(_Aliases,)),
    _operation(
        "PUT", _ALIAS, _set_alias, "Point an alias at a collection, in one step", answers=(_Alias,),
        bodies={JSON: (_SetAliasRequest,)},
    ),
    _operation("DELETE", _ALIAS, _remove_alias, "Remove an alias", answers=(_AliasDeleted,)),
)  # fmt: skip
