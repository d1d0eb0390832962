"""`--json` of every command: a switch, and then standard output is one JSON document and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks.synthetic import Size, make_cross_encoder
from preread import Client, Passage
from preread_cli.config_file import commands
from preread_cli.main import cli

COMMANDS = dict(commands(cli, click.Context(cli)))
SERVERS = {"serve", "encode-worker"}  # they print no result
TEXTS = {"p1": "the sky is blue", "p2": "grass is green", "p3": "blood is red"}


@dataclass
class Fixtures:
    """Files of one module, a store of one test, and a running server."""

    files: Path
    store: str
    address: str
    model: str

    def model_flags(self, *arguments: object) -> tuple[object, ...]:
        return (*arguments, "--threads", 1, "--dtype", "float32")

    def measured(self, *arguments: object) -> tuple[object, ...]:
        return self.model_flags(*arguments, self.files / "beir", "--model", self.model)


# What each needs besides --json.
ARGUMENTS: dict[str, Callable[[Fixtures], tuple[object, ...]]] = {
    "index": lambda f: f.model_flags(f.files / "beir", "-c", "new", "--store", f.store, "--model", f.model),
    "warm": lambda f: ("-c", "json", "--ids", f.files / "ids", "--address", f.address),
    "rerank": lambda f: ("blue", "-c", "json", "--ids", f.files / "ids", "--address", f.address),
    "tune": lambda f: f.measured(
        "--stored-ratios", 2, "--codecs", "SQfp16", "--read-ratios", 2, "--cascades", "none", "--timed-queries", 1,
        "--out", f.files / "tune", "--max-loss", "100%",
    ),
    "evaluate": lambda f: f.measured("--ratios", 4),
    "stats": lambda f: ("--store", f.store),
    "verify": lambda f: ("-c", "docs", "--store", f.store),
    "collection alias": lambda f: ("live", "docs", "--store", f.store),
    "collection compact": lambda f: ("docs", "--store", f.store),
    "collection reindex": lambda f: ("docs", "--store", f.store),
    "collection rename": lambda f: ("docs", "docs-1", "--alias", "docs", "--store", f.store),
    "collection reencode": lambda f: f.model_flags(
        "docs", "--codec", "B32,SQ8", "--store", f.store, "--model", f.model
    ),
    "collection show": lambda f: ("docs", "p1", "--store", f.store),
    "collection remove": lambda f: ("docs", "p1", "--store", f.store),
    "collection delete": lambda f: ("docs", "--text", TEXTS["p2"], "--store", f.store),
    "collection drop": lambda f: ("docs", "--yes", "--store", f.store),
    "checkpoint": lambda f: (f.model,),
    "check": lambda f: f.model_flags(f.model, "--pairs", f.files / "pairs.jsonl"),
    "convert-ctxl": lambda f: (
        f.files / "causal", f.files / "converted", "--pairs", f.files / "pairs.jsonl", "--parity", "float32",
    ),
    "doctor": lambda f: ("--model", f.model, "--store", f.store, "--threads", 1),
    "health": lambda f: ("--address", f.address),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(server_pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")

    def write(name: str, rows: list[dict[str, object]]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("beir/corpus.jsonl", [{"_id": one, "text": text} for one, text in TEXTS.items()])
    write("beir/queries.jsonl", [{"_id": "q1", "text": "blue sky"}, {"_id": "q2", "text": "red blood"}])
    (folder / "beir" / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp1\t1\nq2\tp3\t1\n")
    write("pairs.jsonl", [{"query": "blue", "passage": text} for text in TEXTS.values()])
    (folder / "ids").write_text("p1\np2\n")
    make_cross_encoder(folder / "causal", "Qwen3ForCausalLM", Size())
    with Client(server_pair.address, encoder_address=server_pair.encoder_address) as client:
        assert len(list(client.upsert([Passage(*pair) for pair in TEXTS.items()], collection="json"))) == len(TEXTS)
    given = ["index", folder / "beir", "-c", "docs", "--store", f"faiss:{folder / 'store'}", "--dtype", "float32"]
    answer = CliRunner().invoke(cli, [*map(str, given), "--model", str(server_pair.checkpoint), "--threads", "1"])
    assert answer.exit_code == 0, answer.output
    return folder


def test_every_command_that_prints_a_result_has_the_switch() -> None:
    assert set(ARGUMENTS) == set(COMMANDS) - SERVERS
    for name, command in COMMANDS.items():
        found = {
            (one.name, one.is_flag) for one in command.params if isinstance(one, click.Option) and "--json" in one.opts
        }
        assert found == (set() if name in SERVERS else {("as_json", True)}), name


@pytest.mark.parametrize("name", ARGUMENTS)
def test_standard_output_is_one_document(
    name: str, files: Path, server_pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(files / "store", tmp_path / "store")
    given = Fixtures(files, f"faiss:{tmp_path / 'store'}", server_pair.address, str(server_pair.checkpoint))
    answer = CliRunner().invoke(cli, [*name.split(), "--json", *map(str, ARGUMENTS[name](given))])
    assert answer.exit_code in ((0, 1) if name == "check" else (0,)), answer.output  # random weights may be no good
    assert json.loads(answer.stdout)
    assert capfd.readouterr().out == ""


def test_a_file_of_queries_is_a_line_of_json_each(files: Path, server_pair) -> None:
    (files / "queries.tsv").write_text("q1\tblue sky\nq2\tred blood\n")
    given = ["rerank", "--queries", files / "queries.tsv", "-c", "json", "--ids", files / "ids", "--json"]
    answer = CliRunner().invoke(cli, [*map(str, given), "--address", server_pair.address])
    assert [json.loads(line)["query_id"] for line in answer.stdout.splitlines()] == ["q1", "q2"]
