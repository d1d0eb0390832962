# ruff: noqa: N818 - the names say what happened; `PrereadError` already says that it is an error.
"""Every way a call can fail: raised by both servers, sent as a status with details, raised again by the client.

PrereadError                  .code, .reason, .metadata, .address
├── InvalidRequest            a field is out of range; .path, .violations; also a ValueError
├── NotFound                  no such collection or model; .resource_type, .resource_name
├── FailedPrecondition        another encoder's collection, a missing passage under on_miss="fail"; .reason
├── Unauthenticated           no key, or a wrong one
├── PermissionDenied          the key does not allow this
├── Overloaded                the queue is full; .retry_after_seconds
├── Unavailable               no connection, a server that starts or drains, or its store does not answer
├── DeadlineExceeded          the time limit passed before the response
├── Cancelled                 the call was cancelled
└── ServerError               anything else: a fault of the server, not of the request

An argument of another type than the field's is a TypeError. A candidate that cannot be scored is no error: its
result has a status. Imports no gRPC; preread.wire and the edges of the servers translate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypedDict, Unpack

Path = tuple[str | int, ...]  # of a field: ("candidates", 3, "text")

MAX_SHOWN_CHARS = 200  # of a value in a message: a caller may have sent megabytes of it


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a rejected request, and what was expected of it."""

    field: str
    description: str


class ErrorDetails(TypedDict, total=False):
    """The details of an error next to its message; google.rpc's error details."""

    code: str
    reason: str
    metadata: tuple[tuple[str, str], ...]
    violations: tuple[FieldViolation, ...]
    resource_type: str
    resource_name: str
    retry_after_seconds: float | None
    address: str


class PrereadError(Exception):
    """Base of everything a call can raise."""

    status: ClassVar[str] = "UNKNOWN"  # of the class: gRPC's status code by name

    def __init__(self, message: str, **details: Unpack[ErrorDetails]) -> None:
        super().__init__(message)
        self.code = details.get("code", self.status)
        self.reason = details.get("reason", "")
        self.metadata = details.get("metadata", ())
        self.violations = details.get("violations", ())
        self.resource_type = details.get("resource_type", "")
        self.resource_name = details.get("resource_name", "")
        self.retry_after_seconds = details.get("retry_after_seconds")  # None: no hint
        self.address = details.get("address", "")  # of the server that sent the error; "": raised here

    @classmethod
    def received(cls, message: str, **details: Unpack[ErrorDetails]) -> Self:
        """The error as a server sent it."""
        error = cls.__new__(cls, message)
        PrereadError.__init__(error, message, **details)
        return error

    def __reduce__(self) -> Any:
        return _rebuilt, (type(self), str(self), self.__dict__)


class InvalidRequest(PrereadError, ValueError):
    """A field of the request is out of range."""

    status = "INVALID_ARGUMENT"
    path: Path = ()  # of the field; (): as .violations say
    value: object = None
    expected = ""

    def __init__(self, path: str | Path, value: object, expected: str) -> None:
        self.path = (path,) if isinstance(path, str) else path
        self.value, self.expected = value, expected
        shown = value[:MAX_SHOWN_CHARS] if isinstance(value, str) else value
        message = f"{self.field} is {shown!r}; expected {expected}"
        super().__init__(message, violations=(FieldViolation(self.field, message),))

    @property
    def field(self) -> str:
        """The path as the protobuf messages name it: `candidates[3].text`."""
        return field_name(self.path)


class NotFound(PrereadError):
    """No such collection or model."""

    status = "NOT_FOUND"

    def __init__(self, resource_type: str, resource_name: str, message: str) -> None:
        super().__init__(message, resource_type=resource_type, resource_name=resource_name)


class FailedPrecondition(PrereadError):
    """The request contradicts the state of the service; `reason` is a constant for machines."""

    status = "FAILED_PRECONDITION"

    path: Path = ()  # of the candidate in the way; (): the message names its subject
    said = ""  # the message, less the path

    def __init__(self, reason: str, subject: str, message: str, *, path: Path = ()) -> None:
        self.path, self.said = path, message
        field = field_name(path)
        message = f"{field} {message}" if path else message
        super().__init__(message, reason=reason, metadata=(("subject", subject or field),))

    @property
    def subject(self) -> str:
        """The thing whose state is in the way: a collection, a candidate."""
        return dict(self.metadata).get("subject", "")


class Unauthenticated(PrereadError):
    """The key is missing or wrong."""

    status = "UNAUTHENTICATED"


class PermissionDenied(PrereadError):
    """The key does not allow this call."""

    status = "PERMISSION_DENIED"


class Overloaded(PrereadError):
    """The queue of the server is full."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_seconds: float | None = None, *, reason: str = "") -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds, reason=reason)


class Unavailable(PrereadError):
    """No server answers at the address, or the server cannot answer now."""

    status = "UNAVAILABLE"


class DeadlineExceeded(PrereadError):
    """The time limit of the call passed."""

    status = "DEADLINE_EXCEEDED"


class Cancelled(PrereadError):
    """The call was cancelled."""

    status = "CANCELLED"


class ServerError(PrereadError):
    """A fault of the server."""


_CLASSES: dict[str, type[PrereadError]] = {cls.status: cls for cls in PrereadError.__subclasses__()}
_CLASSES |= {"OUT_OF_RANGE": InvalidRequest, "UNKNOWN": ServerError}


def class_of(code: str) -> type[PrereadError]:
    """The class that a status code, by name, is raised as."""
    return _CLASSES.get(code, ServerError)


def field_name(path: Path) -> str:
    """A path as text: `candidates[3].text`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _rebuilt(cls: type[PrereadError], message: str, attributes: dict[str, Any]) -> PrereadError:
    error = cls.__new__(cls, message)
    error.__dict__ |= attributes
    return error
