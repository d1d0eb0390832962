"""Gives every gRPC call its id, bounds how many run, says afterwards how it went. Knows gRPC; not who listens.

The id comes in x-request-id, or is made here, and goes back in the trailing metadata of every
answer, errors too.

Common parts of both servers' gRPC ports: interceptors in their order, limits, and the services of every port.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from preread_edge import logs as calls
from preread_edge import rpc
from preread_edge.keys import AccessInterceptor, ApiKeys
from preread_edge.logs import fields
from preread_edge.messages import MessageInterceptor
from preread_edge.rpc import function_of, replaced

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
RETRY_SECONDS = 1.0
# Probes and descriptions would drown what matters.
_OURS = ("/preread.", "/tei.")

# method as Service/Method, name of the status, seconds
OnCall = Callable[[str, str, float], None]


def log_call(method: str, code: str, seconds: float) -> None:
    """One log line per call; Describe, which servers call every few seconds, has none by default."""
    level = logging.DEBUG if method.endswith("/Describe") and code == "OK" else logging.INFO
    log.log(level, "call", extra=fields(method=method, code=code, seconds=round(seconds, 6)))


class ObservingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in grpc-stubs only
    """The outermost interceptor, so that refusals have ids and are counted too."""

    def __init__(self, *on_call: OnCall, max_calls: int) -> None:
        """
        Args:
            max_calls: at once; more are RESOURCE_EXHAUSTED. Probes are not counted.
        """
        self._on_call = on_call
        self._max_calls = max_calls
        self._num_calls = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = str(handler_call_details.method)
        if not method.startswith(_OURS):
            return await continuation(handler_call_details)
        metadata = dict(handler_call_details.invocation_metadata or ())
        # Before the inner interceptors, so that what they log has the id.
        request_id, traceparent = (str(metadata.get(name, "")) for name in (REQUEST_ID, "traceparent"))
        call = calls.begin(request_id, traceparent, method.removeprefix("/"))
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        function = function_of(handler)
        short = method.rpartition("/")[0].rpartition(".")[2] + "/" + method.rpartition("/")[2]

        async def observed(request: Any, context: Any) -> Any:
            with self._observed(short, call, context):
                await self._admit(context)
                return await function(request, context)

        return replaced(handler, observed)

    async def _admit(self, context: Any) -> None:
        if self._num_calls > self._max_calls:
            message = f"too many calls at once; the limit is {self._max_calls}"
            await rpc.abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, message, rpc.retry_after(RETRY_SECONDS))

    @contextmanager
    def _observed(self, method: str, call: calls.Call, context: Any) -> Iterator[None]:
        started = time.monotonic()
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        code = "UNKNOWN"
        self._num_calls += 1
        try:
            yield
            code = _code(context, "OK")
        except asyncio.CancelledError:
            code = _code(context, "CANCELLED")
            raise
        except BaseException:
            code = _code(context, "UNKNOWN")
            raise
        finally:
            self._num_calls -= 1
            for on_call in self._on_call:
                on_call(method, code, time.monotonic() - started)


def _code(context: Any, default: str) -> str:
    """Name of the status that was set, by abort or otherwise."""
    number = context.code()
    if isinstance(number, grpc.StatusCode):
        return number.name
    names = {status.value[0]: status.name for status in grpc.StatusCode}
    return names.get(number, default) if number else default


REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
SPARE = 8
IDLE_SECONDS = 600  # a connection without a call is closed then; clients open another when they need one
# Of keepalive pings that come closer together, a connection is closed at the third. Clients send one every ten seconds
# at most, by gRPC's own advice; networks bring some of them closer together.
PING_SECONDS = 5.0


def make_server(
    keys: ApiKeys,
    on_call: Sequence[OnCall],
    *,
    max_calls: int,
    max_request_bytes: int,
    max_response_bytes: int,
    options: Iterable[tuple[str, int]] = (),
) -> grpc.aio.Server:
    """A server without services.

    Args:
        max_calls: at once.
        max_request_bytes: of one message, also once it is decompressed.
        options: further arguments of gRPC's.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_ended_by_grpc)  # adding it again changes nothing
    return grpc.aio.server(
        # The outermost first: every call is counted, then its key is checked, and only then is a message read.
        interceptors=(
            ObservingInterceptor(*on_call, max_calls=max_calls),
            AccessInterceptor(keys),
            MessageInterceptor(),
        ),
        options=[
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.max_send_message_length", max_response_bytes),
            ("grpc.so_reuseport", 0),  # a taken port should be an error, not a shared one
            # a few more than are admitted: a probe on the same connection should not wait
            ("grpc.max_concurrent_streams", max_calls + SPARE),
            # gRPC does not bound the number of connections
            ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
            # gRPC's defaults end a call that is quiet for longer than a few pings: one in five minutes is allowed, or
            # one in two hours where no call runs
            ("grpc.http2.min_ping_interval_without_data_ms", int(PING_SECONDS * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            *options,
        ],
    )


def add_standard_services(server: grpc.aio.Server, servicer: health.aio.HealthServicer, names: Iterable[str]) -> None:  # type: ignore[name-defined]  # missing in grpc-stubs
    """Health, and reflection of it and of the services `names`, for clients of either version of reflection."""
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    described = [*names, health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1]
    reflector = reflection.aio.ReflectionServicer(described)  # type: ignore[attr-defined]  # missing in grpc-stubs
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflector, server)
    _describe_reflection_v1()
    method = grpc.stream_stream_rpc_method_handler(
        reflector.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))


def _describe_reflection_v1() -> None:
    """Puts reflection's version 1 among the known descriptors: version 1alpha under another name.

    grpcio-reflection has 1alpha only, which clients are giving up.
    """
    pool = descriptor_pool.Default()
    name = "grpc/reflection/v1/reflection.proto"
    try:
        pool.FindFileByName(name)
    except KeyError:
        file = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
        file.name, file.package = name, "grpc.reflection.v1"
        file.options.Clear()
        (method,) = file.service[0].method
        fields = [field for message in file.message_type for field in message.field if field.type_name]
        for typed, attribute in [(method, "input_type"), (method, "output_type")] + [(f, "type_name") for f in fields]:
            setattr(typed, attribute, getattr(typed, attribute).replace("v1alpha", "v1"))
        pool.AddSerializedFile(file.SerializeToString())


def _ended_by_grpc(record: logging.LogRecord) -> bool:
    """One line in place of gRPC's traceback where a method has returned and its call had ended before.

    That is so when a message of a stream is over the size limit or badly compressed: the method sees the stream's end.
    """
    if record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError):
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args = f"{record.getMessage()}: the call had ended before", ()
        record.exc_info = None
    return True
