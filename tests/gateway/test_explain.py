"""A closer look at a few candidates: what it says, that it is counted, and that a server which stops waits for it."""

from __future__ import annotations

import threading
from typing import Any

import pytest


def test_explain_scores_what_rerank_scores_and_is_bounded(running: Any, query: str, documents: list[str]) -> None:
    for ratio in (1, 4, 32):
        answer = running.ask("/v1/explain", compression_ratio=ratio)
        expected = {r["index"]: r["relevance_score"] for r in running.ask(compression_ratio=ratio)["results"]}
        for result in answer["results"]:
            by_ratio = {score["compression_ratio"]: score["score"] for score in result["scores"]}
            assert list(by_ratio) == [1, 2, 4, 8, 16, 32]
            assert by_ratio[ratio] == pytest.approx(expected[result["index"]], abs=1e-4)
            text = documents[result["index"]]
            assert result["text"] == text
            assert result["parts"][-1]["end"] == len(text)
            assert 0 < sum(part["weight"] for part in result["parts"]) <= result["passage_weight"] + 1e-6 <= 1.001
    assert "documents" in running.refused(400, "/v1/explain", documents=["a"] * 17)["error"]["message"]
    assert running.refused(400, "/v1/explain", documents=None)


def test_explain_of_a_collection_takes_its_first_passages(running: Any) -> None:
    passages = [{"id": f"p{i}", "text": f"Passage {i} is about the sky."} for i in range(3)]
    stored = running.post("/v1/collections/few/passages", {"passages": passages, "compression_ratio": 4})
    assert stored.json()["num_stored"] == 3, stored.text
    answer = running.ask("/v1/explain", documents=None, collection="few", first=2)
    assert len(answer["results"]) == 2
    for result in answer["results"]:
        assert result["status"] == "hit"
        assert [score["compression_ratio"] for score in result["scores"]] == [4, 8, 16, 32]
        assert result["parts"]


def test_it_is_counted_among_the_requests(running: Any) -> None:
    def count(name: str, **labels: str) -> float:
        labels |= {"model": running.engine.name}
        return running.server.metrics.registry.get_sample_value(name, labels) or 0.0

    def counts() -> list[float]:
        return [
            count("preread_requests_total", code="ok"),
            count("preread_requests_total", code="invalid_request"),
            count("preread_candidates_total", status="encoded") + count("preread_candidates_total", status="hit"),
        ]

    before = counts()
    running.ask("/v1/explain")
    running.refused(400, "/v1/explain", documents=["a"] * 17)
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [1, 1, 4]


def test_a_server_that_stops_waits_for_it(run: Any) -> None:
    with run() as one:
        one.ask()
        one.backend.gate.clear()
        one.backend.entered.clear()
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(one.ask("/v1/explain")))
        asking.start()
        assert one.backend.entered.wait(10)
        assert not one.call(one.engine.drain(0.02))
        late = one.refused(503, "/v1/explain")
        one.backend.gate.set()
        asking.join()
        assert one.call(one.engine.drain(10))
    assert len(answers[0]["results"]) == 4
    assert "shutting down" in late["message"]
