"""Protobuf from and to the values of preread.values and preread.errors; no other file of the client knows messages."""

import asyncio
import functools
import operator
import re
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_type_hints

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo

from preread.arguments import Argument
from preread.errors import FieldViolation, InvalidRequest, PrereadError, ServerError
from preread.v1 import common_pb2, encoder_pb2, rerank_pb2
from preread.values import (
    AsyncPassages,
    Candidates,
    OnMiss,
    Passage,
    Reranking,
    RerankOptions,
    Result,
    Stage,
    StageScore,
    Summary,
    parse_stages,
)

M = TypeVar("M", bound=Message)
T = TypeVar("T")

FAILED = (grpc.RpcError, asyncio.CancelledError)  # of a stream: grpc.aio cancels a call whose passages raise
IDS_PER_DELETE = 10_000  # a server bounds the fields of a message; 5 MB where each has the 512 bytes it may have
# An upsert message goes out when either is reached: small enough to be acknowledged soon, large enough to batch.
MAX_PASSAGES_PER_MESSAGE, MAX_CHARACTERS_PER_MESSAGE = 64, 1 << 20


def pack(kind: Callable[..., M], *required: str, within: str = "", **values: object) -> M:
    """The message `kind`, of arguments that are checked by the types of its fields; TypeError, InvalidRequest.

    None leaves a text out, unless it is `required`. Errors name a field that is `within` another after it.
    """
    fields = cast(Any, kind).DESCRIPTOR.fields_by_name
    checks = {name: Argument.text if name in required else _check(fields[name]) for name in values}
    return kind(**{name: check(Argument(within + name, values[name])) for name, check in checks.items()})


@functools.cache
def _check(field: Any) -> Callable[[Argument], Any]:
    if field.message_type or field.enum_type:
        return operator.attrgetter("value")
    text: Callable[[Argument], Any] = Argument.texts if field.is_repeated else Argument.text_or_none
    return {field.TYPE_STRING: text, field.TYPE_INT32: Argument.integer, field.TYPE_BOOL: Argument.flag}[field.type]


def pack_request(query: str, candidates: Candidates, options: RerankOptions) -> rerank_pb2.RerankRequest:
    """A plain string is an id where a collection is named, else a text. Raises as `pack` does."""
    if unknown := options.keys() - RerankOptions.__optional_keys__:
        raise TypeError(f"unknown arguments {sorted(unknown)}; known: {sorted(RerankOptions.__optional_keys__)}")
    on_miss = Argument("on_miss", options.get("on_miss")).text_or_none()
    if on_miss is not None and on_miss not in get_args(OnMiss):
        raise Argument("on_miss", on_miss).invalid(ascii(on_miss), f"{', '.join(get_args(OnMiss))} or None")
    is_id = bool(Argument("collection", options.get("collection")).text_or_none())
    pairs = (one.candidate(is_id=is_id) for one in Argument("candidates", candidates).each())
    packed = [rerank_pb2.Candidate(passage_id=passage_id, text=text) for passage_id, text in pairs]
    packed_stages = [
        pack(rerank_pb2.Stage, within=f"{one.field}.", **asdict(one.value))
        for one in _stages(Argument("stages", options.get("stages")))
    ]
    values: dict[str, Any] = {name: value for name, value in options.items() if name != "timeout"}
    values |= {"query": query, "candidates": packed, "stages": packed_stages}
    values["on_miss"] = f"ON_MISS_{on_miss.upper() if on_miss else 'UNSPECIFIED'}"
    return pack(rerank_pb2.RerankRequest, "query", **values)


def pack_many(queries: Iterable[str], candidates: Candidates, options: RerankOptions) -> rerank_pb2.RerankManyRequest:
    """A request of several queries over the same candidates. Raises as `pack` does."""
    return pack(rerank_pb2.RerankManyRequest, request=pack_request("", candidates, options), queries=queries)


def _stages(given: Argument) -> list[Argument]:
    """Each a Stage, of a string or a list of them; None and "": none."""
    if given.value is None or isinstance(given.value, str):
        text = given.text_or_none() or ""
        try:
            return list(Argument("stages", parse_stages(text) if text else ()).each())
        except ValueError as exc:
            raise InvalidRequest.received(str(exc), violations=(FieldViolation(given.field, str(exc)),)) from exc
    expected = 'a string such as "32:100, 8:20, 4", or a list of Stage'
    if not isinstance(given.value, Iterable) or isinstance(given.value, Stage):
        raise given.wrong(expected)
    stages = list(given.each())
    if wrong := next((one for one in stages if not isinstance(one.value, Stage)), None):
        raise wrong.wrong("a Stage")
    return stages


class Upload:
    """The messages of an upsert stream, sync or async. gRPC, which reads it, hides the `error` of the passages."""

    def __init__(self, passages: AsyncPassages, **settings: Any) -> None:
        """`settings` are other fields of the request. Raises as `pack` does; a passage raises when it is read."""
        self.error: Exception | None = None
        self.can_repeat = True  # no message but the first was taken
        self._passages = passages if isinstance(passages, AsyncIterable) else Argument("passages", passages).items()
        self._settings = pack(encoder_pb2.UpsertRequest, "collection", **settings)
        self._waiting: list[encoder_pb2.Passage] = []
        self._num_read = self._num_characters = 0

    def __iter__(self) -> Iterator[encoder_pb2.UpsertRequest]:
        with self._remembering():
            if not isinstance(self._passages, Iterable):
                raise Argument("passages", self._passages).wrong("a list; only AsyncClient reads it")
            for passage in self._passages:
                yield from self._add(passage)
            yield from self._rest()

    async def __aiter__(self) -> AsyncIterator[encoder_pb2.UpsertRequest]:
        if not isinstance(self._passages, AsyncIterable):
            for message in self:
                yield message
            return
        with self._remembering():
            async for passage in self._passages:
                for message in self._add(passage):
                    yield message
            for message in self._rest():
                yield message

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            self.error = exc
            raise

    def _add(self, passage: Passage | Mapping[str, Any]) -> Iterator[encoder_pb2.UpsertRequest]:
        passage_id, text = Argument(f"passages[{self._num_read}]", passage).passage()
        self._num_read += 1
        self._waiting.append(encoder_pb2.Passage(passage_id=passage_id, text=text))
        self._num_characters += len(text)
        if len(self._waiting) >= MAX_PASSAGES_PER_MESSAGE or self._num_characters >= MAX_CHARACTERS_PER_MESSAGE:
            yield from self._rest()

    def _rest(self) -> Iterator[encoder_pb2.UpsertRequest]:
        if self._waiting:
            message = encoder_pb2.UpsertRequest(passages=self._waiting)
            message.MergeFrom(self._settings)
            self._waiting, self._num_characters = [], 0
            yield message


def unpack(kind: Callable[..., T], message: Any, **more: object) -> T:
    """The dataclass `kind` from a message whose fields have the same names, and `more`; others have a default.

    An unset field is None where the dataclass says so, a repeated one a tuple, and an enum its word: `stored`.
    """
    return kind(**{name: convert(message) for name, convert in _converters(kind, message.DESCRIPTOR)}, **more)


@functools.cache
def _converters(kind: Any, descriptor: Any) -> list[tuple[str, Callable[[Any], Any]]]:
    hints, fields = get_type_hints(kind), descriptor.fields_by_name.items()
    return [(name, _converter(field, hints[name])) for name, field in fields if name in hints]


def _converter(field: Any, hint: Any) -> Callable[[Any], Any]:
    """From a message to the value of one of its fields, which a dataclass declares as `hint`."""
    get = operator.attrgetter(field.name)
    kind: Any = next(filter(is_dataclass, (hint, *get_args(hint))), None)
    if field.enum_type is not None:
        words = _words(field.enum_type)
        return lambda message: words.get(get(message), "unspecified")
    if field.is_repeated:
        return lambda message: tuple(unpack(kind, one) if kind else one for one in get(message))
    if kind is None:
        return get
    may_be_none = type(None) in get_args(hint)
    return lambda message: None if may_be_none and not message.HasField(field.name) else unpack(kind, get(message))


def _words(enum: Any) -> dict[int, Any]:
    """{4: "too_long"} for CANDIDATE_STATUS_TOO_LONG = 4; a value of a newer server is not in it."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {value.number: value.name.removeprefix(prefix).lower() for value in enum.values}


_STATUSES = _words(common_pb2.CandidateStatus.DESCRIPTOR)


def unpack_reranking(response: rerank_pb2.RerankResponse, request_id: str) -> Reranking:
    return Reranking(unpack_results(response.results), unpack(Summary, response), request_id)


def unpack_results(messages: Iterable[rerank_pb2.Result]) -> tuple[Result, ...]:
    """There may be thousands: written out, they take two thirds of the time of `unpack`."""
    return tuple(
        Result(
            index=m.index,
            passage_id=m.passage_id,
            status=_STATUSES.get(m.status, "unspecified"),
            score=m.score if m.HasField("score") else None,
            margin=m.margin if m.HasField("margin") else None,
            text=m.text if m.HasField("text") else None,
            message=m.message,
            num_states=m.num_states,
            compression_ratio=m.compression_ratio,
            truncated=m.truncated,
            stages=tuple(unpack(StageScore, stage) for stage in m.stages),
            found_in=m.found_in,
            found_id=m.found_id,
        )
        for m in messages
    )


@contextmanager
def ending(call: Any, upload: Upload | None = None) -> Iterator[None]:
    """Ends a stream with the block, also where its reader leaves early; raises what went wrong with its passages."""
    try:
        yield
    except FAILED:
        if upload is not None and upload.error is not None:
            raise upload.error from None
        raise
    finally:
        call.cancel()


# What gRPC itself says where no server has: while it connects, and about a call that it ends. The first match counts.
_CONNECTING = re.compile("connections to all|failed to connect to all addresses|errors resolving|DNS ")
_ENDING = re.compile(
    r"(?i)socket|connection|recvmsg|sendmsg|reset|goaway|pipe|stream|keepalive|\bping|endpoint|transport|EOF|cancelling"
)
_TOO_LARGE = re.compile(r"(Sent|Received) message larger .* \((\d+) vs\. (\d+)")
_CONNECT_FAILURES = (
    ("errors resolving|DNS resolution", "UNREACHABLE", "its name has no address"),
    ("Connection refused", "UNREACHABLE", "nothing listens there"),
    ("No such file", "UNREACHABLE", "there is no such socket"),
    ("unreachable|No route", "UNREACHABLE", "there is no way to that host"),
    ("Failed parsing HTTP/2", "NOT_GRPC", "what listens there does not speak gRPC"),
    ("WRONG_VERSION_NUMBER", "NOT_TLS", "what listens there does not use TLS"),
    ("certificate has expired", "TLS", "its certificate has expired"),
    ("CERTIFICATE_VERIFY_FAILED", "UNTRUSTED", "no authority that is trusted here signed its certificate"),
    ("Hostname Verification", "TLS", "its certificate is for another name"),
    ("security handshaker", "TLS", "the PEM files given for TLS hold no certificate, or not its key"),
    (
        "Socket closed|recvmsg|Connection reset|EOF",
        "CLOSED",
        "it closes the connection, as one with TLS does to plain text",
    ),
    ("", "UNREACHABLE", "no connection was made"),
)


class Unanswered(NamedTuple):
    """Why no server answered a call, in words that are not gRPC's."""

    code: str
    reason: str  # a constant
    words: str  # of what the server did not do
    was_sent: bool = True  # perhaps, and so perhaps with its id in the server's log


def translate(error: grpc.RpcError, address: str, request_id: str) -> tuple[PrereadError, bool]:
    """The typed form of a failed call, and whether a server answered it: gRPC's own errors come without metadata.

    Its caller did not cancel it: where gRPC says so, the call ended with its server.
    """
    call: Any = error  # grpc's stubs declare nothing of what its sync and async errors have in common
    code = (call.code() or grpc.StatusCode.UNKNOWN).name
    trailers = tuple(call.trailing_metadata() or ())
    message, details = call.details() or code, {"address": address}
    if found := unanswered(error):
        code, details["reason"], message = found.code, found.reason, f"the server at {address} {found.words}"
        request_id = request_id if found.was_sent else ""
    elif code == "UNAVAILABLE":
        message = f"{address}: {message}"
    details |= {"code": code, "request_id": request_id}
    for key, value in trailers:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            with suppress(DecodeError):  # some proxy's own; the status code has to do
                for item in status_pb2.Status.FromString(value).details:
                    details |= _error_detail(item)
    answered = bool(trailers or tuple(call.initial_metadata() or ()))
    return PrereadError.by_status.get(code, ServerError).received(message, **details), answered


def unanswered(error: grpc.RpcError) -> Unanswered | None:
    """Why no server answered; None: the error's message is the server's own."""
    call: Any = error
    code, message = (call.code() or grpc.StatusCode.UNKNOWN).name, call.details() or ""
    if tuple(call.trailing_metadata() or ()):
        return None
    match code:
        case "UNAVAILABLE" if _CONNECTING.match(message):
            found = ((reason, seen) for pattern, reason, seen in _CONNECT_FAILURES if re.search(pattern, message))
            reason, seen = next(found)
            return Unanswered(code, reason, f"could not be reached: {seen}", was_sent=False)
        case "UNAVAILABLE" if _ENDING.search(message):
            return Unanswered(code, "UNREACHABLE", "did not answer: the connection was lost")
        case "CANCELLED":
            return Unanswered("UNAVAILABLE", "UNREACHABLE", "ended the call, as one that stops does")
        case "DEADLINE_EXCEEDED":
            return Unanswered(code, "NO_ANSWER", "did not answer within the time limit")
        case "RESOURCE_EXHAUSTED" if sizes := _TOO_LARGE.match(message):
            kind, size, most = "asked" if sizes[1] == "Sent" else "answered", int(sizes[2]), int(sizes[3])
            words = f"was to be {kind} with {size:,} bytes; expected at most max_message_bytes, {most:,}"
            return Unanswered(code, "MESSAGE_SIZE", words)
    if message.startswith("Received http2 header"):
        words = "could not be reached: what listens there answers in HTTP, not in gRPC"
        return Unanswered(code, "NOT_GRPC", words)
    if message in ("Method not found!", "Method not implemented!"):
        words = "does not know this call: it is older than this client, or a server of another kind"
        return Unanswered(code, "UNKNOWN_CALL", words)
    return None


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
