"""gRPC handlers of the same shape with another function inside. Knows gRPC only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

_MAKERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
_FIELDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


def function_of(handler: Any) -> Callable[..., Any]:
    """What a handler calls."""
    function: Callable[..., Any] = getattr(handler, _FIELDS[_shape(handler)])
    return function


def replaced(handler: Any, function: Callable[..., Any]) -> Any:
    """The handler with `function` in place of its own: same streams, same (de)serializers."""
    return _MAKERS[_shape(handler)](function, handler.request_deserializer, handler.response_serializer)


def reading_raw(handler: Any, function: Callable[..., Any]) -> Any:
    """A handler that gives `function` the request's messages as an iterator of bytes, also where there is only one.

    gRPC calls it when the call begins, where it would otherwise wait for the message and parse it first. A caller
    cannot tell the difference: on the wire both are the same. Its responses are messages, or their bytes.
    """
    serialize = handler.response_serializer

    def serialized(response: Any) -> bytes:
        data: bytes = response if isinstance(response, bytes) else serialize(response)
        return data

    return _MAKERS[True, bool(handler.response_streaming)](function, None, serialized)


def _shape(handler: Any) -> tuple[bool, bool]:
    return bool(handler.request_streaming), bool(handler.response_streaming)
