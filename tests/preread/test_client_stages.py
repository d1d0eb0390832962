"""Stages as people write them."""

from __future__ import annotations

import pytest

from preread import (
    Client,
    Degraded,
    Reranking,
    Result,
    Stage,
    StageScore,
    Summary,
    Timings,
    format_stages,
    parse_stages,
)
from preread.v1 import rerank_pb2
from preread_cli.commands.rerank import run_rows


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("32:100, 4:20, 1:5", (Stage(32, 100), Stage(4, 20), Stage(1, 5))),
        (" 32 : 100 ,4", (Stage(32, 100), Stage(4))),
        ("8", (Stage(8),)),
    ],
)
def test_stages_read_as_written_and_back(text: str, stages: tuple[Stage, ...]) -> None:
    assert parse_stages(text) == stages
    assert parse_stages(format_stages(stages)) == stages


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "RATIO:KEEP"),
        ("32:100,", "RATIO:KEEP"),
        ("32-100", "RATIO:KEEP"),
        ("32:-1,4", "RATIO:KEEP"),
        ("３２:100,4", "RATIO:KEEP"),
        ("32:100,4:200", r"stages\[1\].keep .* at most 100"),
        ("4:100,32", r"stages\[1\].compression_ratio .* less than 4"),
        ("32,4", r"stages\[0\].keep"),
        ("0:5", r"stages\[0\].compression_ratio"),
        ("99999999999:5,1", r"stages\[0\].compression_ratio .* at most 2147483647"),
        ("5:99999999999,1", r"stages\[0\].keep .* at most 2147483647"),
        ("32:100," * 10_000_000 + "1", "70000001 characters long; expected at most"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_stages(text)


def test_a_call_carries_stages_and_its_answer_says_what_was_read(scripted) -> None:
    def answer(request, context) -> rerank_pb2.RerankResponse:
        scores = [rerank_pb2.StageScore(compression_ratio=r, score=0.5, margin=r, num_states=64 // r) for r in (8, 4)]
        return rerank_pb2.RerankResponse(
            results=[rerank_pb2.Result(index=0, margin=4, score=0.5, status=1, stages=scores)],
            stages=request.stages[:1],
            stopped_early=True,
            degraded=rerank_pb2.Degraded(reason="queue", stages=request.stages),
        )

    scripted.service.script = [answer]
    stages = (Stage(8, 2), Stage(4))
    with Client(scripted.address) as client:
        for given in ("8:2, 4", stages, list(stages)):
            reranking = client.rerank("q", ["text"], stages=given)
            sent = scripted.service.requests[-1].stages
            assert [(one.compression_ratio, one.keep) for one in sent] == [(8, 2), (4, 0)]
        assert reranking[0].stages == (StageScore(8, 0.5, 8.0, 8), StageScore(4, 0.5, 4.0, 16))
        assert reranking.summary.stages == stages[:1]
        assert reranking.summary.stopped_early
        assert reranking.summary.degraded == Degraded("queue", 0, stages)
        with pytest.raises(ValueError, match=r"^stages is '8-2'; expected RATIO:KEEP, .* such as 32:100, 8:20, 4$"):
            client.rerank("q", ["text"], stages="8-2")


def test_a_plain_answer_is_neither_degraded_nor_staged(scripted) -> None:
    with Client(scripted.address) as client:
        reranking = client.rerank("q", ["text"], compression_ratio=8)
    assert scripted.service.requests[-1].compression_ratio == 8
    assert (reranking.summary.stages, reranking.summary.degraded, reranking[0].stages) == ((), None, ())


def test_a_run_keeps_the_order_of_stages_whose_margins_do_not_compare() -> None:
    staged = [("a", -2.0, 3), ("b", -3.0, 3), ("c", 5.0, 2), ("d", 4.5, 2), ("e", -40.0, 1), ("f", None, 0)]
    results = tuple(
        Result(i, name, "hit", None, margin, None, "", 1, 4, False, (StageScore(4, 0.0, 0.0, 1),) * num)
        for i, (name, margin, num) in enumerate(staged)
    )
    rows = run_rows(Reranking(results, Summary("m", Timings(0, 0, 0, 0, 0), 5, 1, False)))
    assert [name for name, _ in rows] == ["a", "b", "c", "d", "e"]
    assert [score for _, score in rows] == [-2.0, -3.0, -4.0, -4.5, -40.0]
