"""The command itself: help that is quick, errors in one line, exit codes that mean something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cache.errors import CollectionNotFound, StoreDamaged, StoreUnavailable
from checkpoint import CheckpointError
from preread import InvalidRequest, Overloaded, Unavailable
from preread_cli.main import cli

ROOT = Path(__file__).parents[2]


def test_the_help_names_every_command_and_the_two_steps() -> None:
    answer = CliRunner().invoke(cli, ["--help"])

    assert answer.exit_code == 0
    for word in ("preread index", "preread serve", "rerank", "verify", "PREREAD_STORE"):
        assert word in answer.output


def test_help_waits_for_nothing_heavy() -> None:
    check = (
        "import sys\n"
        "from preread_cli.main import COMMANDS, cli\n"
        "for words in (['--help'], *([name, '--help'] for section in COMMANDS.values() for name in section)):\n"
        "    cli(words, standalone_mode=False)\n"
        "heavy = ('torch', 'transformers', 'faiss', 'grpc', 'numpy', 'pyarrow', 'rich')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    said = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreDamaged("catalogue.sqlite is damaged"), 3),
        (CollectionNotFound("no 'docs'"), 2),
        (CheckpointError("no config.json"), 2),
        (InvalidRequest("top_n", -1, "at least 0"), 2),
        (ValueError("device is 'gpu'"), 2),
        (FileNotFoundError(2, "No such file", "x"), 2),
        (StoreUnavailable("redis is down"), 3),
        (Unavailable("nobody there"), 3),
        (Overloaded("full"), 3),
        (ZeroDivisionError("oops"), 70),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    @click.command()
    def failing() -> None:
        raise error

    monkeypatch.setitem(sys.modules, "preread_cli.commands.collection", type("module", (), {"stats": failing}))
    quiet = CliRunner().invoke(cli, ["stats"])
    loud = CliRunner().invoke(cli, ["--debug", "stats"])

    assert quiet.exit_code == loud.exit_code == code
    assert quiet.stderr.startswith("preread: error: ")
    assert len(quiet.stderr.splitlines()) == 1
    assert "Traceback" in loud.stderr


def test_debug_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREREAD_DEBUG", "1")
    assert "Traceback" in CliRunner().invoke(cli, ["stats", "--store", "nonsense"]).stderr


def test_a_checkpoint_is_described(tiny_checkpoint: Path) -> None:
    answer = CliRunner().invoke(cli, ["checkpoint", str(tiny_checkpoint), "--json"])

    assert answer.exit_code == 0
    facts = json.loads(answer.stdout)
    assert facts["dim"] == 64
    assert facts["max_passage_tokens"] == 1024
    assert len(facts["fingerprint"]) == 64
    assert facts["encoder_parameters"] < 200_000
    limited = CliRunner().invoke(cli, ["checkpoint", str(tiny_checkpoint), "--json", "--max-passage-tokens", "77"])
    assert json.loads(limited.stdout)["fingerprint"] != facts["fingerprint"]
    said = CliRunner().invoke(cli, ["checkpoint", str(tiny_checkpoint)]).stdout
    assert "1,000 tokens      take 31.3 KiB stored at r = 4 as SQfp16, " in said


def test_a_random_checkpoint_is_made_and_described(tmp_path: Path, tiny_checkpoint: Path) -> None:
    made = CliRunner().invoke(cli, ["checkpoint", "--make-random", "tiny", str(tmp_path / "new"), "--json"])
    again = CliRunner().invoke(cli, ["checkpoint", "--make-random", "tiny", str(tmp_path / "new")])
    original = CliRunner().invoke(cli, ["checkpoint", str(tiny_checkpoint), "--json"])

    assert made.exit_code == 0
    assert again.exit_code == 2  # never over something that is there
    # Same shape and seed: the same encoder, wherever it lies.
    assert json.loads(made.stdout)["fingerprint"] == json.loads(original.stdout)["fingerprint"]


def test_what_is_no_checkpoint_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    answer = CliRunner().invoke(cli, ["checkpoint", str(tmp_path)])

    assert answer.exit_code == 2
    assert "model_type is 'bert'; expected 't5gemma2'" in answer.stderr
