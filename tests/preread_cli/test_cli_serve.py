"""`preread serve` as an operator runs it: one file, keys, both ports, a scrape, JSON logs, SIGTERM."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from preread import Client, ClientOptions, InvalidRequest, Unauthenticated
from preread_cli.main import cli

ROOT = Path(__file__).parents[2]
KEY = "asks-0123456789abcdef"


def ask(url: str, body: object = None, key: str = "") -> tuple[int, str]:
    """Status and body of one HTTP request."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--stages", "4:20,32"], "less than 4"),
        (["--stages", "32"], ""),
        (["--stages", "32:20,4", "--read-ratio", "4"], "mutually exclusive"),
        (["--stages", "fast"], "RATIO:KEEP"),
        (["--write-through", "kept", "--lookup", "none"], "expected a lookup too"),
        (["--write-through", "kept", "--no-encoder"], "mutually exclusive"),
        (["--write-through", "kept", "--write-through-ttl-seconds", "60"], "expected 0 where the store is not Redis"),
        (["--write-through", "kept", "--write-through-share", "0"], "0<x<=1"),
    ],
)
def test_what_is_read_by_default_is_checked_before_anything_is_loaded(flags: list[str], says: str) -> None:
    answer = CliRunner().invoke(cli, ["serve", "--model", "/nowhere", "--store", "memory:", *flags])
    assert answer.exit_code != 0
    assert says in answer.stderr
    assert ("/nowhere" in answer.stderr) == (not says)  # with nothing wrong it goes on to load


def test_one_file_configures_it_all(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"rerank,index {KEY}\n")
    (tmp_path / "preread.toml").write_text(f"""
        model = "{tiny_checkpoint}"
        store = "faiss:{tmp_path / "store"}"
        threads = 1
        dtype = "float32"
        log-format = "json"
        metrics-port = 0
        api-keys-file = "{tmp_path / "keys"}"
        [serve]
        port = 0
        http-port = 0
        encoder-port = 0
        read-ratio = 8
        max-query-bytes = 20000
        max-instruction-tokens = 40
        degrade = true
    """)
    out, err = tmp_path / "out", tmp_path / "err"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PREREAD_API_KEY": "ops-secret-0123456789",
    }
    command = [sys.executable, "-m", "preread", "serve", "--config", str(tmp_path / "preread.toml")]
    with (
        out.open("wb") as output,
        err.open("wb") as errors,
        subprocess.Popen(command, stdout=output, stderr=errors, env=environment) as process,
    ):
        try:
            deadline = time.monotonic() + 120
            while "\nready" not in out.read_text():
                assert process.poll() is None, err.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            use(out.read_text())
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, err.read_text()
        finally:
            process.kill()
    lines = [json.loads(line) for line in err.read_text().splitlines()]
    assert {"rerank", "call"} <= {line["message"] for line in lines}
    assert len({line["request_id"] for line in lines if line["message"] == "rerank"}) == 5
    everything = out.read_text() + err.read_text()
    for secret in (KEY, "ops-secret", "velvet", "crimson"):
        assert secret not in everything


def use(said: str) -> None:
    """Over both ports, with and without the key, for the whole way through the encoder."""

    def where(name: str) -> str:
        found = re.search(rf"^{name}\s+(\S+)", said, re.MULTILINE)
        assert found is not None, said
        return found[1]

    assert "api-key=***" in said
    assert re.search(r"^file .* store=", said, re.MULTILINE)
    with Client(where("listening"), options=ClientOptions(api_key=KEY)) as client:
        reranking = client.rerank("velvet", ["crimson"])
        assert reranking[0].score is not None
        assert reranking.summary.compression_ratio == 8
        assert client.rerank("velvet " * 2500, ["crimson"]).summary.query_truncated
        for limit, arguments in (
            ("20000 bytes", {"query": "velvet " * 3000}),
            ("40 tokens", {"query": "velvet", "instruction": "crimson " * 41}),
        ):
            with pytest.raises(InvalidRequest, match=f"at most {limit}"):
                client.rerank(candidates=["crimson"], **arguments)
    with Client(where("listening")) as nobody, pytest.raises(Unauthenticated):
        nobody.list_models()

    body = {"query": "velvet", "documents": ["crimson"]}
    assert ask(f"{where('http')}/v1/rerank", body)[0] == 401
    assert ask(f"{where('http')}/v1/rerank", body, KEY)[0] == 200
    passages = {"passages": [{"id": "p", "text": "crimson"}]}
    status, text = ask(f"{where('http')}/v1/collections/docs/passages", passages, KEY)
    assert status == 200, text

    status, text = ask(where("metrics"))
    assert status == 200
    for line in (
        'preread_requests_total{code="ok"',
        'preread_rpcs_total{code="UNAUTHENTICATED"',
        'preread_http_answers_total{status="401"} 1.0',
        'preread_encoder_passages_total{status="stored"} 1.0',
    ):
        assert line in text, line


def test_texts_are_written_through_by_the_encoder_in_the_process(serving, tmp_path: Path) -> None:
    """The flags reach it; what it kept is found after a restart, and gone when it is erased."""
    texts, flags = ["A text that no one indexed.", "Another one of those."], ("--write-through", "kept")

    def asked(client: Client) -> list[tuple[str, str]]:
        return [(one.status, one.found_in) for one in client.rerank("q", texts).results]

    def run(*arguments: str) -> str:
        answer = CliRunner().invoke(cli, [*arguments, "--store", f"faiss:{tmp_path / 'store'}"])
        assert answer.exit_code == 0, answer.output
        return answer.stdout

    told = *flags, "--write-through-texts", "--write-through-bytes", "1000000"
    with serving(tmp_path, *told) as pair, Client(pair.address) as client:
        assert asked(client) == [("encoded", "")] * 2
        deadline = time.monotonic() + 20
        while asked(client) != [("hit", "kept")] * 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert texts[0] in run("collection", "show", "kept", hashlib.sha256(texts[0].encode()).hexdigest())
    with serving(tmp_path, *flags) as pair, Client(pair.address) as client:
        assert asked(client) == [("hit", "kept")] * 2
        done = run("collection", "delete", "kept", "--text", texts[0])
        assert done == "kept: 1 passages deleted, 0 texts not stored\n"
        time.sleep(1.5)  # longer than a server takes a store for granted
        assert sorted(asked(client)) == [("encoded", ""), ("hit", "kept")]
    assert run("verify", "-c", "kept").endswith(" 0 damaged\n")
