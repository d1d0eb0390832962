"""Protobuf from and to the values of preread.types and preread.errors; no other file of the client knows messages."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Protocol, TypeVar, cast, get_args

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo

from preread import arguments
from preread.errors import ErrorDetails, FieldViolation, PrereadError, class_of
from preread.types import (
    CollectionInfo,
    Degraded,
    EncoderIdentity,
    EncoderInfo,
    ModelInfo,
    OnMiss,
    Passage,
    Reranking,
    RerankOptions,
    Result,
    Stage,
    StageScore,
    Status,
    Summary,
    TierUse,
    Timings,
    UpsertResult,
    UpsertStatus,
    Warmed,
    parse_stages,
)
from preread.v1 import common_pb2, encoder_pb2, rerank_pb2

T = TypeVar("T")

IDS_PER_DELETE = 10_000  # 5 MB where each has the 512 bytes that an id may have
# An upsert message goes out when either is reached: small enough to be acknowledged soon, large enough to batch.
MAX_PASSAGES_PER_MESSAGE = 64
MAX_CHARACTERS_PER_MESSAGE = 1 << 20
# Both end an upsert: grpc.aio cancels the call when the passages raise.
ENDED_BY_GRPC = (grpc.RpcError, asyncio.CancelledError)

Passages = Iterable[Passage | Mapping[str, Any]]
AsyncPassages = Passages | AsyncIterable[Passage | Mapping[str, Any]]


def pack_request(query: str, candidates: Iterable[Any], options: RerankOptions) -> rerank_pb2.RerankRequest:
    """A plain string is an id where a collection is named, else a text.

    Raises:
        TypeError, InvalidRequest: an argument that cannot be put on the wire.
    """
    unknown = options.keys() - RerankOptions.__optional_keys__
    if unknown:
        raise TypeError(f"unknown arguments {sorted(unknown)}; known: {sorted(RerankOptions.__optional_keys__)}")
    on_miss = options.get("on_miss")
    if on_miss is not None and on_miss not in get_args(OnMiss):
        raise arguments.invalid("on_miss", ascii(on_miss), f"{', '.join(get_args(OnMiss))} or None")
    collection = arguments.optional_text("collection", options.get("collection"))
    checked = (
        arguments.candidate(i, candidate, is_id=bool(collection))
        for i, candidate in enumerate(arguments.many("candidates", candidates))
    )
    return rerank_pb2.RerankRequest(
        query=arguments.text("query", query),
        instruction=arguments.text_or_absent("instruction", options.get("instruction")),
        candidates=[rerank_pb2.Candidate(passage_id=one.passage_id, text=one.text) for one in checked],
        collection=collection,
        top_n=arguments.integer("top_n", options.get("top_n")),
        compression_ratio=arguments.integer("compression_ratio", options.get("compression_ratio")),
        on_miss=f"ON_MISS_{on_miss.upper() if on_miss else 'UNSPECIFIED'}",
        return_text=arguments.flag("return_text", options.get("return_text", False)),
        model=arguments.optional_text("model", options.get("model")),
        stages=_pack_stages(options.get("stages")),
    )


def _pack_stages(stages: object) -> list[rerank_pb2.Stage]:
    if not stages:
        return []
    if isinstance(stages, str):
        try:
            stages = parse_stages(stages)
        except ValueError as exc:
            raise arguments.invalid("stages", ascii(stages), f"stages that fit ({exc})") from exc
    packed = []
    for i, stage in enumerate(arguments.many("stages", stages)):
        if not isinstance(stage, Stage):
            raise TypeError(f"stages[{i}] is {arguments.show(stage)}; expected a Stage")
        ratio = arguments.integer(f"stages[{i}].compression_ratio", stage.compression_ratio)
        keep = arguments.integer(f"stages[{i}].keep", stage.keep)
        packed.append(rerank_pb2.Stage(compression_ratio=ratio, keep=keep))
    return packed


def pack_warm(
    passage_ids: Iterable[str], collection: str, instruction: str | None, compression_ratio: int, model: str
) -> rerank_pb2.WarmRequest:
    """
    Raises:
        TypeError, InvalidRequest: an argument that cannot be put on the wire.
    """
    return rerank_pb2.WarmRequest(
        collection=arguments.text("collection", collection),
        passage_ids=arguments.texts("passage_ids", passage_ids),
        instruction=arguments.text_or_absent("instruction", instruction),
        compression_ratio=arguments.integer("compression_ratio", compression_ratio),
        model=arguments.optional_text("model", model),
    )


def pack_deletes(passage_ids: Iterable[str], collection: str) -> list[encoder_pb2.DeleteRequest]:
    """One request per IDS_PER_DELETE ids, at least one: a server bounds the fields of a message.

    Raises:
        TypeError, InvalidRequest: an argument that cannot be put on the wire.
    """
    name, ids = arguments.text("collection", collection), arguments.texts("passage_ids", passage_ids)
    return [
        encoder_pb2.DeleteRequest(collection=name, passage_ids=ids[start : start + IDS_PER_DELETE])
        for start in range(0, max(len(ids), 1), IDS_PER_DELETE)
    ]


def pack_stats(collection: str) -> encoder_pb2.GetStatsRequest:
    """
    Raises:
        TypeError, InvalidRequest: an argument that cannot be put on the wire.
    """
    return encoder_pb2.GetStatsRequest(collection=arguments.optional_text("collection", collection))


class Upload:
    """The messages of an upsert stream, sync or async. `error` is the exception that the caller's passages raised.

    gRPC reads a stream on its own thread or task and would end the call with CANCELLED or UNKNOWN instead.
    """

    def __init__(
        self, passages: AsyncPassages, collection: str, compression_ratio: int, codec: str, store_text: bool
    ) -> None:
        """
        Raises:
            TypeError, InvalidRequest: an argument that cannot be put on the wire; a passage raises when it is read.
        """
        self.error: Exception | None = None
        self._passages = passages if isinstance(passages, AsyncIterable) else arguments.many("passages", passages)
        self._settings: dict[str, Any] = {
            "collection": arguments.text("collection", collection),
            "compression_ratio": arguments.integer("compression_ratio", compression_ratio),
            "codec": arguments.optional_text("codec", codec),
            "store_text": arguments.flag("store_text", store_text),
        }
        self._waiting: list[encoder_pb2.Passage] = []
        self._num_read = 0
        self._num_characters = 0

    def __iter__(self) -> Iterator[encoder_pb2.UpsertRequest]:
        with self._remembering():
            if not isinstance(self._passages, Iterable):
                raise TypeError(f"passages is {arguments.show(self._passages)}; only AsyncClient reads it")
            for passage in self._passages:
                if self._add(passage):
                    yield self._message()
            if self._waiting:
                yield self._message()

    async def __aiter__(self) -> AsyncIterator[encoder_pb2.UpsertRequest]:
        if not isinstance(self._passages, AsyncIterable):
            for message in self:
                yield message
            return
        with self._remembering():
            async for passage in self._passages:
                if self._add(passage):
                    yield self._message()
            if self._waiting:
                yield self._message()

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            self.error = exc
            raise

    def _add(self, passage: Passage | Mapping[str, Any]) -> bool:
        """True: the message is full."""
        passage_id, text = arguments.passage(self._num_read, passage)
        self._num_read += 1
        self._waiting.append(encoder_pb2.Passage(passage_id=passage_id, text=text))
        self._num_characters += len(text)
        return len(self._waiting) >= MAX_PASSAGES_PER_MESSAGE or self._num_characters >= MAX_CHARACTERS_PER_MESSAGE

    def _message(self) -> encoder_pb2.UpsertRequest:
        message = encoder_pb2.UpsertRequest(passages=self._waiting, **self._settings)
        self._waiting, self._num_characters = [], 0
        return message


def _unpack(kind: Callable[..., T], message: Any, **given: Any) -> T:
    """The dataclass `kind` from the message's fields of the same names, and from `given`."""
    names = _common_names(kind, message.DESCRIPTOR)
    return kind(**{name: getattr(message, name) for name in names if name not in given}, **given)


@functools.cache
def _common_names(kind: Any, descriptor: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind) if field.name in descriptor.fields_by_name)


def unpack_response(message: rerank_pb2.RerankResponse) -> Reranking:
    return Reranking(unpack_results(message.results), unpack_summary(message))


def unpack_results(messages: Iterable[rerank_pb2.Result]) -> tuple[Result, ...]:
    return tuple(
        Result(  # there may be thousands: written out, it takes a fifth less time
            index=m.index,
            passage_id=m.passage_id,
            status=cast(Status, _enum_word(common_pb2.CandidateStatus, m.status, "CANDIDATE_STATUS_")),
            score=m.score if m.HasField("score") else None,
            margin=m.margin if m.HasField("margin") else None,
            text=m.text if m.HasField("text") else None,
            message=m.message,
            num_states=m.num_states,
            compression_ratio=m.compression_ratio,
            truncated=m.truncated,
            stages=tuple(_unpack(StageScore, stage) for stage in m.stages),
        )
        for m in messages
    )


def unpack_summary(message: rerank_pb2.RerankResponse | rerank_pb2.RerankStreamResponse.Summary) -> Summary:
    degraded = message.degraded
    return _unpack(
        Summary,
        message,
        timings=_unpack(Timings, message.timings),
        stages=_unpack_stages(message.stages),
        degraded=_unpack(Degraded, degraded, stages=_unpack_stages(degraded.stages))
        if message.HasField("degraded")
        else None,
    )


def _unpack_stages(messages: Iterable[rerank_pb2.Stage]) -> tuple[Stage, ...]:
    return tuple(_unpack(Stage, message) for message in messages)


def unpack_warmed(message: rerank_pb2.WarmResponse) -> Warmed:
    tiers = tuple(_unpack(TierUse, tier) for tier in message.tiers)
    return _unpack(Warmed, message, missing_ids=tuple(message.missing_ids), tiers=tiers)


def unpack_model(message: rerank_pb2.ModelInfo) -> ModelInfo:
    encoder = _unpack(EncoderIdentity, message.encoder) if message.HasField("encoder") else None
    return _unpack(ModelInfo, message, encoder=encoder)


def unpack_collection(message: common_pb2.CollectionInfo) -> CollectionInfo:
    encoder = _unpack(EncoderIdentity, message.encoder)
    return _unpack(CollectionInfo, message, encoder=encoder, aliases=tuple(message.aliases))


def unpack_encoder(message: encoder_pb2.DescribeResponse) -> EncoderInfo:
    return _unpack(EncoderInfo, message, encoder=_unpack(EncoderIdentity, message.encoder))


def unpack_upserts(message: encoder_pb2.UpsertResponse) -> Iterator[UpsertResult]:
    for m in message.results:
        status = cast(UpsertStatus, _enum_word(encoder_pb2.UpsertStatus, m.status, "UPSERT_STATUS_"))
        yield _unpack(UpsertResult, m, status=status)


@functools.cache
def _enum_word(enum: object, value: int, prefix: str) -> str:
    """CANDIDATE_STATUS_TOO_LONG -> too_long; a value of a newer server reads as unspecified."""
    try:
        name: str = enum.Name(value)  # type: ignore[attr-defined]  # protobuf's enum wrappers share no public type
    except ValueError:
        return "unspecified"
    return name.removeprefix(prefix).lower()


class _FailedCall(Protocol):
    """The common part of grpc's sync and async errors; its stubs do not declare it."""

    def code(self) -> grpc.StatusCode | None: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def translate(error: grpc.RpcError, address: str) -> PrereadError:
    """The typed form of a failed call."""
    call = cast(_FailedCall, error)
    code = call.code() or grpc.StatusCode.UNKNOWN
    message = call.details() or code.name
    if code is grpc.StatusCode.UNAVAILABLE:
        message = f"{address}: {message}"
    details = _error_details(call.trailing_metadata() or ()) | {"code": code.name, "address": address}
    return class_of(code.name).received(message, **cast(ErrorDetails, details))


def _error_details(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, Any]:
    details: dict[str, Any] = {}
    for key, value in metadata:
        if key != "grpc-status-details-bin" or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:  # some proxy's own; the status code has to do
            continue
        for item in status.details:
            details |= _error_detail(item)
    return details


def _error_detail(item: Any) -> dict[str, Any]:
    """One google.protobuf.Any of a google.rpc detail; other kinds give nothing."""
    info, request, resource, retry = ErrorInfo(), BadRequest(), ResourceInfo(), RetryInfo()
    if item.Unpack(info):
        return {"reason": info.reason, "metadata": tuple(sorted(info.metadata.items()))}
    if item.Unpack(request):
        return {"violations": tuple(FieldViolation(v.field, v.description) for v in request.field_violations)}
    if item.Unpack(resource):
        return {"resource_type": resource.resource_type, "resource_name": resource.resource_name}
    if item.Unpack(retry):
        return {"retry_after_seconds": retry.retry_delay.ToTimedelta().total_seconds()}
    return {}
