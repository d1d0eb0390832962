"""The request rules hold in every dialect, and every refusal is JSON that its client can read."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import httpx2
import pytest

from preread.edge.keys import parse_keys

LONG = "network " * 5000


@pytest.mark.parametrize(
    ("top_n", "expected"), [(None, 4), (0, 4), (1, 1), (3, 3), (3.0, 3), (4, 4), (99, 4), (10**30, 4)]
)
def test_top_n(running, top_n, expected):
    assert len(running.ask(top_n=top_n)["results"]) == expected


def test_unknown_fields_are_ignored_and_null_is_absent(running):
    plain = running.ask()["results"]

    nulls = dict.fromkeys(["model", "user", "instruction", "collection", "on_miss", "texts", "input", "passage_ids"])
    assert running.ask(**nulls, rank_fields=["text"], nonsense={"a": [1]})["results"] == plain


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": []}, "documents"),
        ({"documents": None}, "documents"),
        ({"documents": "one string"}, "documents"),
        ({"documents": ["fine", 7]}, "documents[1]"),
        ({"documents": ["fine", {"title": "no text"}]}, "documents[1]"),
        ({"documents": [""]}, "documents[0]"),
        ({"documents": ["x"] * 1001}, "documents"),
        ({"documents": ["\ud800"]}, "documents[0]"),
        ({"documents": [{"id": "p"}]}, "collection"),
        ({"query": None}, "query"),
        ({"query": ""}, "query"),
        ({"query": ["a", "b"]}, "query"),
        ({"query": "x" * 20000}, "query"),
        ({"top_n": -1}, "top_n"),
        ({"top_n": "3"}, "top_n"),
        ({"top_n": True}, "top_n"),
        ({"top_n": 1.5}, "top_n"),
        ({"return_documents": "yes"}, "return_documents"),
        ({"on_miss": "cry"}, "on_miss"),
        ({"compression_ratio": -4}, "compression_ratio"),
        ({"passage_ids": ["a"]}, "passage_ids"),
    ],
)
def test_validation_is_400_and_names_the_field(running, fields, param):
    body = json.dumps({"query": "q", "documents": ["a", "b"]} | fields)  # ASCII, so that half a pair can travel
    response = running.http.post("/v1/rerank", content=body)

    error = response.json()
    assert response.status_code == 400, error
    assert error["error"]["param"] == param
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["code"] == "invalid_value"
    assert error["message"] == error["detail"] == error["error"]["message"] != ""


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\xfa", b'{"query": NaN}', b"[" * 100_000, b'"text"'])
def test_what_is_no_json_object_is_400(running, content):
    response = running.http.post("/v1/rerank", content=content)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "body"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/rerank", 405), ("POST", "/health", 405), ("GET", "/nowhere", 404), ("POST", "/v1", 404)],
)
def test_the_router_speaks_json_too(running, method, path, status):
    response = running.http.request(method, path)

    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert response.headers["x-request-id"]


def test_an_unknown_model_is_404_and_the_served_one_is_named(running):
    error = running.refused(404, model="rerank-v3.5")

    assert error["error"]["code"] == "model_not_found"
    assert running.engine.name in error["message"]


def test_errors_of_tei_have_its_shape(running, query):
    by_body = running.post("/rerank", {"query": query, "texts": []})
    by_path = running.http.get("/tei/nowhere")

    assert by_body.status_code == 400
    assert set(by_body.json()) == set(by_path.json()) == {"error", "error_type"}
    assert by_body.json()["error_type"] == "validation"
    assert by_path.status_code == 404


def test_a_candidate_that_cannot_be_scored_costs_itself(running, documents):
    answer = running.ask(documents=[*documents, "", "x" * 2_000_000])

    assert sorted(r["index"] for r in answer["results"]) == [0, 1, 2, 3]
    assert [line.split(" was")[0] for line in answer["meta"]["warnings"]] == ["documents[4]", "documents[5]"]


def test_a_text_over_the_limit_is_cut_unless_that_is_refused(running, query):
    settings = running.engine.backend.settings
    assert len(running.ask(documents=[LONG])["results"]) == 1
    voyage = running.refused(400, documents=["short", LONG], truncation=False)
    tei = running.post("/rerank", {"query": query, "texts": [LONG], "truncate": False})
    nim = running.post("/v1/ranking", {"query": {"text": query}, "passages": [{"text": LONG}], "truncate": "NONE"})

    assert voyage["error"]["param"] == "documents[1]"
    assert str(settings.max_passage_tokens) in voyage["message"]
    assert (tei.status_code, nim.status_code) == (400, 400)
    assert running.ask(query=LONG[:16000])["meta"]["warnings"] == ["the query was truncated"]


def test_max_tokens_per_doc_cuts_the_text(running):
    """The cut text scores what it scores when it is sent by itself."""
    text = "Deep learning uses neural networks with many layers."
    cut = running.engine.backend.cut(text, 4)
    assert text.startswith(cut)
    assert 0 < len(cut) < len(text)

    both = running.ask(documents=[text, cut], max_tokens_per_doc=4)["results"]
    assert both[0]["relevance_score"] == both[1]["relevance_score"]
    whole = running.ask(documents=[text, cut], max_tokens_per_doc=400)["results"]
    assert whole[0]["relevance_score"] != whole[1]["relevance_score"]


def test_truncation_from_the_left_keeps_the_end(running, query):
    text = LONG + "and this is the end"
    kept = running.engine.backend.cut(text, None, keep_end=True)
    assert text.endswith(kept)
    assert len(kept) < len(text)

    left = running.post("/rerank", {"query": query, "texts": [text, kept], "truncation_direction": "Left"}).json()
    right = running.post("/rerank", {"query": query, "texts": [text, kept], "truncation_direction": "Right"}).json()
    assert left[0]["score"] == left[1]["score"]
    assert right[0]["score"] != right[1]["score"]


def test_our_own_fields(running):
    plain = running.ask(return_margins=True)["results"]
    other = running.ask(return_margins=True, instruction="Find the passages that contradict the claim")["results"]
    coarse = running.ask(return_margins=True, compression_ratio=32)["results"]

    margins = [sorted((r["index"], r["margin"]) for r in results) for results in (plain, other, coarse)]
    assert margins[0] != margins[1]
    assert margins[0] != margins[2]


def test_ids_of_texts_come_back(running, documents):
    as_objects = running.ask(documents=[{"id": f"d{i}", "text": text} for i, text in enumerate(documents)])
    beside = running.ask(passage_ids=[f"d{i}" for i in range(4)])

    assert as_objects["results"] == beside["results"]
    assert all(result["id"] == f"d{result['index']}" for result in beside["results"])


def test_a_body_over_the_limit_is_413(run, query):
    with run(http={"max_body_bytes": 1000}) as small:
        declared = small.post("/rerank", {"query": query, "documents": ["x" * 2000]})
        chunked = small.http.post("/rerank", content=iter([b"x" * 600] * 4))
        assert small.post("/rerank", {"query": query, "documents": ["x"]}).status_code == 200

    for response in (declared, chunked):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"


def test_a_compressed_body_is_415(running):
    for path, kind in (("/rerank", "application/json"), ("/v1/collections/c/passages", "application/x-ndjson")):
        headers = {"content-encoding": "gzip", "content-type": kind}
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
            head = f"POST /rerank HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
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


def test_keys_and_scopes(run, query, documents):
    keys = parse_keys(["rerank:rerank-key-0123456789", "index:index-key-01234567890"])
    body = {"query": query, "documents": documents}
    with run(keys=keys) as guarded:
        none = guarded.post("/v1/rerank", body)
        wrong = guarded.post("/tei/rerank", body, headers={"authorization": "Bearer nobody-knows-this-one"})
        other = guarded.post("/v1/rerank", body, headers={"authorization": "Bearer index-key-01234567890"})
        right = guarded.post("/v1/rerank", body, headers={"authorization": "Bearer rerank-key-0123456789"})
        named = guarded.post("/v1/rerank", body, headers={"api-key": "rerank-key-0123456789"})
        upload = guarded.post("/v1/collections/c/passages", {}, headers={"api-key": "rerank-key-0123456789"})
        health = guarded.http.get("/health")
        models = guarded.http.get("/v1/models")

    assert [r.status_code for r in (none, wrong, other, right, named, upload, health, models)] == [
        401, 401, 403, 200, 200, 403, 200, 401
    ]  # fmt: skip
    assert none.json()["error"]["code"] == "invalid_api_key"
    assert none.headers["x-request-id"]
    assert set(wrong.json()) == {"error", "error_type"}


def test_without_an_encoder_texts_are_refused_clearly(run):
    with run(encoder=False) as alone:
        error = alone.refused(503)
        skipped = alone.ask(on_miss="skip")

    assert "no encoder worker is configured" in error["message"]
    assert skipped["results"] == []


def test_other_names_of_the_model(run):
    with run(http={"model_aliases": ("rerank-v3.5",)}) as one:
        assert one.ask(model="rerank-v3.5")["model"] == one.engine.name
        one.refused(404, model="rerank-v4")
    with run(http={"model_aliases": ("*",)}) as one:
        assert one.ask(model="anything")["model"] == one.engine.name


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
