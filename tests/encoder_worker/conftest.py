"""A real encoder over the tiny checkpoint, real passages, stores, and the command in separate processes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from click.testing import CliRunner

from cache.open import open_store
from cache.store import Store
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.sources import Place, SourcePassage
from preread_cli.main import cli

ROOT = Path(__file__).parents[2]

_spec = importlib.util.spec_from_file_location("worker_fixture", Path(__file__).with_name("worker_fixture.py"))
assert _spec is not None
assert _spec.loader is not None
worker_fixture = importlib.util.module_from_spec(_spec)
sys.modules["worker_fixture"] = worker_fixture  # dataclasses look their module up
_spec.loader.exec_module(worker_fixture)


@pytest.fixture(scope="session")
def encoder(tiny_checkpoint: Path) -> PassageEncoder:
    """Passages of up to 1,024 tokens, the checkpoint's own limit."""
    return PassageEncoder.load(str(tiny_checkpoint), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def short_encoder(tiny_checkpoint: Path) -> PassageEncoder:
    """The same weights with a limit of 32 tokens: longer passages are cut or split."""
    return PassageEncoder.load(str(tiny_checkpoint), device="cpu", dtype="float32", max_passage_tokens=32)


@pytest.fixture(scope="session")
def real_texts() -> list[str]:
    """Some 2,600 paragraphs of Python's own reference, of every length from a few words on."""
    return [part.strip() for topic in topics.values() for part in re.split(r"\n\s*\n", topic) if part.strip()]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"faiss:{tmp_path / 'store'}")
    yield opened
    opened.close()


def as_passages(texts: list[str], prefix: str = "p") -> list[SourcePassage]:
    return [SourcePassage(f"{prefix}{i}", text, Place("test", i + 1)) for i, text in enumerate(texts)]


@pytest.fixture
def passages() -> Callable[..., list[SourcePassage]]:
    return as_passages


def write_jsonl(path: Path, texts: list[str]) -> Path:
    rows = (json.dumps({"id": f"p{i}", "text": text}) for i, text in enumerate(texts))
    path.write_text("".join(row + "\n" for row in rows))
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[list[str]], Path]:
    """Writes texts as p0, p1, ... and returns the file."""
    return lambda texts: write_jsonl(tmp_path / "passages.jsonl", texts)


Preread = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def preread(tmp_path: Path, tiny_checkpoint: Path) -> Iterator[Preread]:
    """Starts `preread COMMAND ...` on the tiny checkpoint and the test's store in a separate process."""
    started: list[subprocess.Popen[bytes]] = []

    def start(command: str, *arguments: object, **options: object) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "preread", command, *map(str, arguments)]
        line += ["--model", str(tiny_checkpoint), "--store", f"faiss:{tmp_path / 'store'}", "--threads", "1"]
        process = subprocess.Popen(
            [*line, "--dtype", "float32"],
            stdin=options.get("stdin", subprocess.DEVNULL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def run_index(tmp_path: Path, tiny_checkpoint: Path) -> Callable[..., tuple[int, str, str]]:
    """`preread index ...` in this process, to its end: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        line = ["index", *map(str, arguments), "--model", str(tiny_checkpoint)]
        line += ["--store", f"faiss:{tmp_path / 'store'}", "--threads", "1", "--dtype", "float32"]
        result = CliRunner().invoke(cli, line, prog_name="preread")
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.fixture
def worker(tiny_checkpoint: Path, store: Store) -> Callable[..., Any]:
    """Starts an EncoderServer over the embedded store; keyword arguments are EncoderConfig's."""
    return lambda **config: worker_fixture.serve(tiny_checkpoint, store, **config)
