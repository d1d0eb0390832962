"""Documents that are objects: which text is scored, and whose their ids are."""

from __future__ import annotations

import json

import pytest

FACTS = {"Title": "Facts about Carson City", "Content": "It is the capital of Nevada.", "id": "row-1"}


def scored(running, document, **more):
    """The text that was scored of a document."""
    (result,) = running.ask(documents=[document], return_documents=True, **more)["results"]
    return result["document"]["text"]


@pytest.mark.parametrize(
    ("document", "rank_fields", "text"),
    [
        (FACTS, None, "Title: Facts about Carson City\nContent: It is the capital of Nevada."),
        (FACTS, ["Content", "Title"], "Content: It is the capital of Nevada.\nTitle: Facts about Carson City"),
        (FACTS, ["Content"], "It is the capital of Nevada."),
        (FACTS, ["Content", "absent"], "It is the capital of Nevada."),
        ({"b": "second", "a": "first"}, None, "b: second\na: first"),
        ({"a": 1, "b": True, "c": None, "d": 2.5}, None, "a: 1\nb: true\nd: 2.5"),
        ({"a": ["x", {"y": "é"}], "b": {}}, None, 'a: ["x",{"y":"é"}]\nb: {}'),
        ({"text": "a text", "other": "not scored"}, None, "a text"),
        ({"title": "a title", "text": "a text"}, None, "a title a text"),
        ({"title": "a title", "text": "a text", "n": 1}, ["title", "text"], "a title a text"),
        ({"title": "a title", "text": "a text"}, ["text"], "a text"),
        ({"title": "a title", "text": "a text"}, ["title"], "a title"),
        ({"title": "a title", "content": "more"}, None, "title: a title\ncontent: more"),
        ({"text": None, "content": "more"}, None, "content: more"),
        ("a string", ["text"], "a string"),
    ],
)
def test_the_text_of_an_object(running, document, rank_fields, text):
    assert scored(running, document, rank_fields=rank_fields) == text


@pytest.mark.parametrize(
    ("path", "field", "where"),
    [("/rerank", "texts", None), ("/v1/ranking", "passages", "rankings"), ("/voyage/v1/rerank", "documents", "data"),
     ("/v1/reranking", "input", "data"), ("/infinity/rerank", "documents", "results")],
)  # fmt: skip
def test_in_every_dialect(running, query, path, field, where):
    joined = "Title: Facts about Carson City\nContent: It is the capital of Nevada."
    answers = [running.post(path, {"query": query, field: [one]}).json() for one in (FACTS, joined)]
    scores = [
        next(one[name] for name in ("score", "logit", "relevance_score") if name in one)
        for one in ((answer if where is None else answer[where])[0] for answer in answers)
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("their_id", ["row-1", 7, "p0"])
def test_ids_of_third_parties_are_echoed(running, their_id):
    documents = [{"id": their_id, "content": "some words"}, {"content": "other words"}, "a string"]
    results = running.ask(documents=documents)["results"]

    assert {one["index"]: one.get("id") for one in results} == {0: their_id, 1: None, 2: None}
    assert len(running.ask(documents=documents[:1], on_miss=None)["results"]) == 1


@pytest.fixture(scope="module")
def stored(running):
    """A collection whose id p0 is of a text that no request here sends."""
    passages = {"passages": [{"id": "p0", "text": "a stored text"}], "compression_ratio": 1}
    response = running.post("/v1/collections/theirs/passages", passages)
    assert response.status_code == 200, response.text
    return "theirs"


def test_ids_of_third_parties_are_never_looked_up(running, stored, query):
    """Pinecone's even where the request names a collection; others' where it names none."""
    sent = [{"id": "p0", "text": "another text"}]
    alone = running.post("/pinecone/rerank", {"query": query, "documents": [{"text": "another text"}]}).json()
    theirs = running.post("/pinecone/rerank", {"query": query, "documents": sent, "collection": stored}).json()
    missing = running.post("/pinecone/rerank", {"query": query, "documents": [{"id": "p0"}], "collection": stored})
    ours = running.ask(documents=[{"id": "p0"}], collection=stored)["results"]
    kept = running.ask(documents=[{"id": "p0", "meta": {"page": 3}}], collection=stored)["results"]

    assert theirs["data"][0]["score"] == alone["data"][0]["score"]
    assert theirs["data"][0]["document"] == sent[0]
    assert missing.status_code == 400
    assert ours == kept
    assert ours[0]["id"] == "p0"
    by_text = running.ask(documents=["a stored text"], compression_ratio=1)["results"]
    assert by_text[0]["relevance_score"] == ours[0]["relevance_score"]


def test_beside_ids_of_third_parties_every_document_has_a_score_or_the_request_fails(running):
    documents = [{"id": "a", "content": ""}, {"id": "b", "content": "x" * 2_000_000}]

    assert running.refused(400, documents=documents)["error"]["param"] == "documents[1]"
    assert len(running.ask(documents=documents[:1])["results"]) == 1


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ('{"documents": [{"a": 1e999}]}', "documents[0]"),
        ('{"documents": [{"\\ud800": 1e999}]}', "documents[0]"),
        ('{"documents": [{"\\ud800": "a"}]}', "documents[0]"),
        ('{"documents": [{"a": "b"}], "rank_fields": ["\\ud800"]}', "rank_fields[0]"),
        ('{"documents": [{"a": "\\ud800"}]}', "documents[0]"),
        ('{"documents": [{"a": ["\\ud800"]}]}', "documents[0]"),
        ('{"documents": [{"a": "x", "id": "\\ud800"}]}', "documents[0].id"),
        ('{"documents": [{"a": null}]}', "documents[0]"),
        ('{"documents": [{"text": 7}]}', "documents[0].text"),
        ('{"documents": [{"a": "x"}], "rank_fields": ["b"]}', "documents[0]"),
        ('{"documents": [{"a": "x"}], "rank_fields": "a"}', "rank_fields"),
        ('{"documents": [{"a": "x"}], "rank_fields": [7]}', "rank_fields[0]"),
        (json.dumps({"documents": [{"a": "x"}], "rank_fields": ["a"] * 101}), "rank_fields"),
        (json.dumps({"documents": [{}] * 1001}), "documents"),
    ],
)
def test_objects_that_have_no_text_are_refused(running, content, param):
    response = running.http.post("/v1/rerank", content='{"query": "q", ' + content[1:])

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("their_id", [None, True, 1.5, [1], {"a": 1}])
def test_an_id_that_is_neither_text_nor_number_is_no_id(running, their_id):
    (result,) = running.ask(documents=[{"id": their_id, "content": "some words"}])["results"]
    assert "id" not in result
