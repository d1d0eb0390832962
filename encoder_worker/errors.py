"""What ends a call of the worker, and how each error reads on the wire.

Knows gRPC and the cache's errors; decides nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message

from cache.errors import (
    CacheError,
    CodecError,
    CollectionExists,
    CollectionNotFound,
    EncoderMismatch,
    InvalidName,
    StoreFull,
    StoreLocked,
    StoreUnavailable,
)
from preread_edge import rpc

RETRY_SECONDS = 1.0

Context = grpc.aio.ServicerContext[Any, Any]


class InvalidRequest(Exception):  # noqa: N818 - says what happened
    """One field of a request is out of range."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field} is {value!r:.100}; expected {expected}")
        self.field = field


class FailedPrecondition(Exception):  # noqa: N818
    """The request cannot be served in the present state; `reason` is a constant for machines."""

    def __init__(self, reason: str, subject: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.subject = subject


class Overloaded(Exception):  # noqa: N818
    """Too much is under way."""


class Starting(Exception):  # noqa: N818
    """The model is not loaded yet, or the worker is stopping."""


@asynccontextmanager
async def translated(context: Context, collection: str = "") -> AsyncIterator[None]:
    """Ends the call with a status and google.rpc details where the body raises one of our errors.

    collection: what the call is about, for the details; the message has it in any case.
    """
    try:
        yield
    except (InvalidRequest, FailedPrecondition, Overloaded, Starting, CacheError) as exc:
        code, *details = _status(exc, collection)
        await rpc.abort(context, code, str(exc), *details)


def _status(error: Exception, collection: str) -> tuple[grpc.StatusCode, *tuple[Message, ...]]:
    code, message = grpc.StatusCode, str(error)
    match error:
        case InvalidRequest():
            return code.INVALID_ARGUMENT, rpc.field_violation(error.field, message)
        case InvalidName():
            return code.INVALID_ARGUMENT, rpc.field_violation("collection", message)
        case CodecError():
            return code.INVALID_ARGUMENT, rpc.field_violation("codec", message)
        case CollectionNotFound():
            return code.NOT_FOUND, rpc.resource_info("collection", collection, message)
        case EncoderMismatch():
            return _precondition("ENCODER_MISMATCH", collection, message)
        case CollectionExists():
            return _precondition("COLLECTION_SETTINGS", collection, message)
        case FailedPrecondition():
            return _precondition(error.reason, error.subject, message)
        case Overloaded():
            return code.RESOURCE_EXHAUSTED, rpc.error_info("OVERLOADED"), rpc.retry_after(RETRY_SECONDS)
        case StoreFull():
            return code.RESOURCE_EXHAUSTED, rpc.error_info("STORE_FULL", collection=collection)
        case Starting() | StoreUnavailable() | StoreLocked():
            return code.UNAVAILABLE, rpc.retry_after(RETRY_SECONDS)
        case _:  # damaged, not ours to read, of an unknown version
            return _precondition("STORE_UNUSABLE", collection, message)


def _precondition(reason: str, subject: str, message: str) -> tuple[grpc.StatusCode, Message, Message]:
    info = rpc.error_info(reason, subject=subject)
    return grpc.StatusCode.FAILED_PRECONDITION, info, rpc.precondition(reason, subject, message)
