"""HTTP for hostile networks: deadlines, bounds, no message with two readings. Knows uvicorn's and h11's insides."""

import asyncio
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import h11
import uvicorn
from prometheus_client import CollectorRegistry, make_asgi_app
from starlette.responses import PlainTextResponse
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from preread_edge.access import Guard, join

SPARE = 64  # connections over the limit that still get a response; further ones are closed immediately
BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75  # longer than the minute that proxies keep an idle connection
HEADER_SECONDS = 10.0  # from a connection, or the first byte of a further request, to the end of its header
# h11 reads a chunk in 20 microseconds: of a body in chunks of one byte this much takes 10 ms.
SLICE_BYTES = 2048
SHORT_SECONDS = 0.001  # a slice that took longer is followed by a rest

_SETTINGS: dict[str, Any] = {
    "ws": "none", "lifespan": "off", "log_config": None, "access_log": False, "server_header": False,
    "proxy_headers": False, "timeout_keep_alive": KEEP_ALIVE_SECONDS, "backlog": BACKLOG,
}  # fmt: skip

Refusal = Callable[[int, str], tuple[str, bytes]]  # (status, message) -> content type and body


class _Ambiguous(h11.RemoteProtocolError):
    """A message that another reader, such as a proxy, may have cut elsewhere."""


class _Connection(h11.Connection):
    """h11's, which reads leniently: what a proxy in front may read otherwise is an error here."""

    problem: h11.RemoteProtocolError | None = None

    def next_event(self) -> Any:
        before = self.trailing_data[0] if self.their_state is h11.IDLE else b""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._check(before[: len(before) - len(self.trailing_data[0])], event)
        except h11.RemoteProtocolError as exc:
            self.problem = exc
            raise
        return event

    def _check(self, head: bytes, request: h11.Request) -> None:
        names = {name for name, _ in request.headers}
        if not head.count(b"\n") == head.count(b"\r") == head.count(b"\r\n"):
            raise _Ambiguous("a line of the header does not end with CR LF")
        if b"\r\n " in head or b"\r\n\t" in head:
            raise _Ambiguous("a line of the header is folded")
        if {b"content-length", b"transfer-encoding"} <= names:
            raise _Ambiguous("content-length and transfer-encoding contradict each other")
        if b"transfer-encoding" in names and request.http_version < b"1.1":
            raise _Ambiguous("transfer-encoding in HTTP/1.0")


class _Flow(FlowControl):
    """uvicorn's, which does not resume while received bytes are still to be read."""

    held = False

    def resume_reading(self) -> None:
        self.read_paused = False
        if not self.held:
            self._transport.resume_reading()


class _Protocol(H11Protocol):
    """uvicorn's, with a deadline for headers and bounded work between two turns of the event loop."""

    flow: _Flow
    conn: _Connection

    def __init__(self, *args: Any, refusal: Refusal, header_seconds: float, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._refusal, self._header_seconds = refusal, header_seconds
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self.conn = _Connection(h11.SERVER, self.conn._max_incomplete_event_size)
        self._deadline: asyncio.TimerHandle | None = None
        self._received: deque[bytes] = deque()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.flow = _Flow(transport)
        over = len(self.connections) - (self._max_connections or len(self.connections))
        if over > SPARE:
            transport.abort()
            return
        if over > 0:
            self.app_state = self.app_state | {"crowded": True}  # for the application
        self._expect_header(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._received.clear()
        self._expect_header(False)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # A body of a declared length is one event, whatever its size; anything else may be many.
        sized = self.conn.their_state is h11.SEND_BODY and any(name == b"content-length" for name, _ in self.headers)
        if len(data) <= SLICE_BYTES or sized:
            self._received.append(data)
        else:
            self._received.extend(data[i : i + SLICE_BYTES] for i in range(0, len(data), SLICE_BYTES))
        if not self.flow.held:
            self._read_on()

    def _read_on(self) -> None:
        """Reads one slice; the next one after the other tasks of the loop had a turn."""
        if self.transport.is_closing():
            self._received.clear()
        began = time.perf_counter()
        if self._received:
            super().data_received(self._received.popleft())
            theirs, ours = self.conn.their_state, self.conn.our_state
            self._expect_header(theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours is h11.DONE))
        if self._received:
            self.flow.held = True
            self.transport.pause_reading()
            seconds = time.perf_counter() - began
            self.loop.call_later(seconds if seconds > SHORT_SECONDS else 0, self._read_on)
        elif self.flow.held:
            self.flow.held = False
            if not self.flow.read_paused and not self.transport.is_closing():
                self.transport.resume_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        is_rest = self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing()  # of an unwanted body
        if is_rest or (self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]):
            self._expect_header(True)

    def _expect_header(self, is_due: bool) -> None:
        """Keeps a deadline while a header, or a body that was answered already, is incomplete."""
        if not is_due and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        elif is_due and self._deadline is None:
            self._deadline = self.loop.call_later(self._header_seconds, self._late)

    def _late(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, f"the request header did not arrive within {self._header_seconds:g} s")
        else:
            self.transport.abort() if self.conn.their_state is h11.SEND_BODY else self.transport.close()

    def send_400_response(self, msg: str) -> None:
        hint = getattr(self.conn.problem, "error_status_hint", 400)
        if isinstance(self.conn.problem, _Ambiguous):
            msg = str(self.conn.problem)
        elif hint == 431:
            msg = "the request header is too large"
        self._refuse(hint if hint in (431, 501) else 400, msg)

    def _refuse(self, status: int, message: str) -> None:
        """Responds to a malformed request, and closes."""
        self._received.clear()
        if self.cycle is not None and not self.cycle.response_complete:  # its body went wrong
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        content_type, content = self._refusal(status, message)
        headers = [("content-type", content_type), ("content-length", str(len(content))), ("connection", "close")]
        headers.append(("x-request-id", secrets.token_hex(16)))
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's, on one socket, with a deadline for TLS handshakes; signals belong to the owner of the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        config: Any = self.config
        http = config.http_protocol_class
        protocol = partial(http, config=config, server_state=self.server_state, app_state=self.lifespan.state)
        secured = {"ssl_handshake_timeout": http.keywords["header_seconds"]} if config.ssl else {}
        options = {"ssl": config.ssl, "backlog": config.backlog, **secured}
        for listener in sockets or ():
            self.servers.append(await asyncio.get_running_loop().create_server(protocol, sock=listener, **options))


def make_server(
    app: Any, *, max_connections: int, refusal: Refusal, header_seconds: float = HEADER_SECONDS, **settings: Any
) -> uvicorn.Server:
    """A server of an ASGI application; `settings` are uvicorn's."""
    http: Any = partial(_Protocol, refusal=refusal, header_seconds=header_seconds)
    return _Server(uvicorn.Config(app, http=http, limit_concurrency=max_connections, **_SETTINGS, **settings))


def bind(host: str, port: int, what: str) -> socket.socket:
    """A listening socket. Raises OSError where the port is taken, or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host.strip("[]"), port), family=family, backlog=BACKLOG)
        # Inherited by its connections, of which asyncio does not see that they are TCP's. Without it a body waits for
        # the acknowledgement of its header, which clients delay by 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as exc:
        raise OSError(exc.errno, f"cannot listen on {join(host, port)} ({what}): {exc.strerror or exc}") from exc


@contextmanager
def metrics_listener(
    registry: CollectorRegistry, host: str, port: int, guard: Guard, *, header_seconds: float = HEADER_SECONDS
) -> Iterator[int]:
    """Serves a registry to Prometheus on a thread until the block ends; yields the port. OSError: it is taken."""
    metrics = make_asgi_app(registry)

    def refusal(status: int, message: str) -> tuple[str, bytes]:
        return "text/plain; charset=utf-8", f"{message}\n".encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if problem := guard.problem(scope):
            await PlainTextResponse(f"{problem[1]}\n", 403)(scope, receive, send)
        elif scope["path"] not in ("/metrics", "/metrics/", "/"):
            await PlainTextResponse("not here; expected /metrics\n", 404)(scope, receive, send)
        else:
            headers = [(name, value.decode("latin-1").encode()) for name, value in scope["headers"]]  # it reads UTF-8
            await metrics({**scope, "headers": headers}, receive, send)

    server = make_server(app, max_connections=64, refusal=refusal, header_seconds=header_seconds)
    with bind(host, port, "metrics") as listener:
        thread = threading.Thread(target=asyncio.run, args=[server.serve([listener])], name="metrics", daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            server.config.timeout_graceful_shutdown = 1
            server.should_exit = True
            thread.join()
