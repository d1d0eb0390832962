"""One settings file for all that a person runs: index, serve, rerank, stats, health, drop; by --config and its twin."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.redis_fixture import free_port

ROOT = Path(__file__).parents[2]
KEYS = ["rerank:0123456789abcdef-asks", "index:fedcba9876543210-writes"]


@pytest.fixture
def file(tiny_checkpoint: Path, pem: tuple[str, str], tmp_path: Path) -> Path:
    port = free_port()
    (tmp_path / "preread.toml").write_text(f"""
        store = "faiss:{tmp_path / "store"}"
        model = "{tiny_checkpoint}"
        collection = "docs"
        threads = 1
        dtype = "float32"
        api-key = {json.dumps(KEYS)}
        address = "127.0.0.1:{port}"
        tls-cert-file = "{pem[0]}"
        tls-key-file = "{pem[1]}"
        tls-ca-file = "{pem[0]}"
        json = true
        [index]
        compression-ratio = 2
        [serve]
        port = {port}
        encoder-port = 0
        [stats]
        collection = "live"
        ["collection drop"]
        yes = true
    """)
    return tmp_path / "preread.toml"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "preread", *map(str, arguments)]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    own = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command(*arguments), env=own, capture_output=True, text=True, check=False)


def test_one_file_is_shared_by_every_command(file: Path, tmp_path: Path) -> None:
    texts, log = tmp_path / "texts.txt", tmp_path / "log"
    texts.write_text("the sky is blue\ngrass is green\n")
    indexed = run("index", texts, "--alias", "live", "--config", file)
    assert json.loads(indexed.stdout)["num_stored"] == 2, indexed.stderr
    with log.open("wb") as output:
        process = subprocess.Popen(
            command("serve", "--config", file), stdout=output, stderr=output, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
    try:
        deadline = time.monotonic() + 120
        while "\nready" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "gRPC, TLS, API keys" in log.read_text()
        assert run("health", PREREAD_CONFIG=str(file)).returncode == 0
        reranked = run("rerank", "blue", PREREAD_CONFIG=str(file))
        assert json.loads(reranked.stdout)["summary"]["num_scored"] == 2, reranked.stderr
        wrong = run("rerank", "blue", "--api-key", "another-0123456789", PREREAD_CONFIG=str(file))
        assert wrong.returncode == 2  # the file's key was shown before, and a flag wins over it
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    said = log.read_text()
    assert "file " in said
    assert "defaults " not in said
    (row,) = json.loads(run("stats", "--config", file).stdout)
    assert (row["collection"], row["compression_ratio"]) == ("docs", 2)
    assert run("collection", "alias", "live", "--remove", "--config", file).returncode == 0
    assert run("collection", "drop", "docs", PREREAD_CONFIG=str(file)).returncode == 0
