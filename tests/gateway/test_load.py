"""Too much: bodies, requests, connections, time. Everyone is told so, and the rest goes on."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import httpx2
import pytest

from preread_edge.listener import SPARE


def test_a_body_over_the_limit_is_413(run, query):
    with run(http={"max_body_bytes": 1000}) as small:
        declared = small.post("/rerank", {"query": query, "documents": ["x" * 2000]})
        chunked = small.http.post("/rerank", content=iter([b"x" * 600] * 4))
        assert small.post("/rerank", {"query": query, "documents": ["x"]}).status_code == 200

    for response in (declared, chunked):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"


def test_a_body_compressed_by_anything_but_gzip_is_415(running):
    for path, kind in (("/rerank", "application/json"), ("/v1/collections/c/passages", "application/x-ndjson")):
        headers = {"content-encoding": "br", "content-type": kind}
        response = running.http.post(path, content=b"\x1f\x8b", headers=headers)
        assert response.status_code == 415
        assert response.json()["error"]["code"] == "unsupported_encoding"


def test_overload_is_429_with_a_hint_and_ends(run, query, documents):
    with run(max_queue_requests=1) as one:
        one.backend.gate.clear()
        first = threading.Thread(target=one.ask)
        first.start()
        assert one.backend.entered.wait(10)
        refused = [one.post("/rerank", {"query": query, field: documents}) for field in ("documents", "texts")]
        one.backend.gate.set()
        first.join()
        assert len(one.ask()["results"]) == 4

    for response in refused:
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert int(response.headers["retry-after-ms"]) >= 1
    assert refused[0].json()["error"]["code"] == "overloaded"
    assert refused[1].json()["error_type"] == "overloaded"


def test_a_deadline_is_504(running, query, documents):
    running.backend.gate.clear()
    try:
        body = {"query": query, "documents": documents}
        late = running.post("/rerank", body, headers={"x-request-timeout-ms": "100"})
        wrong = running.post("/rerank", body, headers={"x-request-timeout-ms": "soon"})
    finally:
        running.backend.gate.set()

    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert wrong.status_code == 400


def test_a_client_that_leaves_is_not_computed_for(run, documents):
    """While a first pass runs, a second request waits and leaves: no further pass is made."""
    with run(max_batch_tokens=1) as one:
        one.ask()  # texts are encoded from here on
        one.backend.gate.clear()
        one.backend.entered.clear()
        first = threading.Thread(target=one.ask)
        first.start()
        assert one.backend.entered.wait(10)
        body = json.dumps({"query": "another one", "documents": documents}).encode()
        with socket.create_connection(("127.0.0.1", one.gateway.port)) as leaving:
            head = f"POST /rerank HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
            leaving.sendall(head.encode() + body)
            _until(lambda: one.engine.admission.num_requests == 2)
        _until(lambda: one.engine.admission.num_requests == 1)
        num_passes = len(one.backend.passes)
        one.backend.gate.set()
        first.join()
        assert len(one.backend.passes) - num_passes == len(documents) - 1


def _until(holds, seconds=10):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def test_many_at_once_answer_as_one_alone(running, query, documents):
    alone = running.ask()["results"]

    async with httpx2.AsyncClient(base_url=running.url, timeout=30) as client:
        body = {"query": query, "documents": documents}
        answers = await asyncio.gather(*(client.post("/rerank", json=body) for _ in range(20)))

    for answer in answers:
        together = answer.json()["results"]
        assert [r["index"] for r in together] == [r["index"] for r in alone]
        assert [r["relevance_score"] for r in together] == pytest.approx(
            [r["relevance_score"] for r in alone], abs=1e-5
        )


def test_a_connection_too_many_is_told_so_and_probes_get_in(run, query, documents):
    body = {"query": query, "documents": documents}
    with run(http={"max_connections": 2}) as small:
        address = ("127.0.0.1", small.gateway.port)
        held = [socket.create_connection(address) for _ in range(2)]
        assert small.http.get("/health").status_code == 200
        refused = [small.post(path, body) for path in ("/v1/rerank", "/tei/rerank")]
        assert small.http.get("/metrics").text.count('preread_http_answers_total{status="429"} 2.0') == 1
        for one in held:
            one.close()

        def answers() -> bool:
            try:
                return bool(small.post("/v1/rerank", body).status_code == 200)
            except httpx2.TransportError:  # one more was refused, and closed before its answer was read
                return False

        _until(answers)

    for response in refused:
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-request-id"]
        assert response.headers["connection"] == "close"
    assert refused[0].json()["error"]["code"] == "too_many_connections"
    assert refused[1].json()["error_type"] == "overloaded"


def test_connections_have_an_end_even_for_those_who_do_not_listen(run):
    with run(http={"max_connections": 2}) as small:
        address = ("127.0.0.1", small.gateway.port)
        held = [socket.create_connection(address, timeout=10) for _ in range(2 + SPARE + 1)]
        try:
            last = held[-1].recv(1)
        except ConnectionResetError:
            last = b""
        assert last == b""
        for one in held:
            one.close()
        _until(lambda: len(small.ask()["results"]) == 4)


def test_a_connection_that_asks_nothing_ends(run):
    with (
        run(http={"header_seconds": 0.05}) as one,
        socket.create_connection(("127.0.0.1", one.gateway.port), timeout=10) as silent,
    ):
        assert silent.recv(1) == b""
        assert len(one.ask()["results"]) == 4
