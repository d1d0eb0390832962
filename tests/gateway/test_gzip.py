"""Bodies over gzip: inflated within the limits, off the event loop where that is long; a bomb costs its limit."""

from __future__ import annotations

import gzip
import json
import threading
import time
import tracemalloc
import zlib

import pytest

GZIP = {"content-encoding": "gzip"}
MIB = 1 << 20


def packed(document):
    return gzip.compress(json.dumps(document).encode())


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP"])
def test_a_body_over_gzip_is_read(running, query, documents, encoding):
    body = {"query": query, "documents": documents}
    response = running.http.post("/v1/rerank", content=packed(body), headers={"content-encoding": encoding})

    assert response.json()["results"] == running.ask()["results"]


def test_a_large_one_in_several_members_and_chunks(running, query):
    data = json.dumps({"query": query, "documents": [f"text {i} " * 400 for i in range(200)]}).encode()
    members = [gzip.compress(data[i : i + 100_000]) for i in range(0, len(data), 100_000)]
    whole = running.http.post("/v1/rerank", content=data).json()["results"]
    for content in (
        gzip.compress(data),
        b"".join(members),
        iter(members),
        gzip.compress(b"") * 100 + gzip.compress(data),
    ):
        assert running.http.post("/v1/rerank", content=content, headers=GZIP).json()["results"] == whole


def test_uploads_over_gzip(running):
    lines = b"".join(b'{"id": "%d", "text": "some words %d"}\n' % (i, i) for i in range(300))
    ndjson = running.http.post(
        "/v1/collections/packed/passages", content=gzip.compress(lines),
        headers=GZIP | {"content-type": "application/x-ndjson"},
    )  # fmt: skip
    document = {"passages": [{"id": "0", "text": "some words 0"}, {"id": "new", "text": "more"}]}
    plain = running.http.post(
        "/v1/collections/packed/passages", content=packed(document), headers=GZIP | {"content-type": "application/json"}
    )

    assert (ndjson.status_code, ndjson.json()["num_stored"]) == (200, 300), ndjson.text
    assert (plain.json()["num_stored"], plain.json()["num_unchanged"]) == (1, 1)


WHOLE = packed({"query": "q", "documents": ["a"] * 50})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (WHOLE[:-1], "part of a gzip stream"),
        (WHOLE[:20], "part of a gzip stream"),
        (b"\x1f\x8b", "part of a gzip stream"),
        (WHOLE + b"more", "not gzip"),
        (WHOLE[:-8] + b"\0" * 8, "not gzip"),  # another checksum
        (WHOLE[:30] + b"\xff" * 10 + WHOLE[40:], "body is"),
        (b'{"query": "q", "documents": ["a"]}', "not gzip"),
        (zlib.compress(b"{}"), "not gzip"),
        (b"", "empty"),
        (gzip.compress(b""), "empty"),
        (gzip.compress(WHOLE), "not JSON"),
    ],
)
def test_what_is_no_gzip_is_400(running, content, says):
    response = running.http.post("/v1/rerank", content=content, headers=GZIP)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "body"
    assert says in response.json()["message"]


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, gzip", "zstd"])
def test_any_other_encoding_is_415(running, encoding):
    response = running.http.post("/v1/rerank", content=WHOLE, headers={"content-encoding": encoding})

    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_encoding")


def bomb_of(num_members):
    """300 MiB of blanks in some 300 KB."""
    blank = b" " * (300 * MIB // num_members)
    return gzip.compress(blank, 9) * num_members


@pytest.mark.parametrize("num_members", [1, 300])
def test_a_bomb_is_413_and_takes_no_memory(run, num_members):
    bomb = bomb_of(num_members)
    assert len(bomb) < MIB
    with run(http={"max_body_bytes": 4 * MIB}) as one:
        one.ask()
        tracemalloc.start()
        try:
            response = one.http.post("/rerank", content=bomb, headers=GZIP)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert most < 16 * MIB


def test_empty_members_without_end_end(running):
    start = time.monotonic()
    response = running.http.post("/rerank", content=gzip.compress(b"") * 200_000, headers=GZIP)

    assert (response.status_code, response.json()["error"]["param"]) == (400, "body")
    assert time.monotonic() - start < 30


def test_others_are_answered_while_a_long_one_is_inflated(running):
    blank = gzip.compress(b"[" + b" " * (60 * MIB) + b"]")
    bomb = threading.Thread(target=running.http.post, args=("/rerank",), kwargs={"content": blank, "headers": GZIP})
    bomb.start()
    slowest = 0.0
    while bomb.is_alive():
        start = time.monotonic()
        assert running.http.get("/health").status_code == 200
        slowest = max(slowest, time.monotonic() - start)
    assert slowest < 1.0


@pytest.mark.parametrize("field", ["documents", "texts"])
def test_an_error_has_the_shape_of_the_dialect_inside(running, field):
    for content in (packed({"query": "q", field: []}), gzip.compress(b'{"query": "q", "%s": [}' % field.encode())):
        error = running.http.post("/rerank", content=content, headers=GZIP).json()
        assert isinstance(error["error"], str) == (field == "texts")
