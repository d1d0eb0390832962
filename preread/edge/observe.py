"""Gives every gRPC call its id, bounds how many run, says afterwards how it went. Knows gRPC; not who listens.

The id comes in x-request-id, or is made here, and goes back in the trailing metadata of every
answer, errors too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
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
    """One log line per call."""
    log.info("call", extra=fields(method=method, code=code, seconds=round(seconds, 6)))


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
                async with _internal(short, context):
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


<<<<<<< HEAD
=======
@asynccontextmanager
async def _internal(method: str, context: Any) -> AsyncIterator[None]:
    """Ends a call that nothing else ended with INTERNAL: grpc would send the exception's own text."""
    try:
        yield
    except grpc.aio.AbortError:  # ended already, with a status
        raise
    except Exception as exc:
        log.error("%s failed: %s", method, type(exc).__name__, exc_info=exc)
        message = "internal error; the log has it under x-request-id"
        await rpc.abort(context, grpc.StatusCode.INTERNAL, message, rpc.error_info("INTERNAL"))


def connection_options(max_calls: int) -> list[tuple[str, int]]:
    """Of a server: what one connection may ask at once, and that idle ones end; gRPC does not bound their number."""
    # a few more than are admitted: a probe on the same connection should not wait
    return [("grpc.max_concurrent_streams", max_calls + SPARE), ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000)]


>>>>>>> 2b6511d (Decide by tokens what an empty text is, once for all paths)
def _code(context: Any, default: str) -> str:
    """Name of the status that was set, by abort or otherwise."""
    number = context.code()
    if isinstance(number, grpc.StatusCode):
        return number.name
    names = {status.value[0]: status.name for status in grpc.StatusCode}
    return names.get(number, default) if number else default
