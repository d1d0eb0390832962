"""Values that servers built on pydantic coerce, in every dialect; what they refuse is refused by its name."""

from __future__ import annotations

import pytest

TRUE = [True, 1, 1.0, "1", "on", "t", "true", "True", "TRUE", "y", "yes"]
FALSE = [False, 0, 0.0, "0", "off", "f", "false", "n", "no", "NO"]
NO_SWITCH = ["", " true ", "maybe", 2, -1, 0.5, [], {}, "truee"]
COUNTS = {
    2: [2, 2.0, "2", " 2 ", "+2", "02", "2.0", "2.00", "0_2", "\n2\t", "\xa02"],
    1: [1, True, "1"],
    0: [0, False, "-0", None],
}
NO_COUNT = ["", "two", "2.5", "1e3", "2.", "0x2", "2__0", "_2", "--2", "２", 2.5, [], {}, "9" * 200, "-1", -1, "- 1"]
# path, the field of the texts, where the results are, the field that limits them, the one that returns texts
DIALECTS = [
    ("/v1/rerank", "documents", "results", "top_n", "return_documents"),
    ("/rerank", "texts", None, "top_n", "return_text"),
    ("/v1/ranking", "passages", "rankings", "top_n", ""),
    ("/voyage/v1/rerank", "documents", "data", "top_k", "return_documents"),
    ("/v1/reranking", "input", "data", "top_k", "return_input"),
    ("/infinity/rerank", "documents", "results", "top_n", "return_documents"),
    ("/pinecone/rerank", "documents", "data", "top_n", "return_documents"),
    ("/sglang/rerank", "documents", None, "top_n", "return_documents"),
    ("/v1/rerankings", "texts", "results", "top_n", ""),
]
EVERY = pytest.mark.parametrize(("path", "field", "where", "top", "returns"), DIALECTS)


@EVERY
def test_coerced(running, query, documents, path, field, where, top, returns):
    def results(**more):
        response = running.post(path, {"query": query, field: documents} | more)
        assert response.status_code == 200, (more, response.text)
        return response.json() if where is None else response.json()[where]

    for num, written in COUNTS.items():
        assert {len(results(**{top: one})) for one in written} == {num or 4}
    if returns:
        texts = {"document", "text", "input"}
        for expected, written in ((True, TRUE), (False, FALSE)):
            for one in written:
                assert all(texts.isdisjoint(rank) != expected for rank in results(**{returns: one})), one


@EVERY
def test_refused(running, query, documents, path, field, where, top, returns):
    body = {"query": query, field: documents}
    for name, wrong, expected in (
        (top, NO_COUNT, ("a whole number", "0 or more")),
        (returns, NO_SWITCH, ("true or false",)),
    ):
        for one in wrong if name else ():
            response = running.post(path, body | {name: one})
            assert response.status_code == 400, (one, response.text)
            error = response.json()
            message = error["error"] if isinstance(error["error"], str) else error["message"]
            assert message.startswith(f"{name} is ")
            assert message.endswith(expected)


def test_a_value_is_named_as_it_was_written(running):
    assert running.refused(400, top_n="two")["message"] == "top_n is 'two'; expected a whole number"
    assert running.refused(400, return_documents="maybe")["message"] == (
        "return_documents is 'maybe'; expected true or false"
    )
    assert len(running.refused(400, top_n="x" * 1_000_000)["message"]) < 200


def test_flags_of_dialects(running, query):
    long = "network " * 5000
    for path, field, name in (("/rerank", "texts", "truncate"), ("/v1/rerank", "documents", "truncation")):
        for word, status in (("false", 400), ("0", 400), (0, 400), ("true", 200), (1, 200), (None, 200)):
            assert running.post(path, {"query": query, field: [long], name: word}).status_code == status
    raw = [running.post("/rerank", {"query": query, "texts": ["a"], "raw_scores": one}).json() for one in ("yes", True)]
    assert raw[0] == raw[1]
    scores = running.post("/score", {"text_1": query, "text_2": "a", "compression_ratio": "8", "return_margins": "on"})
    assert scores.json()["data"][0]["compression_ratio"] == 8


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/explain", {"query": "q", "documents": ["a"], "compression_ratio": "4"}),
        ("/v1/explain", {"query": "q", "documents": ["a"], "return_margins": "true"}),
        ("/v1/collections/c/passages", {"passages": [{"id": "a", "text": "b"}], "compression_ratio": "4"}),
        ("/v1/collections/c/passages", {"passages": [{"id": "a", "text": "b"}], "store_text": "true"}),
    ],
)
def test_our_own_endpoints_are_strict(running, path, body):
    assert running.post(path, body).status_code == 400
