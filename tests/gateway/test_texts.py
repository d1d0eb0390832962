"""Texts that are cut, rejected, left out or given back; and our own fields next to them."""

from __future__ import annotations

import json

import pytest

LONG = "network " * 5000


def test_beside_ids_a_candidate_that_cannot_be_scored_costs_itself(running, documents):
    """Four ways to have no score; `\\ud800` travels as JSON's escape."""
    bad = ["", "x" * 2_000_000, "\ud800", "half a pair \udfff"]
    objects = [{"id": f"d{i}", "text": text} for i, text in enumerate(documents)] + [{"text": text} for text in bad]
    for body in (objects, [*objects[:4], *bad, {"id": "x", "text": "\ud800"}]):
        response = running.http.post("/v1/rerank", content=json.dumps({"query": "q", "documents": body}))
        assert response.status_code == 200, response.text
        answer = response.json()
        assert sorted(r["index"] for r in answer["results"]) == [0, 1, 2, 3]
        lines = [line.split(" was not scored ") for line in answer["meta"]["warnings"]]
        assert [line[0] for line in lines] == [f"documents[{i}]" for i in range(4, len(body))]
        assert all("half of a surrogate pair" in line[1] for line in lines[2:])


def test_without_ids_what_cannot_be_scored_fails_the_request_and_is_named(running, documents):
    for text in ("x" * 2_000_000, "\ud800"):
        body = {"query": "q", "documents": [*documents, text]}
        response = running.http.post("/v1/rerank", content=json.dumps(body))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "documents[4]"
    for on_miss in ("skip", "fail"):
        error = running.refused(400, documents=["a text that is not cached"], on_miss=on_miss)
        assert error["message"].startswith("documents[0]")
        assert "on_miss" in error["message"]


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


@pytest.mark.parametrize(("path", "field"), [("/tei/rerank", "texts"), ("/v1/ranking", "documents"), ("/score", None)])
def test_a_query_that_was_cut_is_said_where_a_dialect_has_no_warnings(running, path, field):
    for text, said in (("short", None), (LONG[:16000], "true")):
        body = {"query": text, field: ["a"]} if field else {"pairs": [["short", "a"], [text, "b"]]}
        assert running.post(path, body).headers.get("x-preread-query-truncated") == said


def test_max_tokens_per_doc_cuts_the_text(running):
    """The cut text scores what it scores when it is sent alone."""
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


def test_without_an_encoder_texts_are_refused_clearly(run):
    with run(encoder=False) as alone:
        error = alone.refused(503)
        skipped = alone.refused(503, on_miss="skip")
        empty = alone.ask(documents=["", " "])

    for one in (error, skipped):
        assert one["message"].startswith("documents[0]")
        assert "start the server with --encoder-address" in one["message"]
    assert [result["relevance_score"] for result in empty["results"]] == [0.0, 0.0]
