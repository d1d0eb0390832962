"""How a failed gRPC call ends: a status, a message, and google.rpc details in the trailers."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from preread.errors import FailedPrecondition, PrereadError

DOMAIN = "preread"

# A client refuses trailers over 8 KiB by default and then reports RESOURCE_EXHAUSTED in place of the
# error, which travels twice: as grpc-message (up to 3 bytes per byte) and inside grpc-status-details-bin.
MAX_MESSAGE_BYTES = 1024
MAX_DETAILS_BYTES = 3072


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], code: grpc.StatusCode, message: str, *details: Message
) -> NoReturn:
    """Ends the call with an error; never returns.

    Args:
        details: google.rpc messages (`field_violation`, `error_info`, ...); left out where all
            together they would not fit into the trailers.
    """
    message = shorten(message, MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    if status.ByteSize() > MAX_MESSAGE_BYTES + MAX_DETAILS_BYTES:
        del status.details[:]
    rich = rpc_status.to_status(status)
    # What is there already (the request's id) stays: abort would replace it.
    trailers = (*rich.trailing_metadata, *(context.trailing_metadata() or ()))
    await context.abort(rich.code, rich.details, trailers)
    raise AssertionError("abort returned")


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: PrereadError) -> NoReturn:
    """Ends the call with an error of the shared tree, its details included; preread.wire reads them back."""
    message, details = str(error), list[Message]()
    details += [field_violation(one.field, one.description) for one in error.violations]
    if error.reason:
        details.append(error_info(error.reason, **dict(error.metadata)))
    if isinstance(error, FailedPrecondition):
        details.append(precondition(error.reason, error.subject, message))
    if error.resource_type:
        details.append(resource_info(error.resource_type, error.resource_name, message))
    if error.retry_after_seconds is not None:
        details.append(retry_after(error.retry_after_seconds))
    await abort(context, grpc.StatusCode[error.code], message, *details)


def field_violation(field: str, description: str) -> error_details_pb2.BadRequest:
    """INVALID_ARGUMENT: which field, and what was expected of it."""
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=field, description=shorten(description, MAX_MESSAGE_BYTES)
    )
    return error_details_pb2.BadRequest(field_violations=[violation])


def error_info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    """Any error: a constant for machines (UPPER_SNAKE_CASE) and what it is about."""
    return error_details_pb2.ErrorInfo(
        reason=reason, domain=DOMAIN, metadata={key: shorten(value, 256) for key, value in metadata.items()}
    )


def resource_info(kind: str, name: str, description: str = "") -> error_details_pb2.ResourceInfo:
    """NOT_FOUND, ALREADY_EXISTS: what was looked for (`collection`, `model`)."""
    return error_details_pb2.ResourceInfo(
        resource_type=kind, resource_name=shorten(name, 256), description=shorten(description, MAX_MESSAGE_BYTES)
    )


def precondition(kind: str, subject: str, description: str) -> error_details_pb2.PreconditionFailure:
    """FAILED_PRECONDITION: what must change before the call can succeed."""
    violation = error_details_pb2.PreconditionFailure.Violation(
        type=kind, subject=shorten(subject, 256), description=shorten(description, MAX_MESSAGE_BYTES)
    )
    return error_details_pb2.PreconditionFailure(violations=[violation])


def retry_after(seconds: float) -> error_details_pb2.RetryInfo:
    """RESOURCE_EXHAUSTED, UNAVAILABLE: when to come back."""
    delay = Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def shorten(text: str, max_bytes: int) -> str:
    """The text, or its beginning and an ellipsis, in at most `max_bytes` of UTF-8."""
    data = text[: max_bytes + 1].encode(errors="replace")
    if len(data) <= max_bytes:
        return data.decode()
    return data[: max_bytes - 3].decode(errors="ignore") + "…"
