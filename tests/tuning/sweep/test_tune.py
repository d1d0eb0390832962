"""A sweep from passages and queries to a report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from scipy.stats import kendalltau

from cache.collection import Collection, StoredPassage
from cache.manifest import Manifest
from cache.open import open_store
from cache.record import HEADER_BYTES
from cache.states import PassageStates, text_digest
from cache.store import Store
from checkpoint import Checkpoint
from encoder_worker.encoder import Encoder
from tuning import EvaluationError
from tuning.config import EvaluationSettings, Limits
from tuning.evaluate import evaluate
from tuning.judged import JudgedCollection
from tuning.metrics import HEADLINE
from tuning.sweep.margins import AUC, TAU
from tuning.sweep.outputs import sweep_json
from tuning.sweep.report import SweepReport, SweepRow
from tuning.sweep.summary import SweepSummary
from tuning.sweep.workdir import SpilledStates
from tuning.trec import RunFile

Sweep = Callable[..., SweepReport]


def by_name(report: SweepReport) -> dict[str, SweepRow]:
    return {row.configuration.name: row for row in report.rows}


def without_times(report: SweepReport) -> dict[str, Any]:
    """The values that a seeded run repeats."""
    document: dict[str, Any] = json.loads(sweep_json(SweepSummary(report, Limits(), None)))
    del document["hardware"]
    for one in document["configurations"]:
        del one["timing"], one["indexing"], one["on_latency_front"]
    return document


def test_flat_states_give_what_an_evaluation_gives(sweep: Sweep, judged: JudgedCollection, tiny: Path) -> None:
    report = sweep()
    plain = evaluate(judged, tiny, EvaluationSettings(ratios=(1, 2, 8)), device="cpu", dtype="float32")
    rows = by_name(report)
    assert sorted(rows) == sorted(
        f"{stored} {codec} read {read}"
        for codec in ("Flat", "SQ8")
        for stored, reads in ((1, ("1", "2", "8", "8:3,2")), (2, ("2", "8", "8:3,2")))
        for read in reads
    )
    runs = {ratio: rows[f"1 Flat read {ratio}"].quality.run for ratio in (1, 2, 8)}
    for ratio, run in [(1, report.reference.run), *runs.items()]:
        for q, ranking in plain.reranked(ratio).run.items():
            assert dict(run[q]) == pytest.approx(dict(ranking), abs=1e-4)  # other batches, other last digits
    assert rows["1 Flat read 1"].quality.run == report.reference.run
    assert rows["1 Flat read 1"].quality.loss.mean == 0
    assert rows["1 Flat read 1"].quality.measures[TAU].mean == 1


def test_measures_are_those_of_the_orders(sweep: Sweep, judged: JudgedCollection) -> None:
    report = sweep()
    for row in report.rows:
        values = row.quality.per_query
        for i, q in enumerate(report.qrels):
            mine = [p for p, _ in row.quality.run[q]]
            theirs = [p for p, _ in report.reference.run[q]]
            grades = judged.qrels[q]
            if not mine:  # q4 shares no word with any passage
                assert values[HEADLINE][i] == 0
                assert np.isnan([values[name][i] for name in (TAU, "top-3 overlap", AUC)]).all()
                continue
            assert values["top-3 overlap"][i] == pytest.approx(len({*mine[:3]} & {*theirs[:3]}) / min(3, len(mine)))
            if len(mine) > 1:
                places = [mine.index(p) for p in theirs]
                assert values[TAU][i] == pytest.approx(kendalltau(range(len(mine)), places).statistic)
            pairs = [
                mine.index(p) < mine.index(o)
                for p in mine if grades.get(p, 0) >= 1
                for o in mine if grades.get(o, 0) < 1
            ]  # fmt: skip
            assert values[AUC][i] == pytest.approx(np.mean(pairs)) if pairs else np.isnan(values[AUC][i])


def test_run_files_give_ir_measures_the_same_numbers(sweep: Sweep, tmp_path: Path) -> None:
    report = sweep()
    paths = report.write_runs(tmp_path / "runs")
    assert len(paths) == len(report.rows) + 3
    qrels = list(ir_measures.read_trec_qrels(str(paths[0])))
    measures = {HEADLINE: ir_measures.nDCG @ 10, "MRR@10": ir_measures.RR @ 10}
    for path, quality in zip(
        paths[1:], [report.first_stage, report.reference, *(row.quality for row in report.rows)], strict=True
    ):
        theirs = ir_measures.calc_aggregate(list(measures.values()), qrels, list(ir_measures.read_trec_run(str(path))))
        for name, measure in measures.items():
            assert quality.measures[name].mean == pytest.approx(theirs[measure])


def test_bytes_are_those_of_a_collection(sweep: Sweep, judged: JudgedCollection, tiny: Path) -> None:
    rows = by_name(sweep())
    store = open_store("memory:tune-bytes")
    collection = _index(store, tiny, judged.passages, ratio=2, codec="Flat")
    stats = collection.stats()
    size = rows["2 Flat read 8"].size
    text_bytes = sum(len(text.encode()) for text in judged.passages.values())
    assert size.collection_bytes == stats.size_bytes - text_bytes
    assert size.bytes_per_passage == size.collection_bytes / stats.num_passages
    assert size.bytes_per_passage > HEADER_BYTES
    assert size == rows["2 Flat read 2"].size
    assert rows["2 SQ8 read 2"].size.bytes_per_passage < size.bytes_per_passage / 3
    store.close()


def test_everything_was_timed(sweep: Sweep) -> None:
    for row in sweep(timed_queries=2).rows:
        assert row.timing is not None
        assert row.timing.num_samples == 4
        assert row.timing.store_seconds > 0
        assert row.timing.decoder_seconds > 0
        assert row.timing.p50_seconds <= row.timing.p99_seconds
        assert row.indexing.seconds is not None
        assert row.indexing.seconds > 0


def test_the_same_seed_gives_the_same_numbers(sweep: Sweep, tmp_path: Path) -> None:
    first = without_times(sweep())
    assert without_times(sweep()) == first  # from what was kept
    assert without_times(sweep(work_dir=tmp_path / "elsewhere")) == first  # and from nothing


def test_what_was_computed_is_not_computed_again(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep()
    from decoder_server.models.fbnl.backend import FbnlBackend

    def never(*_: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(Encoder, "encode", never)
    monkeypatch.setattr(FbnlBackend, "score", never)
    sweep()
    sweep(cascades=(), read_ratios=(2,))  # fewer need nothing new
    with pytest.raises(AssertionError, match="scored again"):
        sweep(read_ratios=(16,))


def test_without_judgements_the_reference_judges(sweep: Sweep, judged: JudgedCollection) -> None:
    report = sweep(judged=replace(judged, qrels={}))
    assert report.taught
    assert report.reference.measures[HEADLINE].mean == pytest.approx(1)
    assert report.reference.measures["MRR@10"].mean == 1
    assert list(report.qrels) == ["q1", "q2", "q3"]  # q4 has no candidates
    assert "1 queries have no candidates: left out" in report.notes
    best, second = [p for p, _ in report.reference.run["q1"]][:2]
    assert (report.qrels["q1"][best], report.qrels["q1"][second]) == (10, 9)
    assert by_name(report)["2 SQ8 read 8"].quality.headline < 1


def test_what_is_odd_about_the_data_is_told(sweep: Sweep) -> None:
    run = RunFile({"q1": [("bread", 3.0), ("gone", 2.0), ("moon", 1.0)], "q9": [("moon", 1.0)]}, "mine")
    report = sweep(candidates=run)
    assert report.first_stage_name == "mine"
    assert report.notes == [
        "1 judgements name queries without a text (1 of them): left out",
        "1 judgements name passages that the collection does not have: relevant, and never found",
        "1 queries of the run are not evaluated: left out",
        "3 queries have no candidates: they count 0",
        "1 candidate passages have no text or states: ranked last",
        *(note for note in report.notes if "trained on few states" in note),
    ]
    assert all(row.quality.run["q1"][-1][0] == "gone" for row in report.rows)


def test_no_candidates_at_all_end_the_sweep(sweep: Sweep, judged: JudgedCollection) -> None:
    with pytest.raises(EvaluationError, match="no query has any candidate"):
        sweep(judged=replace(judged, queries={"q4": judged.queries["q4"]}, qrels={"q4": judged.qrels["q4"]}))


def test_a_codec_without_enough_states_falls_back_or_is_refused(sweep: Sweep) -> None:
    report = sweep(codecs=("Flat", "PQ4x10"))
    assert report.codecs == ["Flat", "SQfp16"]
    told = "PQ4x10 at stored ratio 1 is left out, SQfp16 stands in for it: sample: "
    assert any(note.startswith(told) for note in report.notes)
    with pytest.raises(EvaluationError, match=r"codec PQ4x10 at stored ratio 1: sample: .* at least 1024"):
        sweep(codecs=("Flat", "PQ4x10"), few_samples="refuse")


def test_a_collection_without_texts_is_its_own_reference(sweep: Sweep, judged: JudgedCollection, tiny: Path) -> None:
    store = open_store("memory:tune-textless")
    stored = _index(store, tiny, judged.passages, ratio=2, codec="SQfp16", stores_text=False)
    run = RunFile({"q1": [("moon", 3.0), ("tide", 2.0), ("bread", 1.0)]}, "mine")
    bare = replace(judged, passages={})
    report = sweep(judged=bare, stored=stored, candidates=run, stored_ratios=(2, 4), read_ratios=(4,), cascades=())
    assert report.reference_ratio == 2
    assert [row.configuration.name for row in report.rows] == [
        "2 Flat read 4", "2 SQ8 read 4", "4 Flat read 4", "4 SQ8 read 4",
    ]  # fmt: skip
    assert "kept keeps no texts: the reference is its stored states (ratio 2, SQfp16)" in " ".join(report.notes)
    assert report.num_passages == len(judged.passages)
    assert report.rows[0].indexing.encoder_seconds is None
    with pytest.raises(EvaluationError, match="stored ratio is 1; the states are at 2, expected a multiple of it"):
        sweep(judged=bare, stored=stored, candidates=run, stored_ratios=(1,))
    store.close()


def test_a_passage_without_a_token_is_not_counted(sweep: Sweep, judged: JudgedCollection) -> None:
    more = replace(judged, passages=judged.passages | {"blank": " \n"})
    assert sweep(judged=more).num_passages == len(judged.passages)


def test_states_that_are_nan_cost_their_passage_alone(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = Encoder.encode
    # Of q1's candidates, by their number of tokens: the encoder does not know ids.
    spoilt = {len(states.states) for p, states in _states_of(sweep, tmp_path).items() if p == "sea"}

    def encode(self: Encoder, batch: Any, ratio: int) -> list[Any]:
        found = whole(self, batch, ratio)
        for states in found:
            if len(states) in spoilt:
                states[0, 0] = np.nan
        return found

    monkeypatch.setattr(Encoder, "encode", encode)
    report = sweep(work_dir=tmp_path / "spoilt")
    assert "1 candidate passages gave no states (NaN, infinite, or out of memory): ranked last" in report.notes
    assert all(row.quality.run["q1"][-1][0] == "sea" for row in report.rows)


def _states_of(sweep: Sweep, tmp_path: Path) -> dict[str, PassageStates]:
    report = sweep(work_dir=tmp_path / "whole")
    (directory,) = (tmp_path / "whole").iterdir()
    spilled = SpilledStates(directory, 1, Checkpoint.open(report.checkpoint).dim)
    return {p: spilled.states(p) for p in spilled.passage_ids}


_KILLED = """
import sys
from pathlib import Path
from tuning.judged import read_judged
from tuning.config import SweepSettings
from tuning.sweep.tune import tune
settings = SweepSettings(codecs=("Flat", "SQ8", "SQfp16"), cascades=(), timed_queries=0, num_resamples=300)
tune(read_judged(sys.argv[1]), sys.argv[2], settings, work_dir=sys.argv[3], device="cpu", dtype="float32")
"""


def test_a_killed_run_goes_on_and_ends_alike(beir: Path, tiny: Path, sweep: Sweep, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED, str(beir), str(tiny), str(tmp_path / "killed")]
    killed = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 120
    while killed.poll() is None and not list((tmp_path / "killed").glob("*/margins/r1-Flat/*.npz")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    same = {"codecs": ("Flat", "SQ8", "SQfp16"), "cascades": (), "stored_ratios": None, "read_ratios": None}
    resumed = without_times(sweep(work_dir=tmp_path / "killed", **same))
    assert len(list((tmp_path / "killed").iterdir())) == 1  # it went on there
    assert resumed == without_times(sweep(work_dir=tmp_path / "whole", **same))


def _index(
    store: Store, tiny: Path, texts: dict[str, str], *, ratio: int, codec: str, stores_text: bool = True
) -> Collection:
    """A collection as `preread index` leaves it."""
    checkpoint = Checkpoint.open(tiny)
    identity = checkpoint.identity
    manifest = Manifest.of(
        identity,
        collection="kept",
        compression_ratio=ratio,
        codec=codec,
        stores_text=stores_text,
    )
    collection = Collection.create(store, manifest)
    tokens = checkpoint.text.passages(list(texts.values()))
    states = Encoder(checkpoint, device="cpu", dtype="float32").encode([t.ids for t in tokens], ratio)
    collection.put_many(
        [
            StoredPassage(p, PassageStates(own, (len(t.ids),), ratio, t.truncated, text_digest(text)), text)
            for (p, text), t, own in zip(texts.items(), tokens, states, strict=True)
        ]
    )
    return collection
