"""Why a whole request cannot be answered; a bad candidate is no error but an outcome.

RerankError
├── InvalidRequest       a field is out of range; names field, value, expectation
├── NotFound             no such model or collection
├── Refused              the request contradicts the state of the service
│                        (another encoder's collection, a missing passage under on_miss fail)
├── Overloaded           the queue is full; says when to come back
├── Unavailable          the store does not answer, or this server is starting or draining
└── DeadlineExceeded     the caller's time was up before the last score

Knows neither gRPC nor HTTP; each edge translates.
"""

# ruff: noqa: N818  # these say what happened, not that it is an error

from __future__ import annotations

import asyncio
import re

MAX_SHOWN_CHARS = 200  # of a value in a message: a caller may have sent megabytes of it


class RerankError(Exception):
    """Base of everything the engine raises for a request as a whole."""


class InvalidRequest(RerankError):
    """One field of a request is out of range."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        shown = value[:MAX_SHOWN_CHARS] if isinstance(value, str) else value
        super().__init__(f"{field} is {shown!r}; expected {expected}")
        self.field = field
        self.value = value
        self.expected = expected


class NotFound(RerankError):
    """A model or collection that is not here."""

    def __init__(self, kind: str, name: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.name = name


class Refused(RerankError):
    """The request cannot be served in the present state; `reason` is a short constant for machines."""

    def __init__(self, reason: str, subject: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.subject = subject


class Overloaded(RerankError):
    """The queue is full; `retry_after_seconds` is when it should have room."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(RerankError):
    """The service or its store cannot answer now."""


class DeadlineExceeded(RerankError):
    """The caller's deadline passed."""


def code_of(error: BaseException) -> str:
    """The error's name for logs and metrics: few and constant. InvalidRequest is invalid_request."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    if isinstance(error, RerankError):
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    return "internal"
