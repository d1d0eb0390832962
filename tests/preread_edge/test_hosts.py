"""Laws of names, pages and log lines: a value that a stranger chose opens no door and forges no line."""

from __future__ import annotations

import io
import json
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge

from preread_edge.access import Guard, join
from preread_edge.listener import bind, metrics_listener
from preread_edge.logs import set_up


def asked(
    host: str | None = "localhost", method: str = "GET", server: str = "127.0.0.1", **more: Any
) -> dict[str, Any]:
    """An ASGI scope."""
    headers = [] if host is None else [(b"host", host.encode("latin-1"))]
    headers += [(name.replace("_", "-").encode(), value.encode()) for name, value in more.items() if name != "raw_path"]
    raw = more.get("raw_path", b"/x")
    return {"method": method, "headers": headers, "server": (server, 8080), "raw_path": raw, "path": raw.decode()}


@pytest.mark.parametrize(
    ("host", "port", "written"),
    [("127.0.0.1", 1, "127.0.0.1:1"), ("::1", 2, "[::1]:2"), ("[fe80::1]", 3, "[fe80::1]:3"), ("name", 4, "name:4")],
)
def test_an_address_is_written_with_brackets_where_it_needs_them(host: str, port: int, written: str) -> None:
    assert join(host, port) == written


HOME = (
    "localhost", "localhost:8080", "LOCALHOST:1", "localhost.", "127.0.0.1", "127.9.8.7:65535", "[::1]", "[::1]:8080",
    "[0:0:0:0:0:0:0:1]:8080", "localhost:",
)  # fmt: skip
STRANGE = (
    "evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "user@localhost",
    "localhost@evil.example", "localhost,evil.example", "localhost evil.example", "", ":8080", "localhost:x",
    "localhost:99999999", "2130706433", "0x7f.1", "127.1", "0.0.0.0", "10.0.0.7", "[::]", "[::ffff:127.0.0.1]",
    "[127.0.0.1]", "::1", "[::1", "[::1%lo]", "localhost/", "localhost..", "x.localhost", "lócalhost",
    "localhost\\.evil.example", "localhost#", "localhost?",
)  # fmt: skip


@pytest.mark.parametrize("host", HOME)
def test_on_loopback_its_own_names_are_known(host: str) -> None:
    assert Guard().problem(asked(host)) is None


@pytest.mark.parametrize("host", STRANGE)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_on_loopback_no_other_name_is(host: str, method: str) -> None:
    problem = Guard().problem(asked(host, method))
    assert problem is not None
    assert problem[0] == "host_not_allowed"
    assert len(problem[1]) < 400


def test_a_name_that_a_proxy_tells_does_not_count() -> None:
    assert Guard().problem(asked("evil.example", x_forwarded_host="localhost")) is not None
    assert Guard().problem(asked("localhost", x_forwarded_host="evil.example")) is None


def test_a_caller_of_http_1_0_names_none() -> None:
    assert Guard().problem(asked(None)) is None


@pytest.mark.parametrize(("target", "fits"), [(b"http://localhost:8080/x?y", True), (b"HTTP://evil.example/x", False)])
def test_a_target_in_full_is_a_name_too(target: bytes, fits: bool) -> None:
    scope = asked("localhost", raw_path=target)
    assert (Guard().problem(scope) is None) == fits
    assert scope["path"].startswith("/x")


def test_elsewhere_names_have_to_be_given_and_the_address_itself_is_known() -> None:
    guard = Guard(("preread.example", ".svc.example", "10.1.1.1", "[fd00::7]", "fd00::8"))
    known = ("10.0.0.7:8080", "preread.example:80", "PREREAD.example.", "svc.example", "a.b.svc.example", "10.1.1.1")
    for host in (*known, "[fd00::7]:8080", "[fd00:0::8]", "localhost:8080"):
        assert guard.problem(asked(host, server="10.0.0.7")) is None, host
    for host in ("other.example", "evilsvc.example", "10.0.0.8", "preread.example.evil", "[fd00::9]"):
        assert guard.problem(asked(host, server="10.0.0.7")) is not None, host
    assert guard.problem(asked("[fd00::9]:1", server="fd00::9")) is None
    assert guard.problem(asked("10.0.0.7", server="::ffff:10.0.0.7")) is None


def test_where_keys_are_required_any_name_will_do() -> None:
    assert Guard(any_host=True).problem(asked("evil.example")) is None


@pytest.mark.parametrize("name", ["", ".", "a b", "http://x", "x:80", "a/b", "user@x", "*"])
def test_a_name_that_cannot_be_one_is_no_setting(name: str) -> None:
    with pytest.raises(ValueError, match="allowed_host"):
        Guard((name,))


@pytest.mark.parametrize("origin", ["", "null", "*", "app.example", "https://", "https://app.example/path", "a b://c"])
def test_an_origin_that_cannot_be_one_is_no_setting(origin: str) -> None:
    with pytest.raises(ValueError, match="allow_origin"):
        Guard(allowed_origins=(origin,))


@pytest.mark.parametrize(
    ("host", "origin", "known"),
    [
        ("localhost:8080", "http://localhost:8080", True),
        ("LOCALHOST:8080", "http://localhost:8080", True),
        ("localhost", "http://localhost", True),
        ("localhost", "https://localhost:443", True),
        ("localhost:8080", "http://localhost:3000", False),
        ("localhost:8080", "http://localhost", False),
        ("127.0.0.1:8080", "http://localhost:8080", False),
        ("localhost:8080", "http://evil.example", False),
        ("localhost:8080", "null", False),
        ("localhost:8080", "", False),
        ("localhost:8080", "http://localhost:8080.evil.example", False),
        ("localhost:8080", "http://localhost:8080@evil.example", False),
        ("localhost:8080", "file://", False),
        ("localhost:8080", "https://app.example", True),
        ("localhost:8080", "HTTPS://App.Example:443", True),
        ("localhost:8080", "http://app.example", False),
        ("localhost:8080", "https://app.example:444", False),
        ("localhost:8080", "https://x.app.example", False),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
def test_a_page_from_elsewhere_may_not_call_unless_it_is_named(
    host: str, origin: str, known: bool, method: str
) -> None:
    guard = Guard(allowed_origins=("https://app.example",))
    problem = guard.problem(asked(host, method, origin=origin))
    assert (problem is None) == known
    assert ("access-control-allow-origin" in guard.cors(asked(host, method, origin=origin))) == (
        "pp" in origin and known
    )


def test_a_browser_that_tells_of_another_site_in_its_other_word_is_refused_too() -> None:
    assert Guard().problem(asked(method="POST", sec_fetch_site="cross-site")) is not None
    assert Guard().problem(asked(method="POST", sec_fetch_site="same-origin")) is None
    assert Guard().problem(asked(method="GET", sec_fetch_site="cross-site")) is None, "a link to the page"


def test_any_origin_needs_keys_and_is_never_answered_as_a_star() -> None:
    guard = Guard(allowed_origins=("*",), any_host=True)
    headers = guard.cors(asked(origin="https://a.example"))
    assert headers["access-control-allow-origin"] == "https://a.example"
    assert headers["vary"] == "origin"
    assert "access-control-allow-credentials" not in headers
    assert guard.problem(asked(method="POST", origin="null")) is not None


@pytest.mark.parametrize("text", ["a:b:c", "[::1]x", "a" * 300, "-" * 3 + "\n"])
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(ValueError, match=r"allow_origin is .*; expected SCHEME://HOST"):
        Guard(allowed_origins=(f"http://{text}",))


HOSTILE = "x\n2026-01-01 00:00:00.000 info    forged\r\t\x1b[31m\x7f\x85\u2028\u2029\u202e\u2066\x00\ud800\U000e0001"


def formatted(log_format: str, exception: Exception | None = None) -> str:
    set_up(log_format, "info")
    (handler,) = logging.getLogger().handlers
    info = (type(exception), exception, None) if exception else None
    record = logging.LogRecord("preread", logging.WARNING, "f", 1, "a call of %s", (HOSTILE,), info)
    record.fields = {"model": HOSTILE, "names": [HOSTILE], "long": "y" * 1_000_000}
    return handler.format(record)


def test_a_value_stays_in_its_line() -> None:
    text = formatted("text")
    assert text.isprintable()
    assert r"x\n2026-01-01" in text
    assert r"\u202e" in text
    assert len(text) < 10_000


def test_a_line_of_an_exception_is_no_entry() -> None:
    first, *lines = formatted("text", ValueError(HOSTILE)).split("\n")
    assert "forged" in lines[1]
    assert all(line.startswith("  ") and line.isprintable() for line in lines)
    assert first.isprintable()


def test_a_line_for_machines_is_json_and_one_line() -> None:
    text = formatted("json", ValueError(HOSTILE))
    assert text.isprintable()
    document = json.loads(text)
    assert document["message"] == f"a call of {HOSTILE}"
    assert document["model"] == HOSTILE
    assert len(text) < 20_000


def test_what_is_logged_can_be_written() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
    for log_format in ("text", "json"):
        stream.write(formatted(log_format, ValueError(HOSTILE)))


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("preread_secret", "what a stranger should not see", registry=registry).set(7)
    return registry


def get(port: int, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read().decode()


def test_the_port_for_metrics_has_the_same_guard(registry: CollectorRegistry) -> None:
    with metrics_listener(registry, "127.0.0.1", 0, Guard(("prometheus.example",))) as port:
        assert "preread_secret 7.0" in get(port)[1]
        assert get(port, Host="prometheus.example:9464")[0] == 200
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            status, text = get(port, **headers)
            assert status == 403
            assert "secret" not in text
        assert get(port, Accept="\xe9")[0] == 200


def until_closed(read: Callable[[], bytes], seconds: float) -> bytes:
    """What came until the other side closed."""
    deadline, came = time.monotonic() + seconds, b""
    while time.monotonic() < deadline:
        try:
            data = read()
        except ConnectionResetError:
            return came
        if not data:
            return came
        came += data
    raise AssertionError("the connection was not closed")


@pytest.mark.parametrize("begun", [b"", b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nx-a: "])
def test_the_port_for_metrics_waits_for_a_header_for_so_long(registry: CollectorRegistry, begun: bytes) -> None:
    with (
        metrics_listener(registry, "127.0.0.1", 0, Guard(), header_seconds=0.3) as port,
        socket.create_connection(("127.0.0.1", port), timeout=0.05) as slow,
    ):
        slow.sendall(begun)

        def drip() -> bytes:
            while True:
                if begun:
                    slow.sendall(b"a")
                try:
                    return slow.recv(65536)
                except TimeoutError:
                    pass

        try:
            came = until_closed(drip, 20)
        except BrokenPipeError:
            came = b"HTTP/1.1 408"
        assert came.startswith(b"HTTP/1.1 408") or not begun
        assert get(port)[0] == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_body_does_not_wait_for_the_acknowledgement_of_its_header(host) -> None:
    """Clients delay it by 40 ms. Connections are told by their listener: asyncio tells only those it knows as TCP's."""
    with bind(host, 0, "test") as listening:
        with socket.create_connection(listening.getsockname()[:2]):
            accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
