"""Reranking many queries at many ratios at once equals doing it one by one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import tuning.rerank
from cache.collection import Collection, StoredPassage
from cache.errors import RatioError
from cache.manifest import Manifest
from cache.open import open_store
from cache.states import PassageStates, pool, text_digest
from checkpoint import Checkpoint
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair
from encoder_worker.encoder import Encoder
from encoder_worker.passage_encoder import BatchLimits, PassageEncoder
from tuning.judged import JudgedCollection, read_judged
from tuning.rerank import EncodedStates, StoredStates, rerank, score_passages
from tuning.trec import Run

DIM = 64  # of the tiny checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(tiny)


@pytest.fixture(scope="module")
def encoder(checkpoint: Checkpoint) -> Encoder:
    return Encoder(checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def worker(checkpoint: Checkpoint, encoder: Encoder) -> PassageEncoder:
    return PassageEncoder(checkpoint, encoder, BatchLimits(64))


@pytest.fixture(scope="module")
def backend(checkpoint: Checkpoint) -> FbnlBackend:
    return FbnlBackend(checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def judged(beir: Path) -> JudgedCollection:
    return read_judged(beir)


@pytest.fixture
def candidates(judged: JudgedCollection) -> Run:
    everything = [(p, 0.0) for p in judged.passages]
    return {"q1": everything, "q2": everything[::-1], "q3": everything[:2], "q4": []}


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_margins_equal_the_plain_loop(
    checkpoint: Checkpoint,
    encoder: Encoder,
    worker: PassageEncoder,
    backend: FbnlBackend,
    judged: JudgedCollection,
    candidates: Run,
    chunk_bytes: int,
) -> None:
    ratios = [1, 2, 3, 8]
    source = EncodedStates(worker, judged.passages, 1, chunk_bytes=chunk_bytes)
    result = rerank(backend, source, judged.queries, candidates, ratios)
    for ratio in ratios:
        for query_id, ranking in candidates.items():
            prompt = backend.prompt(judged.queries[query_id])
            naive = {}
            for passage_id, _ in ranking:
                (tokens,) = checkpoint.text.passages([judged.passages[passage_id]])
                (states,) = encoder.encode([tokens.ids], ratio)  # pooled afresh, alone
                naive[passage_id] = float(backend.score([StatePair(prompt, states)])[0])
            assert dict(result.runs[ratio][query_id]) == pytest.approx(naive, abs=2e-5)
    assert result.missing_passages == set()
    assert result.num_unscored_pairs == 0


def test_a_pass_has_all_queries_of_a_passage(
    worker: PassageEncoder, backend: FbnlBackend, judged: JudgedCollection
) -> None:
    """So it computes their passage once."""
    queries = {f"q{i}": f"question {i}" for i in range(10, 42)}
    everything = [(p, 0.0) for p in judged.passages]
    passes: list[set[bytes]] = []

    class Watched(FbnlBackend):
        def score(self, pairs):
            passes.append({pair.key for pair in pairs})
            return super().score(pairs)

    watched = Watched(backend.checkpoint, device="cpu", dtype="float32")
    states = EncodedStates(worker, judged.passages, 4)
    shared = rerank(watched, states, queries, dict.fromkeys(queries, everything), [4])
    keys = Counter(key for one in passes for key in one)
    assert len(keys) == len(judged.passages)
    assert set(keys.values()) == {1}
    for query_id, query in queries.items():
        alone = rerank(backend, states, {query_id: query}, {query_id: everything}, [4]).runs[4][query_id]
        assert dict(shared.runs[4][query_id]) == pytest.approx(dict(alone), abs=1e-5)


def test_states_are_made_at_the_ratios_common_divisor_and_re_pooled_exactly(
    checkpoint: Checkpoint, encoder: Encoder, worker: PassageEncoder, judged: JudgedCollection
) -> None:
    source = EncodedStates(worker, judged.passages, 2)
    (chunk,) = source.chunks(list(judged.passages))
    assert chunk.keys() == judged.passages.keys()
    for passage_id, states in chunk.items():
        (tokens,) = checkpoint.text.passages([judged.passages[passage_id]])
        (unpooled,) = encoder.encode([tokens.ids], 1)
        for ratio in (2, 6, 32):
            np.testing.assert_allclose(states.at_ratio(ratio).states, pool(unpooled, ratio), atol=2e-5)


def test_a_ratio_that_the_states_cannot_be_read_at_is_refused(
    worker: PassageEncoder, backend: FbnlBackend, judged: JudgedCollection, candidates: Run
) -> None:
    source = EncodedStates(worker, judged.passages, 4)
    with pytest.raises(RatioError, match="6 is not a multiple of the stored ratio 4"):
        rerank(backend, source, judged.queries, candidates, [4, 6])


def test_candidates_without_text_are_counted_and_come_last(
    worker: PassageEncoder, backend: FbnlBackend, judged: JudgedCollection
) -> None:
    source = EncodedStates(worker, judged.passages, 4)
    result = rerank(backend, source, judged.queries, {"q1": [("gone", 9.0), ("tide", 8.0), ("lost", 7.0)]}, [4])
    assert result.missing_passages == {"gone", "lost"}
    assert [p for p, _ in result.runs[4]["q1"]] == ["tide", "gone", "lost"]


def test_empty_texts_have_no_states(worker: PassageEncoder) -> None:
    (chunk,) = EncodedStates(worker, {"a": "", "b": " ", "c": "x"}, 4).chunks(["a", "b", "c", "d"])
    assert chunk.keys() == {"c"}
    assert list(EncodedStates(worker, {"a": ""}, 4).chunks(["a"])) == []


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_long_passages_may_be_read_in_windows(
    tiny: Path, encoder: Encoder, judged: JudgedCollection, chunk_bytes: int
) -> None:
    short = PassageEncoder(Checkpoint.open(tiny, max_passage_tokens=40), encoder, BatchLimits(128))
    source = EncodedStates(short, judged.passages, 3, split=True, chunk_bytes=chunk_bytes)
    found = {p: states for chunk in source.chunks(list(judged.passages)) for p, states in chunk.items()}
    assert len(found["bread"].window_tokens) > 3
    for passage_id, states in found.items():
        alone = short.encode_one(judged.passages[passage_id], 3, split=True)
        assert (states.window_tokens, states.truncated) == (alone.window_tokens, False)
        np.testing.assert_allclose(states.states, alone.states, atol=2e-5)


def test_the_best_window_of_a_passage_counts(backend: FbnlBackend) -> None:
    generator = np.random.default_rng(0)
    windows = [generator.standard_normal((n, DIM), dtype=np.float32) for n in (5, 3)]
    whole = PassageStates(np.concatenate(windows), (5, 3), 1, False, text_digest(""))
    prompt = backend.prompt("why")
    alone = [backend.score([StatePair(prompt, window)])[0] for window in windows]
    assert score_passages(backend, [(prompt, whole)]) == pytest.approx([max(alone)], abs=1e-5)


def test_not_a_number_costs_that_candidate_alone(backend: FbnlBackend) -> None:
    good = PassageStates(np.ones((2, DIM), dtype=np.float32), (2,), 1, False, text_digest(""))
    bad = PassageStates(np.full((2, DIM), np.nan, dtype=np.float32), (2,), 1, False, text_digest(""))

    class Source:
        ratio = 1

        def chunks(self, passage_ids: object, progress: object = None) -> list[dict[str, PassageStates]]:
            return [{"bad": bad, "good": good}]

    result = rerank(backend, Source(), {"q": "why"}, {"q": [("bad", 2.0), ("good", 1.0)]}, [1, 2])  # type: ignore[arg-type]
    assert result.num_unscored_pairs == 2
    assert [p for p, _ in result.runs[1]["q"]] == ["good", "bad"]


def test_stored_states_rank_like_encoded_ones(
    checkpoint: Checkpoint,
    worker: PassageEncoder,
    backend: FbnlBackend,
    judged: JudgedCollection,
    candidates: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = EncodedStates(worker, judged.passages, 2)
    identity = checkpoint.identity
    manifest = Manifest.of(
        identity,
        collection="c",
        compression_ratio=2,
        codec="Flat",
    )
    collection = Collection.create(open_store("memory:tuning-rerank"), manifest)
    for chunk in encoded.chunks(list(judged.passages)):
        collection.put_many([StoredPassage(p, states) for p, states in chunk.items() if p != "moon"])
    monkeypatch.setattr(tuning.rerank, "STORE_READ_PASSAGES", 3)
    stored = StoredStates(collection, chunk_bytes=1000)
    assert stored.ratio == 2
    fresh = rerank(backend, encoded, judged.queries, candidates, [2, 8])
    read = rerank(backend, stored, judged.queries, candidates, [2, 8])
    assert read.missing_passages == {"moon"}
    for ratio in (2, 8):
        for query_id in ("q1", "q2"):
            ours = {p: score for p, score in read.runs[ratio][query_id] if p != "moon"}
            theirs = {p: score for p, score in fresh.runs[ratio][query_id] if p != "moon"}
            assert ours == pytest.approx(theirs, abs=1e-4)
            assert read.runs[ratio][query_id][-1][0] == "moon"
