"""Real servers for real clients: `preread serve` from the main environment, in processes of their own.

These tests run in the clients' environment (scripts/test-conformance), which has neither torch nor the server; from
the checkout it takes the package `preread` alone. Those of search engines also run in another (scripts/test-engines);
those of mteb, and its blocks of docs/integrations.md, in the server's, with mteb next to it. Elsewhere there is nothing
to collect here.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SERVER_PYTHON = os.environ.get("PREREAD_SERVER_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
START_SECONDS = 120
KEY = "a-key-for-conformance-tests"
Ranking = list[tuple[int, float]]
os.environ |= {"HAYSTACK_TELEMETRY_ENABLED": "False", "HF_HUB_OFFLINE": "1"}  # nothing here needs the internet

HAS_CLIENTS, HAS_ENGINES, HAS_MTEB = (
    importlib.util.find_spec(name) is not None for name in ("cohere", "pymilvus", "mteb")
)


def _is_here(name: str) -> bool:
    """Whether this environment has the packages of a test module."""
    if name == "test_component_mteb.py":
        return HAS_MTEB
    elsewhere = {
        "test_component_page.py": HAS_MTEB,
        "test_engines.py": HAS_ENGINES,
        "test_engine_requests.py": HAS_ENGINES,
    }
    return HAS_CLIENTS or elsewhere.get(name, False)


collect_ignore = [test.name for test in Path(__file__).parent.glob("test_*.py") if not _is_here(test.name)]


@dataclass(frozen=True)
class Server:
    """One running `preread serve`."""

    url: str
    grpc_address: str
    encoder_address: str


def _preread(*arguments: str) -> list[str]:
    return [SERVER_PYTHON, "-m", "preread", *arguments]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREREAD_", "PYTHON"))}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: what is tested is the wire, not the order."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny-reranker"
    subprocess.run(_preread("checkpoint", "--make-random", "tiny", str(directory)), check=True, env=_environment())
    return directory


@contextmanager
def _serving(checkpoint: Path, directory: Path, *flags: str) -> Iterator[Server]:
    log = directory / "log"
    command = _preread("serve", "--model", str(checkpoint), "--store", f"faiss:{directory / 'store'}")
    # Without tiers the same request has the same score to the last digit, whichever client asks.
    command += ["--keys-cache-bytes", "0", "--prefix-cache-bytes", "0"]
    # Texts are looked up where two tests put them, so that no other test's collection decides how they are scored.
    command += ["--lookup", "found,docs"]
    command += ["--port", "0", "--encoder-port", "0", "--http-port", "0", "--threads", "1", "--dtype", "float32"]
    with (
        log.open("wb") as output,
        subprocess.Popen([*command, *flags], stdout=output, stderr=output, env=_environment()) as process,
    ):
        try:
            deadline = time.monotonic() + START_SECONDS
            while "\nready" not in log.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"`preread serve` did not become ready:\n{log.read_text()}")
                time.sleep(0.05)
            url = re.search(r"^http\s+(\S+)", log.read_text(), re.MULTILINE)
            address = re.search(r"^listening\s+(\S+)", log.read_text(), re.MULTILINE)
            encoder = re.search(r"^encoder\s+(\S+)", log.read_text(), re.MULTILINE)
            assert url is not None
            assert address is not None
            assert encoder is not None
            yield Server(url[1], address[1], encoder[1])
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Open to everyone; knows one model, and rerank-v3.5 as another name of it."""
    with _serving(checkpoint, tmp_path_factory.mktemp("server"), "--model-alias", "rerank-v3.5") as running:
        yield running


@pytest.fixture(scope="session")
def guarded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Wants a key, and serves one request at a time: the second is turned away."""
    flags = ("--api-key", f"rerank:{KEY}", "--max-queue-requests", "1", "--model-alias", "*")
    with _serving(checkpoint, tmp_path_factory.mktemp("guarded"), *flags) as running:
        yield running


@pytest.fixture(scope="session")
def narrow(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Iterator[Server]:
    """Takes three candidates a request; holds the documents as passages d0, d1 and so on of the collection `docs`."""
    from preread import Client, Passage

    with _serving(checkpoint, tmp_path_factory.mktemp("narrow"), "--max-candidates", "3") as running:
        with Client(running.grpc_address, encoder_address=running.encoder_address) as client:
            passages = [Passage(f"d{i}", text) for i, text in enumerate(documents)]
            assert {one.status for one in client.upsert(passages, collection="docs")} == {"stored"}
        yield running


@pytest.fixture(scope="session")
def by_text(narrow: Server, query: str, documents: list[str]) -> Ranking:
    """(index, score) best first of the documents as texts, one a request, without a component."""
    return _scores(narrow, query, [{"text": text} for text in documents])


@pytest.fixture(scope="session")
def by_id(narrow: Server, query: str, documents: list[str]) -> Ranking:
    """The same of the stored passages."""
    return _scores(narrow, query, [{"id": f"d{i}"} for i in range(len(documents))], collection="docs")


@pytest.fixture(scope="session")
def agree() -> Callable[[Ranking, Ranking], bool]:
    """agree(one, other): the same indexes in the same order, and the same scores within float32's digits."""

    def compare(one: Ranking, other: Ranking) -> bool:
        ours, theirs = [score for _, score in one], [score for _, score in other]
        return [index for index, _ in one] == [index for index, _ in other] and ours == pytest.approx(theirs)

    return compare


def _scores(server: Server, query: str, candidates: list[dict], **options: str) -> Ranking:
    from preread import Client

    with Client(server.grpc_address) as client:
        results = [client.rerank(query, [one], **options)[0] for one in candidates]
    return sorted(((i, one.score) for i, one in enumerate(results)), key=lambda pair: -pair[1])


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> str:
    return checkpoint.name


@pytest.fixture(scope="session")
def key() -> str:
    return KEY


@pytest.fixture(scope="session")
def query() -> str:
    return "What is deep learning?"


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return [
        "Deep learning is a branch of machine learning that uses neural networks with many layers.",
        "The weather today is sunny with a gentle breeze.",
        "Neural networks learn representations from data.",
        "Paris is the capital of France.",
    ]


@pytest.fixture(scope="session")
def abstracts() -> list[dict[str, str]]:
    """120 passages of 1.5 KB on average, under ids of eight digits."""
    with gzip.open(ROOT / "examples" / "scifact" / "corpus.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return [{"id": row["_id"], "text": row["text"]} for row in rows if len(row["_id"]) == 8][:120]


@pytest.fixture(scope="session")
def long_text() -> str:
    """Some five times the passage limit."""
    return "network " * 5000


@pytest.fixture(scope="session")
def ranking(server: Server, query: str, documents: list[str]) -> Ranking:
    """(index, score) best first, without any client package."""
    answer = post(server, "/v1/rerank", {"query": query, "documents": documents})
    return [(result["index"], result["relevance_score"]) for result in answer["results"]]


def post(server: Server, path: str, body: object) -> dict:
    import httpx

    response = httpx.post(server.url + path, json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture
def busy(guarded: Server, key: str, query: str) -> Iterator[None]:
    """While the test runs, somebody else's requests fill the guarded server."""
    import threading

    import httpx

    stop = threading.Event()
    headers = {"authorization": f"Bearer {key}"}

    def fill(worker: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            texts = [f"document {worker} {turn} {i} " * 20 for i in range(400)]
            httpx.post(
                f"{guarded.url}/v1/rerank", json={"query": query, "documents": texts}, headers=headers, timeout=60
            )

    threads = [threading.Thread(target=fill, args=(worker,)) for worker in range(2)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()
