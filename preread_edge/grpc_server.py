"""The gRPC port of either server: the way of every call to its method, its messages, limits, and services.

Keys come before messages: every method reads raw bytes from a stream, unary ones too, which look the same on the wire.
An error of preread.errors ends the call with its status and details, any other with INTERNAL and without its text.
"""

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, PreconditionFailure, ResourceInfo, RetryInfo
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from preread.errors import DeadlineExceeded, FailedPrecondition, InvalidRequest, Overloaded, PrereadError, ServerError
from preread.values import REQUEST_ID
from preread_edge import logs
from preread_edge.access import ApiKeys, Scope, join
from preread_edge.settings import ServerConfig
from preread_edge.steps import SMALL_BYTES, Pauses, Step, stepped

log = logging.getLogger(__name__)

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
# Of keepalive pings that come closer together, a connection is closed at the third. Clients send one every ten seconds
# at most, by gRPC's own advice; networks bring some of them closer together.
PING_SECONDS = 5.0
# A client refuses trailers over 8 KiB by default and then reports RESOURCE_EXHAUSTED in place of the
# error, which travels twice: as grpc-message (up to 3 bytes per byte) and inside grpc-status-details-bin.
MAX_MESSAGE_BYTES, MAX_DETAILS_BYTES, MAX_NAME_BYTES = 1024, 3072, 256
_COUNTED = ("/preread.", "/tei.")  # calls that are counted and logged; probes and descriptions would drown them

OnCall = Callable[[str, str, float], None]  # method as Service/Method, name of the status, seconds


@dataclass(eq=False)
class _CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in grpc-stubs only
    """The way of every call to its method."""

    _keys: ApiKeys
    _on_call: OnCall
    _max_calls: int
    _message_seconds: float
    _num_calls: int = 0

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)

        async def call(raw: AsyncIterator[bytes], context: Any) -> Any:
            with self._counted(method, context) if method.startswith(_COUNTED) else nullcontext():
                try:
                    return await self._run(method, handler, raw, context)
                except PrereadError as error:
                    await _end(context, method, error)
                except grpc.aio.BaseError:  # the call has ended: by abort, or because the caller left
                    raise
                except Exception:
                    log.exception("%s: unexpected error", method)
                    message = "internal error; the server's log has it under this call's x-request-id"
                    await _end(context, method, ServerError(message, code="INTERNAL", reason="INTERNAL"))

        def serialized(response: Any) -> bytes:
            return response if isinstance(response, bytes) else handler.response_serializer(response)

        streams, unary = grpc.stream_stream_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        return (streams if handler.response_streaming else unary)(call, None, serialized)

    async def _run(self, method: str, handler: Any, raw: AsyncIterator[bytes], context: Any) -> Any:
        if self._num_calls > self._max_calls and method.startswith(_COUNTED):
            raise Overloaded(f"too many calls at once; the limit is {self._max_calls}", retry_after_seconds=1.0)
        authorization = str(dict(context.invocation_metadata() or ()).get("authorization", ""))
        self._keys.check(authorization, Scope.needed_by(method), method)
        request = messages = _parsed(raw, handler.request_deserializer)
        if not handler.request_streaming:
            try:
                async with asyncio.timeout(self._message_seconds):
                    request = await anext(messages)
            except StopAsyncIteration:
                problem = "the call ended without a message; expected one"
                raise InvalidRequest.received(problem, reason=INVALID_MESSAGE) from None
            except TimeoutError:
                problem = f"no whole message within {self._message_seconds:g} s; expected one"
                raise DeadlineExceeded(problem, reason=INVALID_MESSAGE) from None
        shape = ("stream" if one else "unary" for one in (handler.request_streaming, handler.response_streaming))
        response = getattr(handler, "_".join(shape))(request, context)
        if not inspect.isasyncgen(response):
            return await response
        async with aclosing(response):
            async for message in response:
                await context.write(message)
        return None

    @contextmanager
    def _counted(self, method: str, context: Any) -> Iterator[None]:
        metadata = dict(context.invocation_metadata() or ())
        request_id, traceparent = (str(metadata.get(name, "")) for name in (REQUEST_ID, "traceparent"))
        call = logs.begin(request_id, traceparent, method.removeprefix("/"))
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        started, code = time.monotonic(), "UNKNOWN"
        self._num_calls += 1
        try:
            yield
            code = "OK"
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        finally:
            self._num_calls -= 1
            if status := context.code():  # set by abort or otherwise
                names = {one.value[0]: one.name for one in grpc.StatusCode}
                code = status.name if isinstance(status, grpc.StatusCode) else names.get(status, code)
            self._on_call(method.rpartition(".")[2], code, time.monotonic() - started)


async def _end(context: Any, method: str, error: PrereadError) -> None:
    """Ends the call with an error and, where they fit into the trailers, its details, which preread.wire reads back."""
    status = status_pb2.Status(code=grpc.StatusCode[error.code].value[0], message=_shorten(str(error)))
    for one in error.violations:
        violation = BadRequest.FieldViolation(field=one.field, description=_shorten(one.description))
        status.details.add().Pack(BadRequest(field_violations=[violation]))
    if error.reason:
        metadata = {key: _shorten(value, MAX_NAME_BYTES) for key, value in error.metadata}
        status.details.add().Pack(ErrorInfo(reason=error.reason, domain="preread", metadata=metadata))
    if isinstance(error, FailedPrecondition):
        subject = _shorten(error.subject, MAX_NAME_BYTES)
        failure = PreconditionFailure.Violation(type=error.reason, subject=subject, description=status.message)
        status.details.add().Pack(PreconditionFailure(violations=[failure]))
    if error.resource_type:
        kind, name = error.resource_type, _shorten(error.resource_name, MAX_NAME_BYTES)
        status.details.add().Pack(ResourceInfo(resource_type=kind, resource_name=name, description=status.message))
    if error.retry_after_seconds is not None:
        seconds, rest = divmod(int(error.retry_after_seconds * 1e9), 10**9)
        status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=seconds, nanos=rest)))
    if status.ByteSize() > MAX_MESSAGE_BYTES + MAX_DETAILS_BYTES:
        del status.details[:]
    rich = rpc_status.to_status(status)
    # What is there already (the request's id) stays: abort would replace it.
    trailers = (*rich.trailing_metadata, *(context.trailing_metadata() or ()))
    try:
        await context.abort(rich.code, rich.details, trailers)
    except grpc.aio.AbortError:
        if error.reason == INVALID_MESSAGE:
            log.warning("%s: %s", method, error)
        raise
    except grpc.aio.InternalError:
        if error.reason != INVALID_MESSAGE:
            raise
        # gRPC has ended the call already, and shows its messages as none: one was over the limit, or not as its
        # compression says. Nothing more can be sent.
        context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
        log.warning("%s: a message is over the size limit or badly compressed", method)
        raise asyncio.CancelledError from None


def _shorten(text: str, max_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """The text, or its beginning and an ellipsis, in at most `max_bytes` of UTF-8."""
    data = text[: max_bytes + 1].encode(errors="replace")
    return data.decode() if len(data) <= max_bytes else data[: max_bytes - 3].decode(errors="ignore") + "…"


def make_server(
    keys: ApiKeys,
    on_call: OnCall,
    *,
    max_calls: int,
    max_request_bytes: int,
    max_response_bytes: int,
    message_seconds: float = 120.0,  # until the one message of a call is complete: a stalled caller holds a place
    options: Iterable[tuple[str, int]] = (),
) -> grpc.aio.Server:
    """A server without services. `max_calls` run at once, probes not counted; bytes are those after decompression."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_ended_by_grpc)  # adding it again changes nothing
    return grpc.aio.server(
        interceptors=[_CallInterceptor(keys, on_call, max_calls, message_seconds)],
        options=[
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.max_send_message_length", max_response_bytes),
            ("grpc.so_reuseport", 0),  # a taken port should be an error, not a shared one
            ("grpc.max_concurrent_streams", max_calls + 8),  # a probe on the same connection should not wait
            ("grpc.max_connection_idle_ms", 600_000),  # gRPC does not bound their number; clients open another one
            # gRPC's defaults end a call that is quiet for longer than a few pings: one in five minutes is allowed, or
            # one in two hours where no call runs
            ("grpc.http2.min_ping_interval_without_data_ms", int(PING_SECONDS * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            *options,
        ],
    )


def listen(server: grpc.aio.Server, config: ServerConfig, port: int) -> int:
    """The port that was bound, with TLS where there are files; OSError: it is taken, or a file is of no use."""
    address = join(config.host, port)
    hint = f", and are {config.tls_cert_file} and {config.tls_key_file} a pair?" if config.tls_cert_file else "?"
    try:
        if not config.tls_cert_file:
            return int(server.add_insecure_port(address))
        pair = (Path(config.tls_key_file).read_bytes(), Path(config.tls_cert_file).read_bytes())
        authority = Path(config.tls_client_ca_file).read_bytes() if config.tls_client_ca_file else None
        credentials = grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as exc:
        raise OSError(f"cannot listen on {address}: is the port taken{hint}") from exc


def add_standard_services(server: grpc.aio.Server, servicer: Any, names: Iterable[str]) -> None:
    """Health, and reflection of it and of the services `names`, in both versions; grpcio-reflection has 1alpha only."""
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    described = [*names, health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1]
    reflector = reflection.aio.ReflectionServicer(described)  # type: ignore[attr-defined]  # missing in grpc-stubs
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflector, server)
    pool, name = descriptor_pool.Default(), "grpc/reflection/v1/reflection.proto"
    try:
        pool.FindFileByName(name)
    except KeyError:  # version 1 is 1alpha under another name
        alpha = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
        text = text_format.MessageToString(alpha).replace("v1alpha", "v1")
        file = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
        file.name = name
        file.options.Clear()
        pool.AddSerializedFile(file.SerializeToString())
    parse = reflection_pb2.ServerReflectionRequest.FromString
    serialize = reflection_pb2.ServerReflectionResponse.SerializeToString
    method = grpc.stream_stream_rpc_method_handler(reflector.ServerReflectionInfo, parse, serialize)
    handler = grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))


def _ended_by_grpc(record: logging.LogRecord) -> bool:
    """One line for a traceback: a message was too large or badly compressed, and its method saw the stream's end."""
    if record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError):
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args, record.exc_info = f"{record.getMessage()}: the call had ended before", (), None
    return True


MAX_FIELDS = 250_000  # of a message, those of its submessages too: of a candidate, three
INVALID_MESSAGE = "INVALID_MESSAGE"  # reason of an error about bytes, not about fields
_SIZES = {1: 8, 3: 0, 4: 0, 5: 4}  # by wire type, of what needs no look at the bytes


async def _parsed(raw: AsyncIterator[bytes], parse: Callable[[bytes], Any] | None) -> AsyncIterator[Any]:
    """The messages; raises InvalidRequest for bytes that are none, or hold too many fields."""
    async for data in raw:
        if parse is None or len(data) <= SMALL_BYTES:
            yield data if parse is None else _parse(None, data, parse)
        else:
            yield await stepped(_parse, data, parse)


def _parse(step: Step | None, data: bytes, parse: Callable[[bytes], Any]) -> Any:
    described = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
    if step is not None:
        _count_fields(step, data, described)
    try:
        return parse(data)
    except DecodeError:
        expected = getattr(described, "full_name", "protobuf")
        problem = f"a message of {len(data)} bytes cannot be parsed; expected {expected}"
        raise InvalidRequest.received(problem, reason=INVALID_MESSAGE) from None


def _count_fields(step: Step, data: bytes, described: Any) -> None:
    """Raises InvalidRequest for too many fields (64 MiB may hold 33 million), not for bytes that parsing ends at."""
    num_fields, at, end, nested = 0, 0, len(data), _nested(described)
    outer: list[tuple[int, dict[int, Any]]] = []  # ends of the messages around, and what is nested in them
    try:
        while True:
            while at >= end:
                if not outer:
                    return
                end, nested = outer.pop()
            num_fields += 1
            if num_fields > MAX_FIELDS:
                text = f"a message has more than {MAX_FIELDS:,} fields; expected at most that, in all it holds"
                raise InvalidRequest.received(text, reason=INVALID_MESSAGE)
            if not num_fields % 500:
                step()
            key, at = _varint(data, at)
            kind = key & 7
            if kind == 2:
                size, at = _varint(data, at)
                if size and nested.get(key >> 3) is not None:
                    outer.append((end, nested))
                    end, nested = at + size, _nested(nested[key >> 3])
                else:
                    at += size
            elif kind == 0:
                _, at = _varint(data, at)
            else:
                at += _SIZES[kind]
    except (IndexError, KeyError):
        return


@functools.cache
def _nested(described: Any) -> dict[int, Any]:
    """The messages that a message's fields hold, by number."""
    return {field.number: field.message_type for field in described.fields if field.message_type} if described else {}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of up to ten bytes, and where it ends."""
    value = data[at]
    if value < 0x80:
        return value, at + 1
    value &= 0x7F
    for shift in range(7, 70, 7):
        at += 1
        value |= (data[at] & 0x7F) << shift
        if data[at] < 0x80:
            return value, at + 1
    raise IndexError


async def joined(messages: Iterable[Message]) -> bytes:
    """One message of several of its type, made in short turns: protobuf reads their bytes in a row as one."""
    parts, pace = list[bytes](), Pauses()
    for message in messages:
        parts.append(message.SerializeToString())
        await pace.worked()
    return b"".join(parts)
