"""What is read, over HTTP: a ratio or stages in every dialect, and what the answer says of it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from decoder_server.edge.http.dialect_request import DialectRequest, DialectResponse
from preread import parse_stages
from preread.values import RerankRequest, Summary, Timings

# Path, what the body calls the candidates, where the results are, what they call a score.
DIALECTS = [
    ("/v1/rerank", "documents", "results", "relevance_score"),
    ("/infinity/rerank", "documents", "results", "relevance_score"),
    ("/rerank", "texts", None, "score"),
    ("/v1/ranking", "passages", "rankings", "logit"),
    ("/voyage/v1/rerank", "documents", "data", "relevance_score"),
    ("/v1/rerank", "input", "data", "score"),
]


def asked(running, query, documents, path, field, where, **fields):
    body = {"query": query, field: documents, "return_margins": True} | fields
    response = running.post(path, body)
    assert response.status_code == 200, response.text
    return response, response.json() if where is None else response.json()[where]


@pytest.mark.parametrize(("path", "field", "where", "score"), DIALECTS)
@pytest.mark.parametrize("ratio", [1, 8])
def test_every_dialect_reads_at_the_ratio_it_names(running, query, documents, path, field, where, score, ratio):
    response, results = asked(running, query, documents, path, field, where, compression_ratio=ratio)

    assert response.headers["x-preread-read"] == str(ratio)
    assert {result["compression_ratio"] for result in results} == {ratio}
    assert all("stages" not in result for result in results)
    assert "x-preread-degraded" not in response.headers


@pytest.mark.parametrize(("path", "field", "where", "score"), DIALECTS)
def test_every_dialect_reads_in_stages(running, query, documents, path, field, where, score):
    stages = [{"compression_ratio": 8, "keep": 2}, {"compression_ratio": 1}]
    response, results = asked(running, query, documents, path, field, where, stages=stages)

    assert response.headers["x-preread-read"] == "8:2,1"
    assert [[s["compression_ratio"] for s in r["stages"]] for r in results] == [[8, 1], [8, 1], [8], [8]]
    for result in results:
        last = result["stages"][-1]
        assert (result["margin"], result["compression_ratio"]) == (last["margin"], last["compression_ratio"])
        assert result[score] in (last["score"], last["margin"])
    _, again = asked(running, query, documents, path, field, where, stages="8:2, 1")
    assert [r["index"] for r in again] == [r["index"] for r in results]


def test_stages_that_a_collection_cannot_give_are_fitted_to_it_and_named(running, query, documents):
    passages = [{"id": f"d{i}", "text": text} for i, text in enumerate(documents)]
    stored = running.post("/v1/collections/coarse/passages", {"passages": passages, "compression_ratio": 4})
    assert stored.status_code == 200, stored.text
    body = {"query": query, "collection": "coarse", "passage_ids": ["d0", "d1", "d2", "d3"], "stages": "32:3,4:2,1"}
    response = running.post("/v1/rerank", body)
    assert response.status_code == 200, response.text
    assert response.headers["x-preread-read"] == "32:3,4"
    refused = running.post("/v1/rerank", body | {"stages": None, "compression_ratio": 6})
    assert refused.status_code == 400
    assert "compression_ratio is 6; expected a multiple of 4" in refused.json()["message"]


def test_without_return_margins_results_are_as_ever(running):
    answer = running.ask(stages="8:2,1")

    assert all(set(result) == {"index", "relevance_score"} for result in answer["results"])


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ("8:2,", "RATIO:KEEP"),
        ("8:2,16", "less than 8"),
        ([8, 1], "stages[0] is 'a whole number'; expected an object"),
        ([{"keep": 2}], "stages[0].compression_ratio"),
        ([{"compression_ratio": 8}, {"compression_ratio": 1}], "stages[0].keep"),
        (8, "stages is 'a number'; expected a string or a list"),
    ],
)
def test_stages_that_cannot_be_read_are_refused(running, stages, says):
    assert says in running.refused(400, stages=stages)["message"]


def test_stages_and_a_ratio_contradict_each_other(running):
    assert running.refused(400, stages="8:2,1", compression_ratio=8)["error"]["param"] == "compression_ratio"


def test_scores_of_pairs_compare_whatever_the_server_reads_by_default(run, query, documents):
    pairs = {"text_1": query, "text_2": documents, "return_margins": True}
    with run(stages=parse_stages("16:2,2")) as served:
        assert served.ask()["object"] == "rerank"
        response = served.post("/v1/rerank", {"query": query, "documents": documents})
        assert response.headers["x-preread-read"] == "16:2,2"
        scores = served.post("/score", pairs).json()["data"]
        assert {score["compression_ratio"] for score in scores} == {2}
        refused = served.post("/score", pairs | {"stages": "8:2,1"})
        assert refused.status_code == 400
        assert "do not compare" in refused.json()["message"]


def test_less_than_asked_is_told_in_headers_and_warnings(run, query, documents):
    with run(degrade=True, degrade_queue_share=0.0) as served:
        served.ask()
        served.backend.gate.clear()
        served.backend.entered.clear()
        with ThreadPoolExecutor() as pool:
            first = pool.submit(served.ask)
            assert served.backend.entered.wait(30)
            body = {"query": query, "documents": documents, "compression_ratio": 4}
            second = pool.submit(served.post, "/v1/rerank", body)
            while served.engine.admission.num_requests < 2:
                time.sleep(0.001)
            served.backend.gate.set()
            response = second.result()
            assert first.result()["results"]
    assert response.headers["x-preread-read"] == "32"
    assert response.headers["x-preread-asked"] == "4"
    assert response.headers["x-preread-degraded"] == "queue"
    assert response.json()["meta"]["warnings"] == ["scored at 32 in place of 4 (queue)"]


def test_a_cascade_that_was_cut_says_so():
    summary = Summary("m", Timings(0, 0, 0, 0, 0), 1, 1, False, stages=parse_stages("8:2,1"), stopped_early=True)
    answer = DialectResponse(DialectRequest(RerankRequest("q", ())), [], [], summary, "id")

    assert DialectResponse.headers([answer]) == {"x-preread-read": "8:2,1", "x-preread-stopped-early": "true"}
    assert answer.warnings() == ["the deadline ended the cascade before its last stage"]


def test_a_model_that_reads_text_has_no_ratio_to_tell():
    summary = Summary("m", Timings(0, 0, 0, 0, 0), 1, 1, False)

    answer = DialectResponse(DialectRequest(RerankRequest("q", ())), [], [], summary, "id")

    assert DialectResponse.headers([answer]) == {}
