"""`preread serve` over a store that is damaged, truncated or replaced under it, or cannot be opened."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from preread import Client, ClientOptions, format_stages

ROOT = Path(__file__).parents[2]
NUM_PASSAGES = 40
IDS = [f"p{i}" for i in range(NUM_PASSAGES)]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "preread", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def indexed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("indexed")
    rows = [{"id": one, "text": f"Passage {one} has a text of its own, and quite a few words."} for one in IDS]
    (directory / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = directory / "store"
    arguments = ("index", directory / "passages.jsonl", "-c", "docs", "--store", f"faiss:{path}")
    answer = subprocess.run(
        command(*arguments, "--model", tiny_checkpoint), env=environment(), capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return path


@dataclass
class Server:
    path: Path
    address: str
    process: subprocess.Popen[bytes]


@contextmanager
def serving(checkpoint: Path, path: Path, log: Path, *more: str) -> Iterator[Server]:
    """A server that reads the store for every request: it keeps no states."""
    arguments = (
        "serve",
        "--model",
        checkpoint,
        "--store",
        f"faiss:{path}",
        "--port",
        0,
        "--no-encoder",
        "--threads",
        1,
    )
    flags = ("--dtype", "float32", "--cache-bytes", 0, "--keys-cache-bytes", 0, "--prefix-cache-bytes", 0, *more)
    with log.open("wb") as output:
        process = subprocess.Popen(command(*arguments, *flags), stdout=output, stderr=output, env=environment())
    try:
        deadline = time.monotonic() + 120
        while "\nready" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        address = re.search(r"^listening\s+(\S+)", log.read_text(), re.MULTILINE)
        assert address is not None
        yield Server(path, address[1], process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def server(tiny_checkpoint: Path, indexed: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(indexed, tmp_path / "store")
    with serving(tiny_checkpoint, tmp_path / "store", tmp_path / "log") as running:
        yield running


def statuses(client: Client, ids: list[str]) -> dict[str, str]:
    response = client.rerank("Which passage?", ids, collection="docs")
    return {result.passage_id: result.status for result in response.results}


@contextmanager
def traffic(server: Server) -> Iterator[set[str]]:
    """Three clients that ask all the time; the statuses they see. Fails where a request did."""
    seen: set[str] = set()
    failures: list[BaseException] = []
    stop = threading.Event()

    def ask() -> None:
        try:
            with Client(server.address, options=ClientOptions()) as client:
                while not stop.is_set():
                    seen.update(statuses(client, IDS).values())
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert server.process.poll() is None


def test_a_collection_is_renamed_behind_its_name_while_requests_flow(server: Server) -> None:
    def run(*arguments: object) -> str:
        store = ("--store", f"faiss:{server.path}")
        answer = subprocess.run(
            command(*arguments, *store), env=environment(), capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    with traffic(server) as seen, Client(server.address) as client:
        statuses(client, IDS)
        assert (
            run("collection", "rename", "docs", "docs-1", "--alias", "docs") == "docs is now docs-1\ndocs -> docs-1\n"
        )
        time.sleep(1.5)  # longer than a server takes a name for granted
        statuses(client, IDS)
    assert seen == {"hit"}
    assert run("verify", "-c", "docs") == f"docs-1: {NUM_PASSAGES} passages read, 0 damaged\n"


def test_a_segment_truncated_while_requests_flow_costs_its_passages_and_no_process(server: Server) -> None:
    (segment,) = (server.path / "segments").iterdir()
    whole = segment.read_bytes()
    with traffic(server) as seen:
        for step in range(60):
            # As cp and rsync --inplace do it: the file that is open becomes shorter, and comes back.
            with segment.open("r+b") as file:
                file.truncate(len(whole) * (step % 4) // 4)
                time.sleep(0.02)
                file.seek(0)
                file.write(whole)
            time.sleep(0.01)
    assert seen == {"hit", "corrupt"}
    with Client(server.address) as client:
        assert set(statuses(client, IDS).values()) == {"hit"}
        os.truncate(segment, len(whole) - 10)
        after = statuses(client, IDS)
        assert sorted(after.values()) == ["corrupt"] + ["hit"] * (NUM_PASSAGES - 1)


def test_the_start_says_what_the_default_cascade_is_for_each_collection(
    tiny_checkpoint: Path, indexed: Path, tmp_path: Path
) -> None:
    with serving(tiny_checkpoint, indexed, tmp_path / "log", "--stages", "32:20, 4:5, 1") as server:
        (line,) = re.findall("^collections .*", (tmp_path / "log").read_text(), re.MULTILINE)
        assert "ratio 4" in line
        assert "scored at 32:20,4" in line
        with Client(server.address) as client:
            assert format_stages(client.rerank("q", IDS, collection="docs").summary.stages) == "32:20,4"


@pytest.mark.parametrize("damage", ["missing", "empty", "schema"])
def test_a_store_that_cannot_be_opened_is_never_ready(
    tiny_checkpoint: Path, indexed: Path, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "store"
    shutil.copytree(indexed, path)
    catalogue = path / "catalogue.sqlite"
    if damage == "missing":
        catalogue.unlink()
    elif damage == "empty":
        catalogue.write_bytes(b"")
    else:
        catalogue.write_bytes(catalogue.read_bytes().replace(b"CREATE TABLE aliases", b"CREATE TABLE aliased"))
    arguments = ("serve", "--model", tiny_checkpoint, "--store", f"faiss:{path}", "--port", 0, "--no-encoder")
    answer = subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 3, answer.stdout + answer.stderr
    assert "ready" not in answer.stdout
    assert str(catalogue) in answer.stderr
    assert "Traceback" not in answer.stderr
