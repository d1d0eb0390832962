"""The world that pages' commands need, made once: passages, a judged folder, models under the names that pages use."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.synthetic import Size, make_cross_encoder
from tests.docs.terminal import PORTS, Terminal, Warm
from tests.redis_fixture import RedisServer, free_port

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "preread" / "models" / "preread-mini"
PASSAGES = {
    "p1": "The sky is blue because air scatters blue light most.",
    "p2": "At sunset light crosses more air: red and orange are left.",
    "p3": "Grass is green: chlorophyll absorbs red and blue light.",
    "p4": "Tides rise and fall because the moon pulls the sea.",
    "p5": "Yeast eats sugar and gives off gas, which makes dough rise.",
    "p6": "Iron rusts in wet air, where water and oxygen reach it.",
    "p7": "Deep learning trains neural networks of many layers.",
    "p8": "The axis of the earth is tilted, and so there are seasons.",
}
QUERIES = {"q1": "why is the sky blue", "q2": "what makes dough rise", "q3": "why are there tides"}
MODELS = {  # a name in pages -> a tiny random model in its shape
    "BAAI/bge-reranker-v2-m3": "XLMRobertaForSequenceClassification",
    "ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b": "Qwen3ForCausalLM",
    "models/mini": "BertForSequenceClassification",
    "models/ctxl-seq-cls": "Qwen3ForSequenceClassification",
}


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    directory = Path(tempfile.mkdtemp(prefix="preread-"))
    started = Warm(directory)
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to copy: every file that a page's command takes without having made it."""
    world = tmp_path_factory.mktemp("world")
    write(world / "passages.jsonl", [{"id": name, "text": text} for name, text in PASSAGES.items()])
    write(world / "queries.jsonl", [{"id": name, "text": text} for name, text in QUERIES.items()])
    (world / "popular.txt").write_text("".join(f"{name}\n" for name in list(PASSAGES)[:4]))
    pairs = [{"query": query, "passage": text} for query in QUERIES.values() for text in PASSAGES.values()]
    write(world / "pairs.jsonl", pairs)
    (world / "examples").mkdir()
    (world / "examples" / "scifact").symlink_to(ROOT / "examples" / "scifact")
    cut_scifact(world / "scifact", 8)
    (world / "models").mkdir()
    for name in ("my-model", "KaLM-Embedding/KaLM-Reranker-V1-Nano"):
        (world / name).parent.mkdir(exist_ok=True)
        (world / name).symlink_to(SHIPPED)
    (world / "etc" / "preread").mkdir(parents=True)
    (world / "etc" / "preread" / "keys").write_text("admin 0123456789abcdef\n")
    for name, architecture in MODELS.items():
        make_cross_encoder(world / name, architecture, Size())
    return world


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cut_scifact(folder: Path, num_queries: int) -> None:
    """The first claims of examples/scifact that have a judgement, all their abstracts, and a few more."""
    source = ROOT / "examples" / "scifact"
    folder.mkdir(parents=True)
    header, *lines = (source / "qrels.tsv").read_text().splitlines()
    judged = [line.split("\t") for line in lines]
    queries = set(list(dict.fromkeys(row[0] for row in judged))[:num_queries])
    kept = [row for row in judged if row[0] in queries]
    relevant = {row[1] for row in kept}
    (folder / "qrels.tsv").write_text("\n".join([header, *("\t".join(row) for row in kept)]) + "\n")
    for name, wanted, others in (("queries", queries, 0), ("corpus", relevant, len(relevant))):
        with gzip.open(source / f"{name}.jsonl.gz", "rt") as rows:
            read = [(json.loads(line)["_id"], line) for line in rows]
        spare = itertools.islice((one for one, _ in read if one not in wanted), others)
        chosen = wanted | set(spare)
        (folder / f"{name}.jsonl.gz").write_bytes(
            gzip.compress("".join(line for one, line in read if one in chosen).encode())
        )


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), "--databases", "64").start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def databases() -> Iterator[int]:
    return itertools.count()


@pytest.fixture
def terminal(
    tmp_path: Path, world: Path, warm: Warm, redis_server: RedisServer, databases: Iterator[int]
) -> Iterator[Terminal]:
    """A copy of the world, with ports and a Redis database that no other test has."""
    directory = tmp_path / "here"
    shutil.copytree(world, directory, symlinks=True)
    warm.wait()
    ports = {port: free_port() for port in PORTS}
    named = {
        "redis://cache:6379/0": f"{redis_server.url}/{next(databases)}",
        "worker:50052": f"localhost:{ports[50052]}",
        "/models/": f"{directory}/models/",
        "/etc/preread/": f"{directory}/etc/preread/",
    }
    terminal = Terminal(directory, warm, ports, named)
    yield terminal
    terminal.close()
