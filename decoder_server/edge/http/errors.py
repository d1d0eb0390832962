"""Failed requests as a status, headers and a JSON body, in one of two shapes: TEI's, and that of everybody else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec
from msgspec import Struct
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from cache import errors as cache
from decoder_server.edge.http.json_steps import ENCODER
from preread import errors

RETRY_SECONDS = 1.0  # where the cause says nothing
TOO_SLOW = "the request body did not arrive in time"

_TeiKind = Literal["unhealthy", "backend", "overloaded", "validation"]


class _ErrorDetail(Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class _Error(Struct, kw_only=True):
    """An error as all dialects but TEI's read it: each its own part."""

    error: _ErrorDetail
    message: str
    detail: str


class _TeiError(Struct, kw_only=True):
    error: str
    error_type: _TeiKind


ANSWERS = (_Error, _TeiError)  # of every dialect but TEI's, and TEI's
_TEI_KINDS: dict[int, _TeiKind] = {429: "overloaded", 503: "unhealthy"}
# `type` and `code` of the body, where the cause has no other.
_BY_STATUS = {
    400: ("invalid_request_error", "bad_request"), 401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "permission_denied"), 404: ("not_found_error", "path_not_found"),
    405: ("invalid_request_error", "method_not_allowed"), 408: ("timeout_error", "request_timeout"),
    413: ("invalid_request_error", "body_too_large"), 415: ("invalid_request_error", "unsupported_media_type"),
    429: ("overloaded_error", "overloaded"), 431: ("invalid_request_error", "header_too_large"),
    499: ("client_error", "client_closed_request"), 500: ("internal_error", "internal_error"),
    503: ("unavailable_error", "unavailable"), 504: ("timeout_error", "deadline_exceeded"),
}  # fmt: skip


class Problem(Exception):  # noqa: N818 - most are made of an error
    """One failed request, before its response has a shape; raised where this edge itself fails it."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "",  # `type` of the body; "": as the status says, like code
        code: str = "",
        *,
        param: str | None = None,
        retry_after_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        by_status = _BY_STATUS.get(status, _BY_STATUS[400])
        self.status, self.message, self.param = status, message, param
        self.kind, self.code = kind or by_status[0], code or by_status[1]
        self.headers = dict(headers or {})
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"
        if status in (429, 503):
            # Whole seconds for everybody, milliseconds for clients that read them. Never 0, which is a busy loop.
            seconds = retry_after_seconds or RETRY_SECONDS
            self.headers["retry-after"] = str(max(1, math.ceil(seconds)))
            self.headers["retry-after-ms"] = str(max(1, math.ceil(seconds * 1000)))

    @classmethod
    def of(cls, error: Exception) -> Problem:
        """An error of this edge, an engine, the encoder worker, which has an address, the store; or a bug."""
        own = message = str(error)  # own: less the server that it came from, where the caller is at fault
        if isinstance(error, errors.PrereadError) and error.address:
            message = f"encoder worker: {message}"
        match error:
            case Problem():
                return error
            case ClientDisconnect():  # for no reader; the request ends all the same
                return cls(499, "the client closed the connection")
            case errors.InvalidRequest():
                param = error.violations[0].field if error.violations else None
                return cls(400, own, code="invalid_value", param=param)
            case errors.NotFound():
                kind = error.resource_type or "resource"
                return cls(404, own, code=f"{kind}_not_found", param=kind)
            case errors.FailedPrecondition():  # not 409, which clients try again
                return cls(400, own, "failed_precondition_error", (error.reason or "refused").lower())
            case errors.Overloaded():
                return cls(429, message, retry_after_seconds=error.retry_after_seconds)
            case errors.DeadlineExceeded():
                return cls(504, message)
            case errors.Unavailable() | cache.StoreUnavailable() | cache.StoreLocked():
                return cls(503, message)
            case cache.StoreAccessDenied() | cache.StoreFull():
                return cls(503, message)
            case errors.PrereadError():  # a bug of the worker: the text of its exception is for its log
                return cls(500, "the encoder worker failed; its log has the cause", code="encoder_failed")
            case cache.CollectionNotFound():
                return cls(404, message, code="collection_not_found", param="collection")
            case cache.InvalidName() | cache.CollectionExists():
                return cls(400, message, code="invalid_value", param="collection")
            case cache.CacheError():
                return cls(500, message, code="store_failed")
        return cls(500, "internal error; the log has it under x-request-id")  # nothing of the cause

    def response(self, *, tei: bool = False) -> Response:
        """The response, in TEI's shape or in the common one."""
        message = self.message or self.code
        body: _TeiError | _Error
        if tei:
            kind = _TEI_KINDS.get(self.status, "backend" if self.status >= 500 else "validation")
            body = _TeiError(error=message, error_type=kind)
        else:
            detail = _ErrorDetail(message=message, type=self.kind, param=self.param, code=self.code)
            body = _Error(error=detail, message=message, detail=message)
        return Response(ENCODER.encode(msgspec.to_builtins(body)), self.status, self.headers, "application/json")


EXPECTED = (Problem, errors.PrereadError, cache.CacheError, ClientDisconnect)  # any other is a bug
