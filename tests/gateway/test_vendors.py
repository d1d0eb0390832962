"""Shapes of dialects that one service speaks, byte for byte as its documentation and its clients have them."""

from __future__ import annotations

import json

import pytest

PINECONE = {"x-pinecone-api-version": "2026-04"}


@pytest.fixture(scope="module")
def ranking(running):
    """(index, score) best first."""
    return [(result["index"], result["relevance_score"]) for result in running.ask()["results"]]


def test_pinecone(running, ranking, query, documents):
    """What both of its SDKs send: objects, and rank_fields of one field."""
    sent = [{"id": f"their-{i}", "text": text, "year": 2000 + i} for i, text in enumerate(documents)]
    body = {"model": "default", "query": query, "documents": sent, "rank_fields": ["text"], "return_documents": True}
    answer = running.post("/rerank", body | {"top_n": 3, "parameters": {}}, headers=PINECONE).json()

    assert answer["model"] == running.engine.name
    assert answer["usage"] == {"rerank_units": 1}
    assert [(one["index"], one["score"]) for one in answer["data"]] == ranking[:3]
    assert [one["document"] for one in answer["data"]] == [sent[index] for index, _ in ranking[:3]]
    bare = running.post("/rerank", body | {"return_documents": False}, headers=PINECONE).json()
    assert all("document" not in one for one in bare["data"])


def test_pinecone_in_plain_strings_and_by_another_field(running, ranking, query, documents):
    plain = running.post("/pinecone/rerank", {"query": query, "documents": documents}).json()
    other = [{"id": i, "chunk": text} for i, text in enumerate(documents)]
    by_field = running.post("/pinecone/rerank", {"query": query, "documents": other, "rank_fields": ["chunk"]}).json()

    assert [(one["index"], one["score"]) for one in plain["data"]] == ranking
    assert [one["document"] for one in plain["data"]] == [{"text": documents[index]} for index, _ in ranking]
    assert [(one["index"], one["score"]) for one in by_field["data"]] == ranking
    assert [one["document"] for one in by_field["data"]] == [other[index] for index, _ in ranking]


def test_pinecone_of_long_texts(running, query):
    body = {"query": query, "documents": [{"text": "network " * 5000}]}
    for parameters, status in ((None, 200), ({"truncate": "END"}, 200), ({"truncate": "NONE"}, 400)):
        response = running.post("/pinecone/rerank", body | {"parameters": parameters})
        assert response.status_code == status, response.text


def test_a_large_pinecone_response_is_whole(running, query):
    sent = [{"text": f"text {i}", "blob": "x" * 50_000, "tags": [*range(100)]} for i in range(40)]
    answer = running.post("/pinecone/rerank", {"query": query, "documents": sent}).json()

    assert len(answer["data"]) == 40
    assert all(one["document"] == sent[one["index"]] for one in answer["data"])


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ('{"text": "a", "other": "\\ud800"}', "documents[0] is 'half of a surrogate pair'"),
        ('{"text": "a", "\\udc00": 1}', "documents[0] is 'half of a surrogate pair'"),
        ('{"text": "a", "id": "\\ud800"}', "half of a surrogate pair"),
        ('{"text": "a", "other": 1e999}', "documents[0] is 'a number that is not finite'"),
        ('{"id": "a"}', "documents[0] is 'an object without text'"),
        ("{}", "documents[0] is 'an object without text'"),
        ("7", "documents[0]"),
        ('["a"]', "documents[0]"),
    ],
)
def test_a_pinecone_document_that_cannot_be_sent_back_is_refused(running, document, says):
    response = running.http.post("/rerank", content=f'{{"query": "q", "documents": [{document}]}}', headers=PINECONE)

    assert response.status_code == 400, response.text
    assert says in response.json()["message"]


@pytest.mark.parametrize("path", ["/pinecone/rerank", "/v1/rerank"])
def test_a_deep_document_is_answered_or_refused(running, path):
    codes = set()
    for depth in (50, 500, *range(850, 1000, 3), 5000):
        nested = "[" * depth + "]" * depth
        response = running.http.post(path, content=f'{{"query": "q", "documents": [{{"a": "b", "other": {nested}}}]}}')
        codes.add(response.status_code)
        assert response.status_code in (200, 400), depth
    assert codes == {200, 400}


def test_sglang(running, ranking, query, documents):
    answer = running.post("/sglang/v1/rerank", {"query": query, "documents": documents}).json()
    told = running.post("/v1/rerank", {"query": query, "documents": documents, "instruct": "Find the answer"}).json()
    plain = running.ask(instruction="Find the answer")["results"]

    assert [(one["index"], one["score"], one["document"]) for one in answer] == [
        (index, score, documents[index]) for index, score in ranking
    ]
    assert all(set(one) == {"index", "score", "document", "meta_info"} for one in answer)
    assert [(one["index"], one["score"]) for one in told] == [(r["index"], r["relevance_score"]) for r in plain]
    dashscope = running.ask("/compatible-api/v1/reranks", instruct="Find the answer")["results"]
    assert dashscope == plain
    short = {"query": query, "documents": documents, "return_documents": False, "top_n": 2}
    assert [set(one) for one in running.post("/sglang/rerank", short).json()] == [{"index", "score", "meta_info"}] * 2


def test_isaacus(running, ranking, query, documents):
    body = {"model": "default", "query": query, "texts": documents, "top_n": 2, "is_iql": False}
    more = {"scoring_method": "auto", "chunking_options": {"size": 10}}
    answer = running.post("/v1/rerankings", body | more).json()

    assert answer["results"] == [{"index": index, "score": score} for index, score in ranking[:2]]
    assert set(answer["usage"]) == {"input_tokens"}
    refused = running.post("/v1/rerankings", body | {"is_iql": True})
    assert refused.json()["message"] == "is_iql is 'true'; expected false: a query is read as text"


def test_weaviate(running, ranking, query, documents):
    """Scores in the order of the documents: its client pairs both by position."""
    response = running.http.post(
        "/rerank", content=json.dumps({"query": query, "documents": documents, "property": ""})
    )
    by_index = dict(ranking)

    assert response.json()["query"] == query
    assert response.json()["scores"] == [
        {"index": i, "document": text, "score": by_index[i]} for i, text in enumerate(documents)
    ]
    empty = running.post("/weaviate/rerank", {"query": query, "documents": ["", documents[0]], "top_n": 1}).json()
    assert [one["score"] for one in empty["scores"]] == [0.0, pytest.approx(by_index[0], abs=1e-5)]


def test_litellm_finds_its_list_whichever_provider_it_speaks_for(running, ranking, query, documents):
    body = {"model": "default", "query": query, "documents": documents, "return_documents": True}
    headers = {"user-agent": "litellm/1.83.0"}
    versioned = running.post("/v1/rerank", body, headers=headers).json()
    plain = running.post("/rerank", body, headers=headers).json()

    assert versioned["data"] == versioned["results"]
    assert [(one["index"], one["relevance_score"]) for one in versioned["data"]] == ranking
    assert [one["document"] for one in versioned["data"]] == [{"text": documents[index]} for index, _ in ranking]
    assert [set(one) for one in plain["results"]] == [{"index", "relevance_score"}] * 4
    assert len(running.post("/v1/rerank", body | {"top_k": 1}, headers=headers).json()["data"]) == 1
    for key, document in (("None", documents[ranking[0][0]]), ("fake-api-key", {"text": documents[ranking[0][0]]})):
        default = running.post("/rerank", body, headers=headers | {"authorization": f"Bearer {key}"}).json()
        assert default["results"][0]["document"] == document


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/rerank", {"documents": ["a"]}, ("usage",)),
        ("/infinity/rerank", {"documents": ["a"]}, ("usage",)),
        ("/v1/reranking", {"input": ["a"]}, ("usage",)),
        ("/score", {"query": None, "text_1": "q", "text_2": "a"}, ("usage",)),
    ],
)
def test_usage_has_all_three_counts(running, query, path, body, where):
    usage = running.post(path, {"query": query} | body).json()
    for name in where:
        usage = usage[name]

    assert usage["prompt_tokens"] == usage["total_tokens"] > 0
    assert usage["completion_tokens"] == 0


@pytest.mark.parametrize("one", ["query", ["query"]])
@pytest.mark.parametrize(
    "names", [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]
)
def test_every_form_of_vllms_scores(running, documents, names, one):
    expected = running.post("/score", {"pairs": [["query", text] for text in documents]}).json()["data"]
    for path in ("/score", "/v1/score"):
        answer = running.post(path, {names[0]: one, names[1]: documents}).json()
        assert answer["object"] == "list"
        assert answer["data"] == expected
    several = running.post("/score", {names[0]: ["query", "other"], names[1]: documents[:2]}).json()["data"]
    assert several[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"queries": "q"}, "documents"),
        ({"queries": "q", "documents": ["a"], "items": ["b"]}, "documents"),
        ({"queries": [], "items": ["b"]}, "queries"),
        ({"queries": ["a", ""], "items": ["b", "c"]}, "queries[1]"),
        ({"queries": ["a", "b"], "items": ["b"]}, "items"),
        ({"data_1": "q"}, "data_2"),
        ({"data_1": "q", "data_2": [7]}, "data_2[0]"),
        ({"data_1": "q", "data_2": ["\ud800"]}, "data_2[0]"),
        ({"queries": "q", "items": ["x"] * 1001}, "items"),
    ],
)
def test_pairs_are_checked_in_every_form(running, body, param):
    response = running.http.post("/score", content=json.dumps(body))

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
