"""Failed requests as a status, headers and a JSON body, in one of two shapes: TEI's, and that of everybody else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec import Struct
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
from decoder_server.edge.http.json_steps import ENCODER
from preread import errors

RETRY_SECONDS = 1.0  # where the cause says nothing


_TeiKind = Literal["unhealthy", "backend", "overloaded", "validation"]


class _ErrorDetail(Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class _ErrorAnswer(Struct, kw_only=True):
    """An error as all dialects but TEI's read it: each its own part."""

    error: _ErrorDetail
    message: str
    detail: str


class _TeiError(Struct, kw_only=True):
    error: str
    error_type: _TeiKind


_TEI_KINDS: dict[int, _TeiKind] = {429: "overloaded", 503: "unhealthy"}
SCHEMAS = {"Error": _ErrorAnswer, "TeiError": _TeiError}


@dataclass(frozen=True, slots=True)
class Problem:
    """One failed request, before it has a shape."""

    status: int
    kind: str  # `type` of the body
    code: str
    message: str
    param: str | None = None
    retry_after_seconds: float | None = None

    @classmethod
    def of_status(cls, status: int, message: str) -> Problem:
        """A status of the router or of the guards before it: no such path, not this method, no key."""
        kind, code = _BY_STATUS.get(status, ("invalid_request_error", "bad_request"))
        return cls(status, kind, code, message)

    @classmethod
    def of(cls, error: Exception) -> Problem | None:
        """An error of this edge, an engine, the encoder worker, which has an address, or the store; None: any other."""
        message = str(error)
        own = message  # less the server that it came from, where the caller is at fault
        if isinstance(error, errors.PrereadError) and error.address:
            message = f"encoder worker: {message}"
        match error:
            case HttpError():
                return error.problem
            case errors.InvalidRequest():
                param = error.violations[0].field if error.violations else None
                return cls(400, "invalid_request_error", "invalid_value", own, param)
            case errors.NotFound():
                kind = error.resource_type or "resource"
                return cls(404, "not_found_error", f"{kind}_not_found", own, kind)
            case errors.FailedPrecondition():  # not 409, which clients try again
                return cls(400, "failed_precondition_error", (error.reason or "refused").lower(), own)
            case errors.Overloaded():
                seconds = error.retry_after_seconds or RETRY_SECONDS
                return cls(429, "overloaded_error", "overloaded", message, retry_after_seconds=seconds)
            case errors.DeadlineExceeded():
                return cls(504, "timeout_error", "deadline_exceeded", message)
            case errors.Unavailable() | StoreUnavailable() | StoreLocked() | StoreAccessDenied() | StoreFull():
                return cls(503, "unavailable_error", "unavailable", message, retry_after_seconds=RETRY_SECONDS)
            case errors.PrereadError():  # a bug of the worker: the text of its exception is for its log
                said = "the encoder worker failed; its log has the cause"
                return cls(500, "internal_error", "encoder_failed", said)
            case CollectionNotFound():
                return cls(404, "not_found_error", "collection_not_found", message, "collection")
            case InvalidName() | CollectionExists():
                return cls(400, "invalid_request_error", "invalid_value", message, "collection")
            case CacheError():
                return cls(500, "internal_error", "store_failed", message)
        return None

    def response(self, *, tei: bool = False, headers: Mapping[str, str] | None = None) -> Response:
        """The response, in TEI's shape or in the common one."""
        message = self.message or self.code
        body: _TeiError | _ErrorAnswer
        if tei:
            kind = _TEI_KINDS.get(self.status, "backend" if self.status >= 500 else "validation")
            body = _TeiError(error=message, error_type=kind)
        else:
            detail = _ErrorDetail(message=message, type=self.kind, param=self.param, code=self.code)
            body = _ErrorAnswer(error=detail, message=message, detail=message)
        headers = dict(headers or {})
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.retry_after_seconds is not None:
            # Whole seconds for everybody, milliseconds for clients that read them. Never 0, which is a busy loop.
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_seconds)))
            headers["retry-after-ms"] = str(max(1, math.ceil(self.retry_after_seconds * 1000)))
        return Response(ENCODER.encode(msgspec.to_builtins(body)), self.status, headers, "application/json")


class HttpError(Exception):
    """A request that fails at this edge: its body is too large, its client left."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


LEFT = Problem(499, "client_error", "client_closed_request", "the client closed the connection")
TOO_SLOW = Problem(408, "timeout_error", "request_timeout", "the request body did not arrive in time")
# Nothing of the cause, which is for the log.
INTERNAL = Problem(500, "internal_error", "internal_error", "internal error; the log has it under x-request-id")
CROWDED = Problem(
    429,
    "overloaded_error",
    "too_many_connections",
    "too many connections; try again, or use fewer connections for more requests each",
    retry_after_seconds=RETRY_SECONDS,
)

_BY_STATUS = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "permission_denied"),
    404: ("not_found_error", "path_not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    415: ("invalid_request_error", "unsupported_media_type"),
    431: ("invalid_request_error", "header_too_large"),
}
