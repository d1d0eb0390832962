"""What went wrong, as a status, headers and a JSON body. Two shapes: TEI's, and everybody else's.

Knows the errors of the engine, the store and the encoder worker; does not know requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from starlette.responses import Response

from cache.errors import (
    CacheError,
    CollectionExists,
    CollectionNotFound,
    InvalidName,
    StoreAccessDenied,
    StoreFull,
    StoreLocked,
    StoreUnavailable,
)
from decoder_server.edge.http.body import TooLarge, render
from preread import errors

RETRY_SECONDS = 1.0  # where nobody knows better


_BY_STATUS = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "permission_denied"),
    404: ("not_found_error", "path_not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    415: ("invalid_request_error", "unsupported_media_type"),
    431: ("invalid_request_error", "header_too_large"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One failed request, before it has a shape."""

    status: int
    kind: str  # `type` of the body
    code: str
    message: str
    param: str | None = None
    retry_after_seconds: float | None = None


class HttpError(Exception):
    """Raised at the edge itself: a body too large, a client that left."""

    def __init__(self, status: int, kind: str, code: str, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(status, kind, code, message)


def problem(error: Exception) -> Problem | None:
    """How an error reads over HTTP; None for one that nobody foresaw."""
    match error:
        case HttpError():
            return error.problem
        case TooLarge():
            return Problem(413, "invalid_request_error", "body_too_large", str(error))
        case errors.PrereadError():
            return _worker(error) if error.address else _engine(error)
        case CacheError():
            return _store(error)
    return None


def internal() -> Problem:
    """Says nothing of the cause: that is for the log."""
    return Problem(500, "internal_error", "internal_error", "internal error; the log has it under x-request-id")


def crowded() -> Problem:
    """More connections than this server takes."""
    message = "too many connections; try again, or use fewer connections for more requests each"
    return Problem(429, "overloaded_error", "too_many_connections", message, retry_after_seconds=RETRY_SECONDS)


def stranger(code: str, message: str) -> Problem:
    """Asked under a name, or from a web page, that this server does not answer to."""
    return Problem(403, "permission_error", code, message)


def by_status(status: int, message: str) -> Problem:
    """For what the router and the guard at the door say: no such path, not this method, no key."""
    kind, code = _BY_STATUS.get(status, ("invalid_request_error", "bad_request"))
    return Problem(status, kind, code, message)


def refusal(status: int, message: str) -> tuple[str, bytes]:
    """Content type and body of the answer to bytes that are no request."""
    response = respond(by_status(status, message))
    return "application/json", bytes(response.body)


def respond(problem: Problem, *, tei: bool = False, headers: dict[str, str] | None = None) -> Response:
    """The answer."""
    message = problem.message or problem.code
    body: dict[str, object]
    if tei:
        body = {"error": message, "error_type": _tei_type(problem.status)}
    else:
        error = {"message": message, "type": problem.kind, "param": problem.param, "code": problem.code}
        body = {"error": error, "message": message, "detail": message}
    headers = dict(headers or {})
    if problem.status == 401:
        headers["www-authenticate"] = "Bearer"
    if problem.retry_after_seconds is not None:
        # Whole seconds for everybody; milliseconds for the clients that read them. Never 0: that is a busy loop.
        headers["retry-after"] = str(max(1, math.ceil(problem.retry_after_seconds)))
        headers["retry-after-ms"] = str(max(1, math.ceil(problem.retry_after_seconds * 1000)))
    return Response(render(body), problem.status, headers, "application/json")


def _engine(error: errors.PrereadError) -> Problem:
    message = str(error)
    match error:
        case errors.InvalidRequest():
            return Problem(400, "invalid_request_error", "invalid_value", message, error.field)
        case errors.NotFound():
            return Problem(404, "not_found_error", f"{error.resource_type}_not_found", message, error.resource_type)
        case errors.FailedPrecondition():
            # Not 409, which clients try again.
            return Problem(400, "failed_precondition_error", error.reason.lower(), message)
        case errors.Overloaded():
            seconds = error.retry_after_seconds or RETRY_SECONDS
            return Problem(429, "overloaded_error", "overloaded", message, retry_after_seconds=seconds)
        case errors.DeadlineExceeded():
            return Problem(504, "timeout_error", "deadline_exceeded", message)
    return _unavailable(message)


def _worker(error: errors.PrereadError) -> Problem:
    message = f"encoder worker: {error}"
    match error:
        case errors.InvalidRequest():
            param = error.violations[0].field if error.violations else None
            return Problem(400, "invalid_request_error", "invalid_value", str(error), param)
        case errors.NotFound():
            kind = error.resource_type or "resource"
            return Problem(404, "not_found_error", f"{kind}_not_found", str(error), kind)
        case errors.FailedPrecondition():
            return Problem(400, "failed_precondition_error", (error.reason or "refused").lower(), str(error))
        case errors.Overloaded():
            seconds = error.retry_after_seconds or RETRY_SECONDS
            return Problem(429, "overloaded_error", "overloaded", message, retry_after_seconds=seconds)
        case errors.Unavailable():
            return _unavailable(message)
        case errors.DeadlineExceeded():
            return Problem(504, "timeout_error", "deadline_exceeded", message)
    # Of a bug over there only that it is one: an exception's own text is for its log.
    return Problem(500, "internal_error", "encoder_failed", "the encoder worker failed; its log has the cause")


def _store(error: CacheError) -> Problem:
    message = str(error)
    match error:
        case CollectionNotFound():
            return Problem(404, "not_found_error", "collection_not_found", message, "collection")
        case InvalidName() | CollectionExists():
            return Problem(400, "invalid_request_error", "invalid_value", message, "collection")
        case StoreUnavailable() | StoreLocked() | StoreAccessDenied() | StoreFull():  # nothing the caller can mend
            return _unavailable(message)
    return Problem(500, "internal_error", "store_failed", message)


def _unavailable(message: str) -> Problem:
    return Problem(503, "unavailable_error", "unavailable", message, retry_after_seconds=RETRY_SECONDS)


def _tei_type(status: int) -> str:
    return {429: "overloaded", 503: "unhealthy"}.get(status, "backend" if status >= 500 else "validation")
