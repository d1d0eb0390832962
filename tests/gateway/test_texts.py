"""What becomes of texts: cut, refused, left out, given back; and our own fields beside them."""

from __future__ import annotations

LONG = "network " * 5000


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


def test_without_an_encoder_texts_are_refused_clearly(run):
    with run(encoder=False) as alone:
        error = alone.refused(503)
        skipped = alone.ask(on_miss="skip")

    assert "no encoder worker is configured" in error["message"]
    assert skipped["results"] == []
