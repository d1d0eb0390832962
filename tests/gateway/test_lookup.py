"""Documents that are stored, sent as texts by clients that know no ids: every dialect is on the fast path."""

from __future__ import annotations

import pytest

LONG = "network " * 5000
TITLED = {"title": "Deep learning", "text": "uses neural networks with many layers"}


@pytest.fixture(scope="module")
def indexed(running) -> list[str]:
    """Texts of a collection of the running server; the last one was cut when it was encoded."""
    texts = ["Stored once, read often.", "Another passage that is stored.", LONG]
    passages = [{"id": f"s{i}", "text": text} for i, text in enumerate(texts)] + [{"id": "titled"} | TITLED]
    answer = running.post("/v1/collections/stored/passages", {"passages": passages})
    assert answer.status_code == 200, answer.text
    return texts


def encodings(running) -> int:
    return running.engine.fetcher.on_demand.num_encoded


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/rerank", {"documents": ["{0}", "{1}"], "top_n": 2}),  # Cohere
        ("/v1/rerank", {"documents": [{"text": "{0}"}, {"text": "{1}"}]}),  # Jina and others
        ("/rerank", {"texts": ["{0}", "{1}"]}),  # TEI
        ("/v1/ranking", {"query": {"text": "what?"}, "passages": [{"text": "{0}"}, {"text": "{1}"}]}),  # NIM
        ("/v1/score", {"text_1": "what?", "text_2": ["{0}", "{1}"]}),
    ],
)
def test_a_client_that_sends_texts_hits_stored_states(running, indexed, path, body):
    def filled(value):
        if isinstance(value, list):
            return [filled(one) for one in value]
        if isinstance(value, dict):
            return {key: filled(one) for key, one in value.items()}
        return value.format(*indexed) if isinstance(value, str) else value

    before = encodings(running)
    answer = running.post(path, {"query": "what?"} | filled(body))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-preread-lookup"] == "2/2"
    assert encodings(running) == before


def test_what_is_not_stored_is_encoded_beside_it(running, indexed):
    before = encodings(running)
    answer = running.post("/v1/rerank", {"query": "q", "documents": [indexed[0], "sent for the first time"]})
    assert answer.headers["x-preread-lookup"] == "1/2"
    assert encodings(running) == before + 1


def test_a_title_is_joined_as_index_joins_it(running, indexed):
    one_string = f"{TITLED['title']} {TITLED['text']}"
    for document in (TITLED, one_string):
        results = running.ask(documents=[document], return_margins=True)["results"]
        assert [(one["found_in"], one["found_id"]) for one in results] == [("stored", "titled")]


def test_a_text_is_looked_up_as_it_was_cut(running, indexed):
    whole, cut = (
        running.post("/v1/rerank", {"query": "q", "documents": [indexed[0]]} | limit).headers["x-preread-lookup"]
        for limit in ({"max_tokens_per_doc": 1000}, {"max_tokens_per_doc": 3})
    )
    assert (whole, cut) == ("1/1", "0/1")


def test_a_stored_passage_that_was_cut_is_refused_where_texts_may_not_be(running, indexed):
    tei = running.post("/rerank", {"query": "q", "texts": [LONG], "truncate": False})
    assert tei.status_code == 400
    kept = running.post("/rerank", {"query": "q", "texts": [LONG]})
    assert kept.status_code == 200
    assert kept.headers["x-preread-lookup"] == "1/1"
    assert kept.headers["x-preread-truncated"] == "0"


def test_scores_found_by_text_are_those_by_id(running, indexed):
    by_text = running.ask(documents=indexed[:2], return_margins=True)["results"]
    by_id = running.post(
        "/v1/rerank",
        {
            "query": "What is deep learning?",
            "collection": "stored",
            "passage_ids": ["s0", "s1"],
            "return_margins": True,
        },
    ).json()["results"]
    assert [(one["index"], one["margin"]) for one in by_text] == [(one["index"], one["margin"]) for one in by_id]


def test_lookups_are_counted(running, indexed):
    def counted() -> list[float]:
        lines = running.http.get("/metrics").text.splitlines()
        return [float(line.split()[-1]) for line in lines if line.startswith("preread_lookups_total")]

    running.ask(documents=[indexed[0], "never stored before"])
    before = counted()
    running.ask(documents=[indexed[0], indexed[1], "never stored at all"])
    assert sorted(after - was for after, was in zip(counted(), before, strict=True)) == [1.0, 2.0]
