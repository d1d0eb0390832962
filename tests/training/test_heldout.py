from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.collections import SELECTION_QUERIES, RawCollection
from training.evaluation import HeldOut, margins, rerank
from training.model import TrainableCheckpoint, mean_pool
from tuning.judged import JudgedCollection

PASSAGES = {"a": "red fish stone", "b": "green fish river", "c": "blue bird cloud", "d": "north stone red"}
QUERIES = {"1": "red stone", "2": "green river"}
QRELS = {"1": {"d": 1}, "2": {"b": 2}}


def test_a_collection_survives_a_round_trip(tmp_path: Path) -> None:
    collection = RawCollection("toy", PASSAGES, {}, QUERIES, {}, QRELS)
    collection.write(tmp_path / "toy")
    again = RawCollection.read(tmp_path / "toy")
    assert (again.passages, again.queries, again.qrels) == (collection.passages, collection.queries, collection.qrels)


def test_what_is_reported_and_what_is_chosen_by_share_no_query() -> None:
    names = [f"q{i}" for i in range(70)]
    collection = RawCollection("toy", PASSAGES, {}, dict.fromkeys(names, "red"), {}, {q: {"a": 1} for q in names})
    report, select = collection.to_report_and_select(set(names))
    assert len(select.queries) == SELECTION_QUERIES
    assert report.queries.keys() | select.queries.keys() == set(names)
    assert not report.queries.keys() & select.queries.keys()
    assert report.passages is select.passages is collection.passages


def test_margins_equal_one_pair_at_a_time(tiny: Callable[[int], TrainableCheckpoint]) -> None:
    checkpoint = tiny(0)
    found = margins(checkpoint, PASSAGES, QUERIES, {"1": ["a", "d"], "2": ["b"]}, (1, 2), batch=2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for query_id, own in found[2].items():
            prompt = checkpoint.prompt_ids([QUERIES[query_id]], [""])
            for passage_id, margin in own.items():
                states, mask = checkpoint.encode(checkpoint.passage_ids([PASSAGES[passage_id]]))
                pooled, pooled_mask = mean_pool(states.float(), mask, 2)
                alone = checkpoint.margins(prompt, pooled, pooled_mask)
                assert margin == pytest.approx(float(alone[0]), abs=0.1)  # bf16


def test_a_reranking_has_the_same_candidates_by_falling_margin(tiny: Callable[[int], TrainableCheckpoint]) -> None:
    candidates = {"1": [("a", 2.0), ("d", 1.0), ("c", 0.5)], "2": [("b", 1.0)]}
    judged = JudgedCollection("toy", PASSAGES, QUERIES, QRELS)
    run = rerank(tiny(0), judged, candidates, (4,))[4]
    scored = margins(tiny(0), PASSAGES, QUERIES, {"1": ["a", "d", "c"], "2": ["b"]}, (4,))[4]
    assert [p for p, _ in run["1"]] == sorted(scored["1"], key=lambda p: -scored["1"][p])
    assert [p for p, _ in run["2"]] == ["b"]


def test_a_report_names_every_collection_and_ratio(tiny: Callable[[int], TrainableCheckpoint], tmp_path: Path) -> None:
    RawCollection("toy", PASSAGES, {}, QUERIES, {}, QRELS).write(tmp_path / "toy")
    line = HeldOut(tmp_path, 2).report(tiny(0), (1, 4))
    assert line.startswith("toy: BM25 ")
    assert "r1 " in line
    assert "r4 " in line
