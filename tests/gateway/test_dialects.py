"""Each client's raw body gets that client's answer, and all of them the same ranking."""

from __future__ import annotations

import json

import pytest

PATHS = [
    "/rerank", "/v1/rerank", "/v2/rerank", "/v1/v2/rerank", "/reranking", "/v1/reranking", "/rerankings",
    "/v1/rerankings", "/v1/ranking", "/v1/retrieval/nvidia/some-model/reranking", "/score", "/v1/score",
]  # fmt: skip


@pytest.fixture(scope="module")
def ranking(running):
    """(index, score) best first, from our own service."""
    answer = running.ask()
    return [(result["index"], result["relevance_score"]) for result in answer["results"]]


def strings(document):
    """Every string in a JSON document."""
    if isinstance(document, str):
        yield document
    elif isinstance(document, list | dict):
        for item in document.values() if isinstance(document, dict) else document:
            yield from strings(item)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_answers(running, ranking, path):
    answer = running.ask(path, model="default")

    assert [(r["index"], r["relevance_score"]) for r in answer["results"]] == ranking


@pytest.mark.parametrize("path", ["/v1//rerank", "//v1/rerank", "/v1/rerank/", "/tei//rerank/"])
def test_a_base_url_that_ends_in_a_slash(running, ranking, query, documents, path):
    response = running.post(path, {"query": query, "texts": documents})

    assert [(r["index"], r["score"]) for r in response.json()] == ranking


def test_a_path_of_nim_names_the_model(running, query, documents):
    response = running.post("/v1/retrieval/nvidia/some-model/reranking", {"query": query, "documents": documents})

    assert response.status_code == 404
    assert "'nvidia/some-model'" in response.json()["message"]


def test_superset(running, ranking):
    answer = running.ask()

    assert answer["object"] == "rerank"
    assert answer["model"] == running.engine.name
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
    assert answer["meta"]["api_version"] == {"version": "2"}
    assert answer["meta"]["billed_units"] == {"search_units": 1}
    assert answer["meta"]["tokens"]["input_tokens"] == answer["usage"]["total_tokens"]
    coarse = running.ask(compression_ratio=2**31 - 1, top_n=1)
    assert coarse["usage"]["total_tokens"] <= 2 * answer["usage"]["total_tokens"]
    assert "warnings" not in answer["meta"]
    assert "error" not in answer
    assert isinstance(answer["created"], int)
    assert all(set(result) == {"index", "relevance_score"} for result in answer["results"])
    assert all(0 <= score <= 1 for _, score in ranking)
    assert [score for _, score in ranking] == sorted((score for _, score in ranking), reverse=True)
    assert all(strings(answer))


def test_4d_ai_kit_as_its_example_has_it(running, ranking, query, documents):
    body = {"model": "default", "top_n": 3, "query": query, "documents": documents}
    older = running.post("/v1/rerank", body, headers={"Authorization": "Bearer whatever"}).json()
    newer = running.post("/v1/rerank", body | {"return_documents": True, "user": "someone"}).json()

    assert [r["index"] for r in older["results"]] == [index for index, _ in ranking[:3]]
    assert all("document" not in r for r in older["results"])
    assert [r["document"] for r in newer["results"]] == [{"text": documents[i]} for i, _ in ranking[:3]]


def test_4d_ai_kit_of_type_tei(running, ranking, query, documents):
    answer = running.post("/v1/rerank", {"query": query, "texts": documents, "return_text": True, "top_n": 3}).json()

    assert answer == [{"index": i, "score": score, "text": documents[i]} for i, score in ranking[:3]]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v1/reranking", "/tei/rerank"])
def test_llama_cpp_and_vllm(running, ranking, path):
    """Both send the same; a prefix forces its dialect whatever the body says."""
    body = {"model": None, "top_n": 2, "truncate_prompt_tokens": -1, "priority": 0}
    if path.startswith("/tei"):
        error = running.refused(400, path, **body)
        assert error == {"error": "texts is 'absent'; expected a list of texts, or passage_ids and a collection",
                         "error_type": "validation"}  # fmt: skip
    else:
        assert [r["index"] for r in running.ask(path, **body)["results"]] == [i for i, _ in ranking[:2]]


def test_tei(running, ranking, query, documents):
    raw = running.post("/rerank", {"query": query, "texts": documents, "raw_scores": True, "truncate": True}).json()
    plain = running.post("/tei/rerank", {"query": query, "texts": documents}).json()

    assert plain == [{"index": i, "score": score} for i, score in ranking]
    assert [rank["index"] for rank in raw] == [i for i, _ in ranking]
    assert sum(rank["score"] for rank in raw) != pytest.approx(sum(score for _, score in ranking))


def test_nim(running, ranking, query, documents):
    body = {"query": {"text": query}, "passages": [{"text": text} for text in documents], "truncate": "END"}
    answer = running.post("/v1/ranking", body).json()

    assert set(answer) == {"rankings"}
    assert [r["index"] for r in answer["rankings"]] == [i for i, _ in ranking]
    assert all(set(r) == {"index", "logit"} for r in answer["rankings"])


@pytest.mark.parametrize("more", [{"top_k": 2}, {"top_k": 2, "truncation": True}, {"top_k": None, "truncation": False}])
def test_voyage(running, ranking, documents, more):
    answer = running.ask("/v1/rerank", return_documents=True, **more)

    expected = ranking[: more["top_k"]]
    assert answer["object"] == "list"
    assert answer["data"] == [{"index": i, "relevance_score": s, "document": documents[i]} for i, s in expected]
    assert set(answer["usage"]) == {"total_tokens"}


def test_mixedbread(running, ranking, query, documents):
    body = {"query": query, "input": documents, "top_k": 2, "return_input": True}
    answer = running.post("/v1/reranking", body).json()

    assert answer["data"] == [{"index": i, "score": s, "input": documents[i]} for i, s in ranking[:2]]


def test_infinity(running, ranking, documents):
    answer = running.ask("/infinity/rerank", return_documents=True, model="default/not-specified", top_n=2)

    assert answer["object"] == "rerank"
    assert [r["document"] for r in answer["results"]] == [documents[i] for i, _ in ranking[:2]]
    raw = running.ask("/infinity/rerank", raw_scores=True, return_margins=True)
    assert all(r["relevance_score"] == r["margin"] for r in raw["results"])


def test_score(running, ranking, query, documents):
    one_to_many = running.post("/score", {"text_1": query, "text_2": documents}).json()
    pairs = running.post("/v1/score", {"pairs": [[query, text] for text in documents]}).json()

    assert one_to_many["object"] == "list"
    assert [item["score"] for item in one_to_many["data"]] == [score for _, score in sorted(ranking)]
    assert [item["index"] for item in one_to_many["data"]] == [0, 1, 2, 3]
    assert pairs["data"] == one_to_many["data"]


def test_score_of_several_queries_keeps_their_order(running, query, documents):
    queries = [query, "What is the capital of France?", query]
    together = running.post("/score", {"text_1": queries, "text_2": documents[:3]}).json()["data"]

    for position, (one, text) in enumerate(zip(queries, documents, strict=False)):
        alone = running.post("/score", {"text_1": one, "text_2": text}).json()["data"][0]
        assert together[position]["score"] == pytest.approx(alone["score"], abs=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"pairs": []}, "pairs"),
        ({"pairs": [["a", "b"], ["a"]]}, "pairs[1]"),
        ({"pairs": [["a", "b"], ["c", "\ud800"]]}, "pairs[1][1]"),
        ({"pairs": [[str(i), "x"] for i in range(1001)]}, "pairs"),
        ({"text_1": "a"}, "text_2"),
        ({"text_1": ["a", "b"], "text_2": ["x", "y", "z"]}, "text_2"),
        ({"text_1": ["a", "b", "a"], "text_2": ["x", "y", "z" * 2_000_000]}, "text_2[2]"),
        ({"text_1": "", "text_2": "x"}, "text_1"),
        ({"text_1": ["a", ""], "text_2": ["x", "y"]}, "text_1[1]"),
        ({"pairs": [["a", "b"], ["", "c"]]}, "pairs[1][0]"),
    ],
)
def test_pairs_are_checked(running, body, param):
    response = running.http.post("/score", content=json.dumps(body))

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_answers_are_json_with_an_id(running, query, documents):
    given = running.post("/rerank", {"query": query, "documents": documents}, headers={"x-request-id": "mine-7"})
    made = running.post("/rerank", {"query": query, "documents": documents}, headers={"x-request-id": "bad id"})

    assert given.headers["x-request-id"] == "mine-7" == given.json()["id"]
    assert made.headers["x-request-id"] == made.json()["id"] != "bad id"
    assert given.headers["content-type"] == "application/json"
    json.loads(given.content, parse_constant=pytest.fail)
