"""How a failed gRPC call ends: a status, a message, and google.rpc details in the trailers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, PreconditionFailure, ResourceInfo, RetryInfo
from grpc_status import rpc_status

from preread.errors import FailedPrecondition, PrereadError

DOMAIN = "preread"

# A client refuses trailers over 8 KiB by default and then reports RESOURCE_EXHAUSTED in place of the
# error, which travels twice: as grpc-message (up to 3 bytes per byte) and inside grpc-status-details-bin.
MAX_MESSAGE_BYTES = 1024
MAX_DETAILS_BYTES = 3072
MAX_NAME_BYTES = 256


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: PrereadError) -> NoReturn:
    """Ends the call with an error and its details, which preread.wire reads back; never returns.

    Details are left out where all together they would not fit into the trailers.
    """
    status = status_pb2.Status(code=grpc.StatusCode[error.code].value[0], message=_shorten(str(error)))
    for detail in _details(error):
        status.details.add().Pack(detail)
    if status.ByteSize() > MAX_MESSAGE_BYTES + MAX_DETAILS_BYTES:
        del status.details[:]
    rich = rpc_status.to_status(status)
    # What is there already (the request's id) stays: abort would replace it.
    trailers = (*rich.trailing_metadata, *(context.trailing_metadata() or ()))
    await context.abort(rich.code, rich.details, trailers)
    raise AssertionError("abort returned")


def _details(error: PrereadError) -> Iterator[Message]:
    for one in error.violations:
        violation = BadRequest.FieldViolation(field=one.field, description=_shorten(one.description))
        yield BadRequest(field_violations=[violation])
    if error.reason:
        metadata = {key: _shorten(value, MAX_NAME_BYTES) for key, value in error.metadata}
        yield ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    if isinstance(error, FailedPrecondition):
        subject, description = _shorten(error.subject, MAX_NAME_BYTES), _shorten(str(error))
        failure = PreconditionFailure.Violation(type=error.reason, subject=subject, description=description)
        yield PreconditionFailure(violations=[failure])
    if error.resource_type:
        name, description = _shorten(error.resource_name, MAX_NAME_BYTES), _shorten(str(error))
        yield ResourceInfo(resource_type=error.resource_type, resource_name=name, description=description)
    if error.retry_after_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        yield RetryInfo(retry_delay=delay)


def _shorten(text: str, max_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """The text, or its beginning and an ellipsis, in at most `max_bytes` of UTF-8."""
    data = text[: max_bytes + 1].encode(errors="replace")
    return data.decode() if len(data) <= max_bytes else data[: max_bytes - 3].decode(errors="ignore") + "…"
