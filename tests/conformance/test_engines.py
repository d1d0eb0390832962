"""Recipes of docs/engines that are run: every Python block, over real engines, with 100 candidates by id."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from preread.v1.rerank_pb2 import RerankRequest
from tests.conformance.engine_pages import blocks, says
from tests.conformance.relay import Relay

NEEDS = {
    "chroma": ["chromadb"],
    "lancedb": ["lancedb"],
    "milvus-lite": ["pymilvus", "milvus_lite"],
    "pgvector": ["pgserver", "psycopg"],
    "qdrant": ["qdrant_client"],
    "sqlite": [],
    "tantivy": ["tantivy"],
}
MAX_BYTES = 5000  # of a request with 100 candidates by id


def runs(page: str) -> list[object]:
    missing = [name for name in NEEDS[page] if importlib.util.find_spec(name) is None]
    skipped = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: scripts/test-engines has it")
    return [pytest.param(page, marks=skipped)]


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory. Not tmp_path: as root, PostgreSQL runs as a user whom pytest keeps out of its folders."""
    with tempfile.TemporaryDirectory(prefix="preread-") as made:
        monkeypatch.chdir(made)
        yield Path(made)
        monkeypatch.undo()


@pytest.fixture
def relay(server) -> Iterator[Relay]:
    started = Relay(server.grpc_address)
    yield started
    started.close()


@pytest.mark.parametrize("page", [one for page in NEEDS for one in runs(page)])
def test_a_page_reranks_what_its_engine_finds(page, server, relay, abstracts, directory, capsys):
    (directory / "passages.jsonl").write_text("".join(json.dumps(one) + "\n" for one in abstracts))
    ports = {"127.0.0.1:50051": relay.address, "127.0.0.1:50052": server.encoder_address}
    known: dict[str, object] = {"__name__": page}
    try:
        for number, block in enumerate(blocks(page, "python"), 1):
            for shown, real in ports.items():
                block = block.replace(shown, real)
            exec(compile(block, f"{page}.md, block {number}", "exec"), known)
    finally:
        for name in ("reranker", "engine"):
            if hasattr(known.get(name), "close"):
                known[name].close()
        if page == "pgvector":
            known["postgres"].cleanup()

    (message,) = relay.messages()
    request = RerankRequest.FromString(message)
    ids = [candidate.passage_id for candidate in request.candidates]
    assert len(set(ids)) == 100
    assert set(ids) <= {one["id"] for one in abstracts}
    assert not any(candidate.text for candidate in request.candidates)

    (shown,) = blocks(page, "json")
    body = json.loads(shown) | {"query": known["query"], "passage_ids": ids}
    sent = json.dumps(body, separators=(",", ":")).encode()
    answer = httpx.post(f"{server.url}/v1/rerank", content=sent, timeout=60).json()
    assert [one["id"] for one in answer["results"]] == [one.passage_id for one in known["ranking"]]
    assert len(answer["results"]) == 10
    assert all(one.status == "hit" for one in known["ranking"])
    assert len(capsys.readouterr().out.splitlines()) == 10

    for num_bytes, over in ((len(message), "gRPC"), (len(sent), "HTTP")):
        assert num_bytes < MAX_BYTES
        says(page, f"{num_bytes:,} bytes over {over}")
