# ruff: noqa: N818 - the names say what happened; `PrereadError` already says that it is an error.
"""Every way a call can fail: raised by both servers, sent as a status with details, raised again by the client.

A candidate that cannot be scored is no error: its result has a status. Imports no gRPC.
"""

import copyreg
from dataclasses import dataclass
from typing import Any, ClassVar, Self

Path = tuple[str | int, ...]  # of a field: ("candidates", 3, "text")

MAX_SHOWN_CHARS = 200  # of a value in a message: a caller may have sent megabytes of it


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a rejected request, and what was expected of it."""

    field: str
    description: str


class PrereadError(Exception):
    """Base of everything a call can raise; .code, .reason, .metadata, .address, .request_id."""

    status: ClassVar[str] = "UNKNOWN"  # of the class: gRPC's status code by name
    by_status: ClassVar[dict[str, "type[PrereadError]"]] = {}  # ServerError for any other

    def __init_subclass__(cls, *, status: str = "") -> None:
        if status:
            cls.status = status
            cls.by_status[status] = cls

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        reason: str = "",
        metadata: tuple[tuple[str, str], ...] = (),
        violations: tuple[FieldViolation, ...] = (),
        resource_type: str = "",
        resource_name: str = "",
        retry_after_seconds: float | None = None,  # None: no hint
        address: str = "",  # of the server that sent the error; "": raised here
        request_id: str = "",  # under which the server's log has the call; "": none got it
    ) -> None:
        super().__init__(message)
        self.code, self.reason, self.metadata, self.violations = code or self.status, reason, metadata, violations
        self.resource_type, self.resource_name = resource_type, resource_name
        self.retry_after_seconds, self.address, self.request_id = retry_after_seconds, address, request_id

    @property
    def message(self) -> str:
        """The error in words, without the request's id."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message} (request {self.request_id})" if self.request_id else self.message

    @classmethod
    def received(cls, message: str, **details: Any) -> Self:
        """The error as a server sent it; `details` are the arguments of PrereadError."""
        error = cls.__new__(cls, message)
        PrereadError.__init__(error, message, **details)
        return error

    def __reduce__(self) -> Any:
        return copyreg.__newobj__, (type(self), self.message), self.__dict__  # type: ignore[attr-defined]  # not in typeshed


class InvalidRequest(PrereadError, ValueError, status="INVALID_ARGUMENT"):
    """A field of the request is out of range; .path, .field (`candidates[3].text`), .violations."""

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
        return field_name(self.path)


class NotFound(PrereadError, status="NOT_FOUND"):
    """No such collection or model; .resource_type, .resource_name."""

    def __init__(self, resource_type: str, resource_name: str, message: str) -> None:
        super().__init__(message, resource_type=resource_type, resource_name=resource_name)


class FailedPrecondition(PrereadError, status="FAILED_PRECONDITION"):
    """Another encoder's collection, a missing passage under on_miss="fail"; .reason, a constant, and its .subject."""

    path: Path = ()  # of the candidate in the way; (): the message names its subject
    said = ""  # the message, less the path

    def __init__(self, reason: str, subject: str, message: str, *, path: Path = ()) -> None:
        self.path, self.said, field = path, message, field_name(path)
        metadata = (("subject", subject or field),)
        super().__init__(f"{field} {message}" if path else message, reason=reason, metadata=metadata)

    @property
    def subject(self) -> str:
        return dict(self.metadata).get("subject", "")


class Unauthenticated(PrereadError, status="UNAUTHENTICATED"):
    """The key is missing or wrong."""


class PermissionDenied(PrereadError, status="PERMISSION_DENIED"):
    """The key does not allow this call."""


class Overloaded(PrereadError, status="RESOURCE_EXHAUSTED"):
    """The queue of the server is full; .retry_after_seconds."""

    def __init__(self, message: str, retry_after_seconds: float | None = None, *, reason: str = "") -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds, reason=reason)


class Unavailable(PrereadError, status="UNAVAILABLE"):
    """No server answers at the address, it starts or drains, or its store does not answer."""


class DeadlineExceeded(PrereadError, status="DEADLINE_EXCEEDED"):
    """The time limit passed before the response."""


class Cancelled(PrereadError, status="CANCELLED"):
    """The call was cancelled."""


class ServerError(PrereadError, status="UNKNOWN"):
    """Anything else: a fault of the server, not of the request."""


PrereadError.by_status["OUT_OF_RANGE"] = InvalidRequest


def field_name(path: Path) -> str:
    """A path as text: `candidates[3].text`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
