"""What happens on the socket: bytes that are no HTTP, TLS, clients that leave, a server that stops."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time

import httpx2
import pytest


def until(holds, seconds=10):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("sent", [b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nno header\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
def test_what_is_no_http_gets_json_too(running, sent):
    with socket.create_connection(("127.0.0.1", running.gateway.port), timeout=10) as client:
        client.sendall(sent)
        head, _, body = b"".join(iter(lambda: client.recv(65536), b"")).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400")
    assert b"x-request-id: " in head.lower()
    assert json.loads(body)["error"]["message"]


def test_tls(run, pem, query, documents):
    cert, key = pem
    body = {"query": query, "documents": documents}
    with run(tls_cert_file=cert, tls_key_file=key) as secured:
        url = f"https://127.0.0.1:{secured.gateway.port}/v1/rerank"
        trusting = ssl.create_default_context(cafile=cert)
        assert httpx2.post(url, json=body, verify=trusting).status_code == 200
        with pytest.raises(httpx2.HTTPError):
            httpx2.post(url.replace("https", "http"), json=body)


def test_a_port_that_wants_certificates_of_grpc_callers_wants_them_here(run, pem, query, documents):
    cert, key = pem
    body = {"query": query, "documents": documents}
    with run(tls_cert_file=cert, tls_key_file=key, tls_client_ca_file=cert) as secured:
        url = f"https://127.0.0.1:{secured.gateway.port}/v1/rerank"
        without_certificate = ssl.create_default_context(cafile=cert)
        with pytest.raises(httpx2.HTTPError):
            httpx2.post(url, json=body, verify=without_certificate)
        known = ssl.create_default_context(cafile=cert)
        known.load_cert_chain(cert, key)
        assert httpx2.post(url, json=body, verify=known).status_code == 200


def test_an_uploader_that_leaves_ends_its_upload_only(running):
    """What was stored stays; what was still being gathered does not come."""

    def num_stored():
        found = running.http.get("/v1/collections/left")
        return found.json()["num_passages"] if found.status_code == 200 else 0

    line = b'{"id": "x%d", "text": "some text"}\n'
    head = "POST /v1/collections/left/passages HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\n"
    with socket.create_connection(("127.0.0.1", running.gateway.port)) as client:
        client.sendall(f"{head}content-length: 1000000\r\n\r\n".encode() + b"".join(line % i for i in range(200)))
        until(lambda: num_stored() >= 64)
    assert len(running.ask()["results"]) == 4
    assert 64 <= num_stored() < 200


def test_what_runs_is_answered_when_the_server_stops(run):
    with run() as one:
        one.ask()
        one.backend.gate.clear()
        one.backend.entered.clear()
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(one.ask()))
        waiting.start()
        assert one.backend.entered.wait(10)
        stopping = threading.Thread(target=lambda: one.call(one.gateway.stop(20)))
        stopping.start()
        until(lambda: one.gateway.context.draining)
        until(lambda: not _accepts(one.gateway.port))
        one.backend.gate.set()
        waiting.join()
        stopping.join()
    assert len(answers[0]["results"]) == 4


def _accepts(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def exchange(port, *parts, seconds=20, pause=0.0):
    """What a server answers to bytes that are sent one part after the other, until it closes."""
    came = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        try:
            for part in parts:
                client.sendall(part)
                time.sleep(pause)
            while data := client.recv(65536):
                came += data
        except (ConnectionResetError, BrokenPipeError):
            pass
    return came


def status(came):
    return int(came.split(b" ", 2)[1]) if came else None


BODY = b'{"query": "q", "documents": ["d"]}'
ASK = b"POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
TE = b"transfer-encoding: chunked\r\n"
# what another reader may cut or read in another way
AMBIGUOUS = {
    "both lengths": ASK + LENGTH + TE + b"\r\n" + CHUNKED,
    "both lengths, the other way round": ASK + TE + LENGTH + b"\r\n" + CHUNKED,
    "two lengths": ASK + LENGTH + b"content-length: 3\r\n\r\n" + BODY,
    "lengths in one": ASK + b"content-length: %d, 3\r\n\r\n" % len(BODY) + BODY,
    "a signed length": ASK + b"content-length: +%d\r\n\r\n" % len(BODY) + BODY,
    "a length that is none": ASK + b"content-length: 0x10\r\n\r\n" + BODY,
    "two encodings": ASK + b"transfer-encoding: gzip, chunked\r\n\r\n" + CHUNKED,
    "an encoding twice": ASK + TE + TE + b"\r\n" + CHUNKED,
    "an encoding that is none": ASK + b"transfer-encoding: xchunked\r\n\r\n" + CHUNKED,
    "an encoding in HTTP/1.0": ASK.replace(b"1.1", b"1.0") + TE + b"\r\n" + CHUNKED,
    "a folded line": ASK + b"x-a: b\r\n c\r\n" + LENGTH + b"\r\n" + BODY,
    "a folded length": ASK + b"content-length:\r\n %d\r\n\r\n" % len(BODY) + BODY,
    "a bare LF": ASK + b"x-a: b\n" + LENGTH + b"\r\n" + BODY,
    "bare LFs only": (ASK + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY,
    "a bare CR": ASK + b"x-a: b\rx-c: d\r\n" + LENGTH + b"\r\n" + BODY,
    "a space before a colon": ASK + b"content-length : %d\r\n\r\n" % len(BODY) + BODY,
    "a NUL": ASK + b"x-a: \x00\r\n" + LENGTH + b"\r\n" + BODY,
    "two hosts": ASK + b"host: localhost\r\n" + LENGTH + b"\r\n" + BODY,
    "a chunk size that is none": ASK + TE + b"\r\nxyz\r\n",
    "a negative chunk size": ASK + TE + b"\r\n-1\r\n",
    "an endless chunk size": ASK + TE + b"\r\n" + b"0" * 40 + b"1\r\n",
    "a chunk longer than it says": ASK + TE + b"\r\n2\r\nabcd\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("sent", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_a_message_with_two_readings_is_refused_and_the_connection_closed(running, sent):
    for line in (b"connection: close\r\n", b"connection: close\n"):
        sent = sent.replace(line, b"")
    came = exchange(running.gateway.port, sent)
    assert status(came) in (400, 501)
    assert came.count(b"HTTP/1.1 ") == 1
    assert json.loads(came.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize(
    "sent",
    [
        ASK + LENGTH + LENGTH + b"\r\n" + BODY,
        ASK + TE + b"\r\n" + CHUNKED.replace(b"\r\n", b";name=value\r\n", 1),
        ASK + TE + b"\r\n" + CHUNKED[:-2] + b"x-trailer: a\r\n\r\n",
        ASK + TE.upper() + b"\r\n" + CHUNKED,
        ASK.replace(b"POST /", b"POST http://localhost/") + LENGTH + b"\r\n" + BODY,
    ],
)
def test_a_message_with_one_reading_is_read(running, sent):
    assert status(exchange(running.gateway.port, sent)) == 200


@pytest.mark.parametrize(
    "more",
    [
        b"x-request-id: " + b"a" * 60_000,
        b"\r\n".join(b"x-%d: a" % i for i in range(8000)),
        b"x-" + b"a" * 60_000 + b": b",
    ],
)
def test_a_header_has_a_size(running, more):
    came = exchange(running.gateway.port, ASK + LENGTH + more + b"\r\n\r\n" + BODY)
    assert status(came) in (431, None)
    assert len(running.ask()["results"]) == 4


@pytest.mark.parametrize(
    "begun",
    [b"G", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-a: ", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nG"],
    ids=["first byte", "header", "second request"],
)
def test_a_header_that_drips_is_cut(run, begun):
    """Bytes that go on coming do not put the end off."""
    with run(http={"header_seconds": 0.5, "max_connections": 20}) as one:
        port = one.gateway.port
        slow = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(20)]
        for client in slow:
            client.sendall(begun)
        left = dict.fromkeys(slow, b"")
        deadline = time.monotonic() + 30
        while left:
            assert time.monotonic() < deadline, f"{len(left)} connections are still open"
            time.sleep(0.05)
            for client in list(left):
                try:
                    client.sendall(b"a")
                    client.setblocking(False)
                    left[client] += (data := client.recv(65536))
                    if not data:
                        raise ConnectionResetError
                except BlockingIOError:
                    pass
                except (ConnectionResetError, BrokenPipeError):
                    del left[client]
                finally:
                    client.setblocking(True)
        for client in slow:
            client.close()
        until(lambda: one.post("/v1/rerank", {"query": "q", "documents": ["d"]}).status_code == 200)


def test_a_header_that_is_late_is_told_so(run):
    with run(http={"header_seconds": 0.2}) as one:
        came = exchange(one.gateway.port, b"GET /health HTTP/1.1\r\n")
    assert status(came) == 408
    assert json.loads(came.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/rerank HTTP/1.1\r\n",
        b"POST /v1/explain HTTP/1.1\r\n",
        b"POST /v1/collections/slow/passages HTTP/1.1\r\ncontent-type: application/json\r\n",
        b"POST /v1/collections/slow/passages HTTP/1.1\r\ncontent-type: application/x-ndjson\r\n",
        b"PUT /v1/aliases/slow HTTP/1.1\r\ncontent-type: application/json\r\n",
        b"DELETE /v1/collections/slow/passages HTTP/1.1\r\ncontent-type: application/json\r\n",
    ],
)
def test_a_body_that_drips_is_cut(run, head):
    with run(http={"timeout_seconds": 0.5, "header_seconds": 0.5}) as one:
        drip = [b'"'] * 200
        began = head + b"host: localhost\r\ncontent-length: 100000\r\n\r\n"
        came = exchange(one.gateway.port, began, *drip, pause=0.05)
    assert status(came) in (408, None)  # None: the next byte reset the connection before its answer was read


@pytest.mark.parametrize("path", [b"/nowhere", b"/v1/rerank"])
def test_a_body_that_was_answered_already_has_an_end(run, path):
    """It is read for a while, so that the client sees the answer; not for as long as it drips."""
    with run(http={"header_seconds": 0.5, "max_body_bytes": 1000}) as one:
        head = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n" % path
        with socket.create_connection(("127.0.0.1", one.gateway.port), timeout=20) as client:
            client.sendall(head + b"x" * 1001)
            assert status(client.recv(65536)) in (404, 413)
            until(lambda: not _takes(client, b"x"))


def _takes(client, data):
    try:
        client.sendall(data)
    except (ConnectionResetError, BrokenPipeError):
        return False
    return True


def test_a_handshake_that_drips_is_cut(run, pem):
    cert, key = pem
    with run(tls_cert_file=cert, tls_key_file=key, http={"header_seconds": 0.5}) as secured:
        came = exchange(secured.gateway.port, b"\x16\x03\x01", *[b"\x01"] * 200, pause=0.05)
        assert came == b"" or came[0] == 0x15  # nothing, or an alert


def test_a_path_forges_no_line_of_the_log(run, capsys):
    import io
    import logging

    from preread_edge.access import ApiKeys
    from preread_edge.logs import set_up

    root, stream = logging.getLogger(), io.StringIO()
    before = root.handlers[:]
    set_up("text", "info", stream)
    try:
        with run(keys=ApiKeys.parse(["a-key-0123456789abc"])) as one:
            for path in (b"/%0A2026-01-01%2000:00:00.000%20info%20forged", b"/%1b[31m%E2%80%A8%C2%85%7f%E2%80%AE"):
                exchange(one.gateway.port, b"GET %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n" % path)
    finally:
        root.handlers[:] = before
        for package in ("preread", "decoder_server", "encoder_worker", "cache", "checkpoint"):
            logging.getLogger(package).setLevel(logging.NOTSET)
    lines = stream.getvalue().split("\n")
    assert sum("without a known key" in line for line in lines) == 2
    assert not any(line.startswith("2026-01-01") for line in lines)
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("content", [b'{"query": "' + b'\\"' * 40_000, b'"' + b"\\" * 80_001, b'{"texts' * 9000])
def test_the_dialect_of_what_is_no_json_is_told_at_once(running, content):
    """It is told by the names there are, and each place was once looked at for each before it: 15 s for 64 KiB."""
    path = f"http://127.0.0.1:{running.gateway.port}/rerank"
    response = httpx2.post(path, content=content, timeout=10)

    assert response.status_code == 400
    assert response.json()["message"][9:17] == "not JSON"
