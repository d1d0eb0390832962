"""A finished run is measured as an evaluation measures it, and nothing is loaded for that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from preread_cli.main import cli
from tuning.config import EvaluationSettings
from tuning.evaluate import evaluate

SETTINGS = EvaluationSettings(ratios=(4,), num_resamples=500)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


@pytest.fixture
def runs(beir: Path, tiny: Path, tmp_path: Path) -> Path:
    """Runs and judgements of an evaluation."""
    evaluate(beir, tiny, SETTINGS, device="cpu", dtype="float32").write_runs(tmp_path / "runs")
    return tmp_path / "runs"


def measured(*arguments: object) -> list[dict[str, object]]:
    answer = invoke(*arguments, "--json")
    assert answer.exit_code == 0, answer.output
    return [{key: one[key] for key in ("measures", "per_query")} for one in json.loads(answer.stdout)["systems"]]


def test_it_is_what_the_evaluation_measured(beir: Path, tiny: Path, runs: Path) -> None:
    evaluated = measured(
        beir, "--model", tiny, "--device", "cpu", "--dtype", "float32", "--ratios", 4, "--run", runs / "bm25.run"
    )
    for one in evaluated[1]["measures"].values():
        del one["kept"]  # of the finest ratio: a run has none
    assert measured(beir, "--score-only", runs / "r4.run", "--run", runs / "bm25.run") == evaluated
    assert measured(beir, "--score-only", runs / "bm25.run") == evaluated[:1]


def test_judgements_alone_will_do(beir: Path, runs: Path) -> None:
    alone = invoke("--qrels", runs / "qrels.txt", "--score-only", runs / "r4.run", "--json")
    document, whole = (
        json.loads(alone.stdout),
        json.loads(invoke(beir, "--score-only", runs / "r4.run", "--json").stdout),
    )
    assert document["systems"] == whole["systems"]
    assert document["collection"] == "qrels"
    assert document["counts"]["num_judgements_of_unknown_passages"] == 0  # nothing to compare them with


def test_what_is_unknown_is_counted_and_no_cell_is_cut(beir: Path, runs: Path) -> None:
    with (runs / "r4.run").open("a") as file:
        file.write("q1 Q0 nowhere 9 -99 x\nstray Q0 moon 1 1 x\n")
    answer = invoke(beir, "--score-only", runs / "r4.run", "--run", runs / "bm25.run")
    assert answer.exit_code == 0, answer.output
    lines = answer.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["run", "preread-bm25", "x"]
    assert "…" not in answer.stdout
    for note in (
        "1 judgements name queries without a text (1 of them): left out",
        "1 judgements name passages that the collection does not have: relevant, and never found",
        "1 queries of the run are not evaluated: left out",
        "1 queries have no candidates: they count 0",
        "1 passages of the run are not in the collection: they take their places",
    ):
        assert f"Note: {note}." in " ".join(answer.stdout.split())


def test_a_run_of_other_queries_is_an_error(beir: Path, tmp_path: Path) -> None:
    (tmp_path / "other.run").write_text("zz Q0 moon 1 1.0 x\n")
    answer = invoke(beir, "--score-only", tmp_path / "other.run")
    assert answer.exit_code == 2
    assert "the run ranks nothing for any of the queries" in answer.stderr


def test_a_flag_about_a_model_is_an_error(beir: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREREAD_DTYPE", "float32")  # meant for other commands
    answer = invoke(beir, "--score-only", runs / "r4.run", "--ratios", "4")
    assert answer.exit_code == 2
    assert "--score-only loads no model; --ratios is about one." in answer.stderr
    assert invoke(beir, "--score-only", runs / "r4.run").exit_code == 0


def test_nothing_heavy_is_loaded(beir: Path, runs: Path) -> None:
    check = (
        "import sys\n"
        "from preread_cli.main import cli\n"
        "cli(sys.argv[1:], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'grpc', 'bm25s') if name in sys.modules], file=sys.stderr)"
    )
    words = ["evaluate", str(beir), "--score-only", str(runs / "r4.run")]
    said = subprocess.run([sys.executable, "-c", check, *words], capture_output=True, text=True, check=True)
    assert said.stderr.strip() == "[]"
