"""Bytes that are no HTTP request get JSON and an id too; connections are bounded.

The one place that knows uvicorn's inside.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from decoder_server.http import errors

SPARE = 64  # connections over the limit that are still told so; beyond them they are closed without a word


class Protocol(H11Protocol):
    """uvicorn's, which would answer in plain text, and would wait for ever for a first byte."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        over = len(self.connections) - (self._max_connections or len(self.connections))
        if over > SPARE:
            transport.abort()
            return
        if over > 0:
            self.app_state = self.app_state | {"crowded": True}  # for envelope.py
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

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
