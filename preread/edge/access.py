"""Turns away gRPC calls that bring no key, or one that may not do this. Knows which method needs which scope.

Health and reflection are open: probes carry no keys, and the services are described in the repository anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from preread import rpc
from preread.edge.handlers import replaced
from preread.edge.keys import ApiKeys, Scope, bearer

log = logging.getLogger(__name__)

OPEN = ("/grpc.health.v1.", "/grpc.reflection.v1")
# The last matching beginning decides; what is not listed needs a key that may do everything.
SCOPES: dict[str, tuple[Scope, ...]] = {
    "/preread.v1.RerankService/": (Scope.RERANK,),
    "/tei.v1.": (Scope.RERANK,),
    "/preread.v1.EncoderService/Encode": (Scope.RERANK, Scope.INDEX),
    "/preread.v1.EncoderService/Describe": (Scope.RERANK, Scope.INDEX),
    "/preread.v1.EncoderService/Upsert": (Scope.INDEX,),
    "/preread.v1.EncoderService/GetStats": (Scope.INDEX,),
}


def scopes_of(method: str) -> tuple[Scope, ...]:
    """Any one of these lets a key call the method."""
    return next((scopes for start, scopes in reversed(SCOPES.items()) if method.startswith(start)), (Scope.ADMIN,))


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in grpc-stubs only
    """UNAUTHENTICATED without a known key, PERMISSION_DENIED without the scope."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or not self._keys.required or method.startswith(OPEN):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        key = self._keys.find(bearer(str(metadata.get("authorization", ""))))
        if key is None:
            log.warning("a call of %s without a known key", method)
            return _refusing(
                handler,
                grpc.StatusCode.UNAUTHENTICATED,
                "API_KEY_REQUIRED",
                "authorization is missing or not a key of this server; expected Bearer KEY",
            )
        scopes = scopes_of(method)
        if not key.may(*scopes):
            needed = " or ".join(scope.value for scope in scopes)
            log.warning("key %s may not call %s", key.key_id, method)
            return _refusing(
                handler,
                grpc.StatusCode.PERMISSION_DENIED,
                "SCOPE_REQUIRED",
                f"this key has not the scope {needed}, which {method} needs",
            )
        return handler


def _refusing(handler: Any, code: grpc.StatusCode, reason: str, message: str) -> Any:
    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await rpc.abort(context, code, message, rpc.error_info(reason))

    return replaced(handler, refuse)
