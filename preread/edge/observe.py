"""Gives every gRPC call its id, bounds how many run, says afterwards how it went. Knows gRPC; not who listens.

The id comes in x-request-id, or is made here, and goes back in the trailing metadata of every
answer, errors too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from preread import rpc
from preread.edge import calls
from preread.edge.handlers import function_of, replaced
from preread.edge.logs import fields

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
