from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from training import scoring
from training.checkpoint_dir import Checkpoint, save
from training.collections_io import Collection, read_collection, write_collection
from training.evaluate import evaluate, gain_interval, interval
from training.heldout import HeldOut, first_stage, ndcg, rerank

PASSAGES = {"a": "red fish stone", "b": "green fish river", "c": "blue bird cloud", "d": "north stone red"}


@pytest.fixture
def collection() -> Collection:
    return Collection("toy", PASSAGES, {}, {"1": "red stone", "2": "green river"}, {}, {"1": {"d": 1}, "2": {"b": 2}})


def test_a_collection_survives_a_round_trip(collection: Collection, tmp_path: Path) -> None:
    write_collection(tmp_path / "toy", collection)
    again = read_collection(tmp_path / "toy")
    assert (again.passages, again.queries, again.qrels) == (collection.passages, collection.queries, collection.qrels)


def test_first_stage_keeps_only_passages_that_match(collection: Collection) -> None:
    run = first_stage(collection, ["1", "2"], 4)
    assert set(run["1"]) == {"a", "d"}
    assert set(run["2"]) == {"b"}


def test_ndcg_by_hand(collection: Collection) -> None:
    values = ndcg(collection, {"1": {"a": 2.0, "d": 1.0}, "2": {}})
    assert values["1"] == pytest.approx(1 / math.log2(3))
    assert values["2"] == 0.0


def test_rerank_equals_one_pair_at_a_time(collection: Collection, tiny: Callable[[int], Checkpoint]) -> None:
    checkpoint = tiny(0)
    runs = rerank(checkpoint, collection, {"1": {"a": 0.0, "d": 0.0}, "2": {"b": 0.0}}, (1, 2), batch=2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for query_id, found in runs[2].items():
            prompt = checkpoint.prompt_ids([collection.queries[query_id]], [""])
            for passage_id, margin in found.items():
                states, mask = scoring.encode(checkpoint.model, checkpoint.passage_ids([PASSAGES[passage_id]]))
                pooled, pooled_mask = scoring.mean_pool(states.float(), mask, 2)
                alone = scoring.margins(checkpoint.model, prompt, pooled, pooled_mask, checkpoint.answers)
                assert margin == pytest.approx(float(alone[0]), abs=0.1)  # bf16


def test_intervals_hold_the_mean_and_a_constant_gain_has_no_width() -> None:
    values = np.linspace(0, 1, 50)
    draws = np.random.default_rng(0).integers(0, 50, (500, 50))
    low, high = interval(values, draws)
    assert low < 0.5 < high
    assert gain_interval(values * 1.2, values, draws) == pytest.approx((0.2, 0.2))


def test_evaluate_and_report_run_on_a_written_checkpoint(
    collection: Collection, tiny: Callable[[int], Checkpoint], tmp_path: Path
) -> None:
    write_collection(tmp_path / "data" / "toy", collection)
    save(tiny(0), tmp_path / "checkpoint")
    figures = evaluate(
        tmp_path / "checkpoint", [tmp_path / "data" / "toy"], (1, 4), json_path=tmp_path / "figures.json"
    )
    assert set(figures["toy"]["systems"]) == {"BM25", "r=1", "r=4"}
    assert figures["toy"]["systems"]["BM25"]["gain"] == [0.0, 0.0, 0.0]
    assert "toy: BM25" in HeldOut(tmp_path / "data", 2).report(tiny(0))
