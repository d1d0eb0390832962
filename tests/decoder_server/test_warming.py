"""Warming over gRPC: what it fills, what a request finds afterwards, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from checkpoint import Checkpoint
from decoder_server.config import KvCacheConfig
from decoder_server.models.fbnl.backend import FbnlBackend
from preread.v1 import rerank_pb2

MIB = 1 << 20
IDS = [f"p{i}" for i in range(12)]


@pytest.fixture
def tiered(tiny: Path) -> FbnlBackend:
    """The model of the other tests, with room for everything."""
    return FbnlBackend(Checkpoint.open(tiny), device="cpu", dtype="float32", budgets=KvCacheConfig(MIB * 16, MIB * 16))


def warm_request(ids: list[str] | None = None, **fields: object) -> rerank_pb2.WarmRequest:
    return rerank_pb2.WarmRequest(**{"collection": "docs", "passage_ids": IDS if ids is None else ids} | fields)


def asked(backend: FbnlBackend) -> list[tuple[int, int]]:
    return [(tier.num_hits, tier.num_misses) for tier in backend.caches]


async def test_a_request_after_warming_computes_its_own_tokens_only(serve, tiered) -> None:
    async with serve() as plain:
        expected = await plain.rerank(ids=IDS, query="what is kept?", instruction="Judge.")
    async with serve(backend=tiered) as serving:
        answer = await serving.stub.Warm(warm_request(instruction="Judge."))
        assert (answer.num_passages, list(answer.missing_ids)) == (12, [])
        assert [(tier.name, tier.num_kept) for tier in answer.tiers] == [
            ("keys", answer.num_windows),
            ("prefixes", answer.num_windows),
        ]
        assert all(0 < tier.num_bytes <= tier.max_bytes for tier in answer.tiers)
        assert asked(tiered) == [(0, 0), (0, 0)]
        found = await serving.rerank(ids=IDS, query="what is kept?", instruction="Judge.")
    assert asked(tiered) == [(answer.num_windows, 0)] * 2
    assert [r.passage_id for r in found.results] == [r.passage_id for r in expected.results]
    assert [r.margin for r in found.results] == pytest.approx([r.margin for r in expected.results], abs=1e-5)


async def test_an_instruction_has_the_limit_of_a_request(serve, tiered, refused) -> None:
    async with serve(backend=tiered, max_instruction_tokens=20) as serving:
        error = await refused(
            serving.stub.Warm(warm_request(instruction="many words " * 20)), grpc.StatusCode.INVALID_ARGUMENT
        )
        assert "at most 20 tokens" in error.details()


async def test_another_instruction_or_ratio_is_not_warm(serve, tiered) -> None:
    async with serve(backend=tiered) as serving:
        await serving.stub.Warm(warm_request(instruction="Judge."))
        await serving.rerank(ids=["p1"], instruction="Judge otherwise.")
        assert asked(tiered) == [(1, 0), (0, 1)]
        await serving.rerank(ids=["p1"], instruction="Judge.", compression_ratio=8)
        assert asked(tiered) == [(1, 1), (0, 2)]


async def test_every_stage_of_a_served_cascade_is_warmed(serve, tiered) -> None:
    from preread.values import parse_stages

    async with serve(backend=tiered, stages=parse_stages("16:8,4")) as serving:
        answer = await serving.stub.Warm(warm_request())
        assert answer.num_windows == 24
        await serving.rerank(ids=IDS)
    assert [misses for _, misses in asked(tiered)] == [0, 0]


async def test_what_was_written_anew_is_not_answered_from_before(serve, tiered, store, encoding) -> None:
    async with serve(backend=tiered) as serving:
        await serving.stub.Warm(warm_request())
        before = await serving.rerank(ids=["p1"])
        store.drop_collection("docs")
        encoding.fill(store, "docs", {"p1": "Another text, of something else altogether."})
        after = await serving.rerank(ids=["p1"])
    async with serve() as plain:
        expected = await plain.rerank(ids=["p1"])
    assert after.results[0].margin == pytest.approx(expected.results[0].margin, abs=1e-5)
    assert after.results[0].margin != before.results[0].margin


async def test_ids_that_are_not_there_are_named(serve, tiered) -> None:
    async with serve(backend=tiered) as serving:
        answer = await serving.stub.Warm(warm_request(["p1", "nowhere", "p1"]))
    assert (answer.num_passages, list(answer.missing_ids)) == (1, ["nowhere"])


async def test_bad_calls_are_refused(serve, tiered, fbnl, refused) -> None:
    async with serve(backend=tiered, max_candidates=20) as serving:
        warm = serving.stub.Warm
        await refused(warm(warm_request([])), grpc.StatusCode.INVALID_ARGUMENT)
        await refused(warm(warm_request(["p1"] * 21)), grpc.StatusCode.INVALID_ARGUMENT)
        await refused(warm(warm_request(collection="")), grpc.StatusCode.INVALID_ARGUMENT)
        await refused(warm(warm_request(compression_ratio=6)), grpc.StatusCode.INVALID_ARGUMENT)
        await refused(warm(warm_request(collection="other")), grpc.StatusCode.NOT_FOUND)
        await refused(warm(warm_request(model="other")), grpc.StatusCode.NOT_FOUND)
    async with serve(backend=fbnl) as serving:  # loaded without tiers
        error = await refused(serving.stub.Warm(warm_request()), grpc.StatusCode.FAILED_PRECONDITION)
        assert "has nothing to warm" in (error.details() or "")
