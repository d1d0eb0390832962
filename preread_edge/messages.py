"""Bytes of a gRPC call to messages and back; long ones in steps, so that others get their turn."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from google.protobuf.message import DecodeError, Message

from preread.errors import InvalidRequest
from preread_edge.steps import SMALL_BYTES, Pauses, Step, stepped

MAX_FIELDS = 250_000  # of a message, those of its submessages too: of a candidate, three
INVALID_MESSAGE = "INVALID_MESSAGE"  # reason of an error about bytes, not about fields
_SIZES = {1: 8, 3: 0, 4: 0, 5: 4}  # by wire type, of what needs no look at the bytes


async def parsed(raw: AsyncIterator[bytes], parse: Callable[[bytes], Any] | None) -> AsyncIterator[Any]:
    """
    Raises:
        InvalidRequest: bytes that are no message, or one of too many fields.
    """
    async for data in raw:
        if len(data) <= SMALL_BYTES or parse is None:
            yield _parse(data, parse)
        else:
            yield await stepped(_parse_large, data, parse)


def _parse_large(step: Step, data: bytes, parse: Callable[[bytes], Any]) -> Any:
    described = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
    _count_fields(step, data, described)
    return _parse(data, parse)


def _count_fields(step: Step, data: bytes, described: Any) -> None:
    """Bounds what a message is made of, before anything is: 64 MiB may hold 33 million empty submessages.

    Ends quietly where the bytes are no message: parsing ends there too.

    Raises:
        InvalidRequest: more than MAX_FIELDS.
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
    """One message of several of its type: protobuf reads the bytes of each behind the other as one.

    The cost of a message of many texts is spread over turns of the event loop.
    """
    parts: list[bytes] = []
    pace = Pauses()
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
        message = f"a message of {len(data)} bytes cannot be parsed; expected {expected}"
        raise InvalidRequest.received(message, reason=INVALID_MESSAGE) from None
