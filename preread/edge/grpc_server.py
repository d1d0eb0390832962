"""Common parts of both servers' gRPC ports: interceptors in their order, limits, and the services of every port."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from preread.edge.access import AccessInterceptor
from preread.edge.keys import ApiKeys
from preread.edge.messages import MessageInterceptor
from preread.edge.observe import ObservingInterceptor, OnCall

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
