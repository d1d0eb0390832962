"""Every document of a request of texts has a score, in every dialect: clients pair both by position or by count."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from decoder_server.edge.engines import FLOOR_MARGIN, FLOOR_SCORE
from preread.tei.v1 import tei_pb2, tei_pb2_grpc

GOOD = ["What is the capital of China?", "Gravity attracts bodies toward one another.", "A passage is read once"]
EMPTY = ["", " \n", "\u3000", "\ufffd", "\u200b", "\0"]
MIXED = [EMPTY[0], GOOD[0], *EMPTY[1:3], GOOD[1], GOOD[2], *EMPTY[3:]]

PATHS = {
    "cohere": ("/v2/rerank", "documents"),
    "tei": ("/tei/rerank", "texts"),
    "nim": ("/v1/ranking", "passages"),
    "voyage": ("/voyage/v1/rerank", "documents"),
    "mixedbread": ("/v1/rerank", "input"),
    "infinity": ("/infinity/rerank", "documents"),
    "score": ("/score", "text_2"),
}
DIALECTS = [*PATHS, "tei grpc"]

Ranks = list[tuple[int, float, float]]  # index, score, margin or None where the dialect has none


def listed(answer: Any) -> Any:
    """The results, wherever a dialect has them."""
    if isinstance(answer, list):
        return answer
    return next(answer[name] for name in ("results", "data", "rankings") if name in answer)


def ranks(running: Any, dialect: str, texts: list[str], **more: Any) -> Ranks:
    """What one dialect answers, read as its clients read it."""
    query = "the capital"
    if dialect == "tei grpc":
        with grpc.insecure_channel(f"127.0.0.1:{running.server.port}") as channel:
            stub = tei_pb2_grpc.RerankStub(channel)
            messages = [tei_pb2.RerankStreamRequest(query=query, text=text, raw_scores=True) for text in texts]
            scores = {rank.index: rank.score for rank in stub.RerankStream(iter(messages)).ranks}
            plain = stub.Rerank(tei_pb2.RerankRequest(query=query, texts=texts))
            return [(rank.index, rank.score, scores[rank.index]) for rank in plain.ranks]
    path, field = PATHS[dialect]
    body: dict[str, Any] = {"query": query, field: texts, "return_margins": True} | more
    if dialect == "nim":
        body["passages"] = [{"text": text} for text in texts]
    if dialect == "score":
        body["text_1"] = query
    response = running.post(path, body)
    assert response.status_code == 200, response.text
    if any(text in EMPTY for text in texts):
        named = [int(i) for i in response.headers["x-preread-empty"].split(",")]
        assert named == [i for i, text in enumerate(texts) if text in EMPTY]
    found = listed(response.json())
    score = next(name for name in ("relevance_score", "score", "logit") if name in found[0])
    return [(one["index"], one[score], one["margin"]) for one in found]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_tokenizer_that_drops_characters(lossy: Any, dialect: str) -> None:
    check_law(lossy, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_tokenizer_that_knows_every_byte(running: Any, dialect: str) -> None:
    check_law(running, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_model_that_reads_text(cross: Any, dialect: str) -> None:
    check_law(cross, dialect)


def check_law(running: Any, dialect: str) -> None:
    """An empty document has the floor, and the others what they have without it."""
    # A tokenizer that knows every byte reads the odd ones: only white space is then empty.
    is_empty = running.engine.backend.is_empty
    texts = [text for text in MIXED if text not in EMPTY or is_empty(text)]
    mixed, alone = ranks(running, dialect, texts), ranks(running, dialect, GOOD)
    assert sorted(index for index, _, _ in mixed) == list(range(len(texts)))
    by_index = {index: (score, margin) for index, score, margin in mixed}
    expected = {GOOD[index]: (score, margin) for index, score, margin in alone}
    for index, text in enumerate(texts):
        if text in expected:
            np.testing.assert_allclose(by_index[index], expected[text], atol=1e-5)
        else:
            assert by_index[index] == (FLOOR_MARGIN if dialect == "nim" else FLOOR_SCORE, FLOOR_MARGIN)
    if dialect != "score":  # its order is that of the pairs
        last = [index for index, _, _ in mixed[len(GOOD) :]]
        assert last == [i for i, text in enumerate(texts) if text not in GOOD]
    assert min(margin for _, _, margin in alone) > FLOOR_MARGIN


def test_top_n_counts_the_floor_too(lossy: Any) -> None:
    for top_n, num in ((1, 1), (3, 3), (4, 4), (99, len(MIXED))):
        found = ranks(lossy, "cohere", MIXED, top_n=top_n)
        assert len(found) == num
        assert [score == FLOOR_SCORE for _, score, _ in found] == [place >= len(GOOD) for place in range(num)]


def test_in_a_cascade_the_floor_is_below_every_stage(lossy: Any) -> None:
    found = lossy.ask(documents=MIXED, stages="32:2, 4", return_margins=True)["results"]
    assert sorted(one["index"] for one in found) == list(range(len(MIXED)))
    assert [len(one.get("stages", [])) for one in found] == [2, 2, 1] + [0] * (len(MIXED) - len(GOOD))
    assert {one["margin"] for one in found[len(GOOD) :]} == {FLOOR_MARGIN}


def test_what_cannot_be_scored_fails_the_request_and_is_named(running: Any) -> None:
    """One document over the byte limit among others, in every dialect: a client would not read a warning."""
    texts = [GOOD[0], "x" * 2_000_000, GOOD[1]]
    for dialect, (path, field) in PATHS.items():
        body = {"query": "q", "text_1": "q", field: [{"text": t} for t in texts] if dialect == "nim" else texts}
        if dialect != "score":
            del body["text_1"]
        response = running.post(path, body)
        assert response.status_code == 400, dialect
        assert f"{field}[1]" in response.text
    with grpc.insecure_channel(f"127.0.0.1:{running.server.port}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            tei_pb2_grpc.RerankStub(channel).Rerank(tei_pb2.RerankRequest(query="q", texts=texts))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details().startswith("texts[1]")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_only_empty_documents(lossy: Any, dialect: str) -> None:
    texts = ["\u200b", "", "\ufffd"]
    found = ranks(lossy, dialect, texts)
    assert [index for index, _, _ in found] == [0, 1, 2]
    assert {margin for _, _, margin in found} == {FLOOR_MARGIN}


def test_empty_documents_are_named_in_the_warnings(lossy: Any) -> None:
    warnings = lossy.ask(documents=MIXED)["meta"]["warnings"]
    assert [line.split(" is empty")[0] for line in warnings] == [
        f"documents[{i}]" for i, text in enumerate(MIXED) if text in EMPTY
    ]


def test_raw_scores_are_the_margins(lossy: Any) -> None:
    for path, field, name in (("/tei/rerank", "texts", "score"), ("/infinity/rerank", "documents", "relevance_score")):
        body = {"query": "q", field: MIXED, "raw_scores": True, "return_margins": True}
        found = listed(lossy.post(path, body).json())
        assert len(found) == len(MIXED)
        assert all(one[name] == one["margin"] for one in found)


def test_an_encoder_that_fails_fails_the_request_without_its_own_words(run: Any) -> None:
    with run() as one:
        encode = one.worker.engine.scheduler.encode

        async def broken(*_: Any) -> None:
            raise ZeroDivisionError("a secret path")

        one.worker.engine.scheduler.encode = broken
        error = one.refused(503, documents=["", "a text"])
        with_ids = one.ask(documents=[{"id": "a", "text": "a text"}], on_miss="skip")
        one.worker.engine.scheduler.encode = encode
        assert error["message"].startswith("documents[1]")
        assert with_ids["results"] == []
        assert "secret" not in str(error)
        assert "ZeroDivision" not in str(error)
        assert len(one.ask(documents=["", "a text"])["results"]) == 2


def test_a_model_that_fails_on_a_pair_fails_the_request_without_its_own_words(run: Any) -> None:
    with run() as one:
        score = one.backend._real.score

        def broken(pairs: Any) -> Any:
            if any(pair.num_states < 10 for pair in pairs):
                raise KeyError("a secret path")
            return score(pairs)

        one.backend._real.score = broken
        texts = ["a b c d e f g h i j k l" * 10, "x"]
        error = one.refused(503, documents=texts)
        objects = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
        answer = one.ask(documents=objects)
        del one.backend._real.score
        assert "secret" not in str(error) + str(answer)
        assert error["message"].startswith("documents[1]")
        assert [result["index"] for result in answer["results"]] == [0]


def test_what_was_cut_is_named_in_every_dialect(running: Any) -> None:
    long = "network " * 5000
    texts = ["short", long, "also short", long]
    for path, body in {
        "/v2/rerank": {"query": "q", "documents": texts, "top_n": 1},
        "/tei/rerank": {"query": "q", "texts": texts},
        "/tei/rerank?left": {"query": "q", "texts": texts, "truncation_direction": "left"},
        "/v1/ranking": {"query": {"text": "q"}, "passages": [{"text": text} for text in texts]},
        "/voyage/v1/rerank": {"query": "q", "documents": texts},
        "/score": {"text_1": ["q", "other", "q", "other"], "text_2": texts},
    }.items():
        response = running.post(path, body | {"return_margins": True})
        assert response.status_code == 200, response.text
        assert response.headers["x-preread-truncated"] == "1,3", path
        found = listed(response.json())
        assert all(one.get("truncated", False) == (one["index"] in (1, 3)) for one in found)
    warnings = running.ask(documents=texts)["meta"]["warnings"]
    assert [line.split(" was cut")[0] for line in warnings] == ["documents[1]", "documents[3]"]
    assert "x-preread-truncated" not in running.post("/v2/rerank", {"query": "q", "documents": ["short"]}).headers
    many = running.post("/v2/rerank", {"query": "q", "documents": ["two words"] * 600, "max_tokens_per_doc": 1})
    assert many.headers["x-preread-truncated"] == ",".join(map(str, range(500))) + ",..."
