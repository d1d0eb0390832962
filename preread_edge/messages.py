"""One place where bytes of a gRPC call become messages, on every method of both servers.

Every method reads raw bytes from a stream, unary ones too, so a key is checked and a call counted before its first
byte is read. Then, per message: bounds of its structure, and parsing. An error here or in the method's own code
ends the call with a status, and never with the text of an exception.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from preread_edge import rpc
from preread_edge.rpc import function_of, reading_raw
from preread_edge.steps import SMALL_BYTES, Pace, Step, stepped

log = logging.getLogger(__name__)

MAX_FIELDS = 250_000  # of a message, those of its submessages too: of a candidate, three
_SIZES = {1: 8, 3: 0, 4: 0, 5: 4}  # by wire type, of what needs no look at the bytes
MESSAGE_SECONDS = 120.0  # until the message of a unary call is complete; a caller who stalls would hold a place


class InvalidMessage(Exception):  # noqa: N818
    """A message that is not parsed, or cannot be. The text goes to the caller."""

    def __init__(self, message: str, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.code = code


class MessageInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in grpc-stubs only
    """The innermost interceptor. INVALID_ARGUMENT for what is no message, INTERNAL for an exception of the method."""

    def __init__(self, *, message_seconds: float = MESSAGE_SECONDS) -> None:
        """
        Args:
            message_seconds: a unary call whose message is not complete by then is DEADLINE_EXCEEDED.
        """
        self._message_seconds = message_seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        function = function_of(handler)

        async def call(raw: AsyncIterator[bytes], context: Any) -> Any:
            try:
                messages = _parsed(raw, handler.request_deserializer)
                request = messages if handler.request_streaming else await self._only(messages)
                answer = function(request, context)
                if not inspect.isasyncgen(answer):
                    return await answer
                async with aclosing(answer):
                    async for response in answer:
                        await context.write(response)
            except InvalidMessage as exc:
                await _refuse(context, method, exc)
            except grpc.aio.BaseError:  # the call has ended: by abort, or because the caller left
                raise
            except Exception:
                log.exception("%s: unexpected error", method)
                message = "internal error; the server's log has it under this call's x-request-id"
                await rpc.abort(context, grpc.StatusCode.INTERNAL, message, rpc.error_info("INTERNAL"))

        return reading_raw(handler, call)

    async def _only(self, messages: AsyncIterator[Any]) -> Any:
        try:
            async with asyncio.timeout(self._message_seconds):
                return await anext(messages)
        except StopAsyncIteration:
            raise InvalidMessage("the call ended without a message; expected one") from None
        except TimeoutError:
            message = f"no whole message within {self._message_seconds:g} s; expected one"
            raise InvalidMessage(message, grpc.StatusCode.DEADLINE_EXCEEDED) from None


async def _parsed(raw: AsyncIterator[bytes], parse: Callable[[bytes], Any] | None) -> AsyncIterator[Any]:
    async for data in raw:
        if len(data) <= SMALL_BYTES or parse is None:
            yield _parse(data, parse)
        else:
            yield await stepped(_parse_large, data, parse)


async def _refuse(context: Any, method: str, error: InvalidMessage) -> None:
    try:
        await rpc.abort(context, error.code, str(error), rpc.error_info("INVALID_MESSAGE"))
    except grpc.aio.AbortError:
        log.warning("%s: %s", method, error)
        raise
    except grpc.aio.InternalError:
        # gRPC has ended the call already, and shows its messages as none: one was over the limit, or not as its
        # compression says. Nothing more can be sent.
        context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
        log.warning("%s: a message is over the size limit or badly compressed", method)
        raise asyncio.CancelledError from None


def _parse_large(step: Step, data: bytes, parse: Callable[[bytes], Any]) -> Any:
    described = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
    _count_fields(step, data, described)
    return _parse(data, parse)


def _count_fields(step: Step, data: bytes, described: Any) -> None:
    """Bounds what a message is made of, before anything is: 64 MiB may hold 33 million empty submessages.

    Ends quietly where the bytes are no message: parsing ends there too.

    Raises:
        InvalidMessage: more than MAX_FIELDS.
    """
    num_fields = 0
    at, end, nested = 0, len(data), _nested(described)
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
                raise InvalidMessage(text)
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
    """One message of several of its type: protobuf reads the bytes of each behind the other as one.

    The cost of a message of many texts is spread over turns of the event loop.
    """
    parts: list[bytes] = []
    pace = Pace()
    for message in messages:
        parts.append(message.SerializeToString())
        await pace.worked()
    return b"".join(parts)


def _parse(data: bytes, parse: Callable[[bytes], Any] | None) -> Any:
    if parse is None:
        return data
    try:
        return parse(data)
    except DecodeError:
        described = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
        expected = getattr(described, "full_name", "protobuf")
        raise InvalidMessage(f"a message of {len(data)} bytes cannot be parsed; expected {expected}") from None
