"""Bytes that are no HTTP request get JSON and an id too. The one place that knows uvicorn's inside."""

from __future__ import annotations

import secrets

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from decoder_server.http import errors


class Protocol(H11Protocol):
    """uvicorn's, which would answer in plain text."""

    def send_400_response(self, msg: str) -> None:
        response = errors.respond(errors.by_status(400, msg))
        headers = [*response.raw_headers, (b"x-request-id", secrets.token_hex(16).encode()), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
