# ruff: noqa: N818 - the names say what happened; `PrereadError` already says that it is an error.
"""What a call can raise.

PrereadError                  .code, .reason, .metadata: google.rpc's own words
├── InvalidRequest            a field is out of range; .violations says which and why; also a ValueError
├── NotFound                  no such collection or model; .resource_type, .resource_name
├── FailedPrecondition        another encoder's collection, a missing passage under on_miss="fail"
├── Unauthenticated           no key, or a wrong one
├── PermissionDenied          the key does not allow this
├── Overloaded                the queue is full; .retry_after_seconds says when to come back
├── Unavailable               nobody answers, or the server starts or drains, or its store is away
├── DeadlineExceeded          `timeout` passed before the answer
├── Cancelled                 the call was cancelled
└── ServerError               anything else: a fault of the server, not of the request

An argument of another type than the field's is a TypeError.

Knows gRPC's error shapes; does not decide what is tried again (preread.channel does).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo

DETAILS_KEY = "grpc-status-details-bin"


class PrereadError(Exception):
    """Base of everything a client raises for a call."""

    def __init__(self, message: str, code: str = "UNKNOWN", details: ErrorDetails | None = None) -> None:
        super().__init__(message)
        details = details or ErrorDetails()
        self.code = code  # gRPC's status code by name
        self.reason = details.reason
        self.metadata = details.metadata
        self.violations = details.violations
        self.resource_type = details.resource_type
        self.resource_name = details.resource_name
        self.retry_after_seconds = details.retry_after_seconds  # None: the server gave no hint


class InvalidRequest(PrereadError, ValueError):
    """A field of the request is out of range, said by the server, or by the client where no message can carry it."""


class NotFound(PrereadError):
    """No such collection or model."""


class FailedPrecondition(PrereadError):
    """The request contradicts the state of the service."""


class Unauthenticated(PrereadError):
    """The server does not know who calls."""


class PermissionDenied(PrereadError):
    """The server knows, and says no."""


class Overloaded(PrereadError):
    """The server has too much to do."""


class Unavailable(PrereadError):
    """Nobody answers at the address, or the server cannot answer now."""


class DeadlineExceeded(PrereadError):
    """The call's time was up."""


class Cancelled(PrereadError):
    """The call was cancelled."""


class ServerError(PrereadError):
    """A fault of the server."""


_CLASSES: dict[str, type[PrereadError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "NOT_FOUND": NotFound,
    "FAILED_PRECONDITION": FailedPrecondition,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a refused request, and what was expected of it."""

    field: str
    description: str


@dataclass(frozen=True)
class ErrorDetails:
    """google.rpc error details, unpacked."""

    reason: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    violations: tuple[FieldViolation, ...] = ()
    resource_type: str = ""
    resource_name: str = ""
    retry_after_seconds: float | None = None


class _FailedCall(Protocol):
    """What grpc's sync and async errors have in common; its stubs do not say so."""

    def code(self) -> grpc.StatusCode | None: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def translate(error: grpc.RpcError, address: str) -> PrereadError:
    """The typed form of a failed call."""
    call = cast(_FailedCall, error)
    code = call.code() or grpc.StatusCode.UNKNOWN
    message = call.details() or code.name
    details = _unpack(call.trailing_metadata() or ())
    if code is grpc.StatusCode.UNAVAILABLE:
        message = f"{address}: {message}"
    return _CLASSES.get(code.name, ServerError)(message, code.name, details)


def _unpack(metadata: Iterable[tuple[str, str | bytes]]) -> ErrorDetails:
    details = ErrorDetails()
    for key, value in metadata:
        if key != DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:  # some proxy's own; the status code has to do
            continue
        for item in status.details:
            details = replace(details, **_detail_fields(item))
    return details


def _detail_fields(item: Any) -> dict[str, Any]:
    """One google.protobuf.Any -> fields of ErrorDetails; kinds we have no use for give none."""
    info, request, resource = ErrorInfo(), BadRequest(), ResourceInfo()
    retry = RetryInfo()
    if item.Unpack(info):
        return {"reason": info.reason, "metadata": tuple(sorted(info.metadata.items()))}
    if item.Unpack(request):
        return {"violations": tuple(FieldViolation(v.field, v.description) for v in request.field_violations)}
    if item.Unpack(resource):
        return {"resource_type": resource.resource_type, "resource_name": resource.resource_name}
    if item.Unpack(retry):
        return {"retry_after_seconds": retry.retry_delay.ToTimedelta().total_seconds()}
    return {}
