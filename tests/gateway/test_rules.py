"""The request rules hold in every dialect, and every refusal is JSON that its client can read."""

from __future__ import annotations

import json

import pytest


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
    ("path", "fields", "found", "near"),
    [
        ("/v1/rerank", {"compresion_ratio": 4}, "compresion_ratio is 4", "compression_ratio?"),
        ("/v1/rerank", {"onMiss": "skip"}, "onMiss is 'skip'", "on_miss?"),
        ("/v2/rerank", {"top-n": 1}, "top-n is 1", "top_n?"),
        ("/voyage/v1/rerank", {"topK": 1}, "topK is 1", "top_k?"),
        ("/v1/rerank", {"documents": None, "txts": ["a"]}, "txts is 'a list'", "texts?"),
        ("/v1/rerank", {"stages": [{"compression_ratio": 8, "kepp": 2}, {"compression_ratio": 4}]},
         "stages[0].kepp is 2", "keep?"),
        ("/score", {"text_1": "a", "text_2": "b", "instructions": ""}, "instructions is ''", "instruction?"),
        ("/v1/explain", {"frist": 3}, "frist is 3", "first?"),
    ],
)  # fmt: skip
def test_a_misspelled_field_is_refused_with_the_nearest(running, path, fields, found, near):
    refused = running.refused(400, path, **fields)

    assert refused["message"] == f"{found}; expected a known field: did you mean {near}"
    assert refused["error"]["param"] == found.partition(" is ")[0]
    assert refused["error"]["code"] == "invalid_value"


def test_a_misspelled_field_is_refused_in_the_shape_of_tei(running, query, documents):
    refused = running.post("/rerank", {"query": query, "texts": documents, "return_txt": True})

    assert refused.status_code == 400
    message = "return_txt is 'true'; expected a known field: did you mean return_text?"
    assert refused.json() == {"error": message, "error_type": "validation"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": []}, "documents"),
        ({"documents": None}, "documents"),
        ({"documents": "one string"}, "documents"),
        ({"documents": ["fine", 7]}, "documents[1]"),
        ({"documents": ["fine", {"title": "no text"}]}, "documents[1]"),
        ({"documents": ["x"] * 1001}, "documents"),
        ({"documents": ["\ud800"]}, "documents[0]"),
        ({"documents": [{"id": "p"}]}, "collection"),
        ({"query": None}, "query"),
        ({"query": ""}, "query"),
        ({"query": ["a", "b"]}, "query"),
        ({"query": "x" * 2_000_000}, "query"),
        ({"top_n": -1}, "top_n"),
        ({"top_n": "three"}, "top_n"),
        ({"top_n": [3]}, "top_n"),
        ({"top_n": 1.5}, "top_n"),
        ({"return_documents": "maybe"}, "return_documents"),
        ({"on_miss": "cry"}, "on_miss"),
        ({"compression_ratio": -4}, "compression_ratio"),
        ({"passage_ids": ["a"]}, "passage_ids"),
        ({"documents": None, "passage_ids": []}, "passage_ids"),
        ({"documents": None, "passage_ids": ["a"] * 1001, "collection": "c"}, "passage_ids"),
        ({"documents": None, "passage_ids": ["a", ""], "collection": "c"}, "passage_ids[1]"),
        ({"documents": None, "passage_ids": ["a"]}, "collection"),
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


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("POST", "/v1/rerankk", "POST /v1/rerankk: no such path; did you mean /v1/rerank?"),
        ("GET", "/v1/collection/Docs", "GET /v1/collection/Docs: no such path; did you mean /v1/collections/Docs?"),
        ("POST", "/infinity/rerankk", "POST /infinity/rerankk: no such path; did you mean /infinity/rerank?"),
        ("GET", "/nowhere", "GET /nowhere: no such path; /openapi.json lists all paths"),
        ("GET", "/v1/rerank" * 500, f"GET {'/v1/rerank' * 20}: no such path; /openapi.json lists all paths"),
    ],
    ids=["rerank", "collection", "prefix", "none", "long"],
)
def test_an_unknown_path_is_404_with_the_nearest(running, method, path, message):
    response = running.http.request(method, path)

    assert (response.status_code, response.json()["message"]) == (404, message)
    assert response.json()["error"]["code"] == "path_not_found"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/rerank", "POST"),
        ("DELETE", "/v1/collections", "GET, HEAD"),
        ("PUT", "/v1/collections/docs/passages", "DELETE, GET, HEAD, POST"),
        ("POST", "/", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_405_with_those_that_there_are(running, method, path, allow):
    response = running.http.request(method, path)

    assert (response.status_code, response.headers["allow"]) == (405, allow)
    expected = allow.replace(", ", " or ")
    assert response.json()["message"] == f"{method} {path}: no such method here; expected {expected}"


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


def test_other_names_of_the_model(run):
    with run(http={"model_aliases": ("rerank-v3.5",)}) as one:
        assert one.ask(model="rerank-v3.5")["model"] == one.engine.name
        one.refused(404, model="rerank-v4")
    with run(http={"model_aliases": ("*",)}) as one:
        assert one.ask(model="anything")["model"] == one.engine.name
