"""Laws of `doctor` and `health`: what serving would stumble over is found before, named, and tells by the exit code."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from checkpoint.synthetic import make_checkpoint
from preread_cli.main import cli


def doctor(*arguments: object) -> tuple[Result, dict[str, str]]:
    answer = CliRunner().invoke(cli, ["doctor", "--json", *map(str, arguments)])
    return answer, {one["name"]: one["state"] for one in json.loads(answer.stdout)}


def index(tmp_path: Path, model: Path, store: str) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the sky is blue\ngrass is green\n")
    arguments = ["index", str(texts), "-c", "docs", "--model", str(model), "--store", store, "--threads", "1"]
    answer = CliRunner().invoke(cli, [*arguments, "--dtype", "float32"])
    assert answer.exit_code == 0, answer.output


def test_nothing_in_the_way(tiny_checkpoint: Path, tmp_path: Path) -> None:
    store = f"faiss:{tmp_path / 'store'}"
    index(tmp_path, tiny_checkpoint, store)
    answer, states = doctor("--model", tiny_checkpoint, "--store", store, "--threads", 1)
    assert answer.exit_code == 0, answer.output
    assert {"processor", "torch", "device", "threads", "memory", "checkpoint", "store", "collection docs"} <= set(
        states
    )
    assert {states[name] for name in ("checkpoint", "store", "collection docs", "device", "threads")} == {"ok"}


def test_a_collection_of_another_encoder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    store = f"faiss:{tmp_path / 'store'}"
    index(tmp_path, make_checkpoint(tmp_path / "other", "tiny", seed=1), store)
    answer, states = doctor("--model", tiny_checkpoint, "--store", store)
    assert answer.exit_code == 1
    assert states["collection docs"] == "fail"
    assert "index it again" in answer.stdout


def test_several_models_from_the_file_that_serves_them(tiny_checkpoint: Path, tmp_path: Path) -> None:
    store = f"faiss:{tmp_path / 'store'}"
    other = make_checkpoint(tmp_path / "other", "tiny", seed=1)
    index(tmp_path, other, store)
    (tmp_path / "reads-text").mkdir()
    (tmp_path / "reads-text" / "config.json").write_text('{"model_type": "bert"}')
    models = [str(tiny_checkpoint), f"second={other},dtype=float32", str(tmp_path / "reads-text"), "gone=/no/such"]
    (tmp_path / "preread.toml").write_text(f'store = "{store}"\n[serve]\nmodel = {json.dumps(models)}\n')
    answer, states = doctor("--config", tmp_path / "preread.toml")
    assert answer.exit_code == 1
    assert {name: states[name] for name in states if name.startswith(("model ", "collection "))} == {
        f"model {tiny_checkpoint.name}": "ok",
        "model second": "ok",
        "model reads-text": "ok",
        "model gone": "fail",
        "collection docs": "ok",
    }


def test_every_cache_of_every_model_counts_and_what_does_not_fit_is_said(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = make_checkpoint(tmp_path / "second", "tiny", seed=1)

    def memory(*arguments: object) -> tuple[str, str]:
        given = ["doctor", "--json", "--store", "memory:", "--model", tiny_checkpoint, *arguments]
        found = json.loads(CliRunner().invoke(cli, [*map(str, given)]).stdout)
        return next((one["state"], one["message"]) for one in found if one["name"] == "memory")

    sizes = ("--keys-cache-bytes", 1 << 20, "--prefix-cache-bytes", 2 << 20, "--cache-bytes", 3 << 20)
    state, message = memory(*sizes, "--model", f"second={second}")
    assert state == "ok"
    assert message.startswith("fits; ")
    for part in ("KV cache 2.0 MiB", "prefix cache 4.0 MiB", "states of texts 6.0 MiB", "read cache 3.0 MiB"):
        assert part in message
    for none_encoded in ("--no-encoder", "--encoder-address=127.0.0.1:1", "--inline-cache-bytes=0"):
        assert ("states of texts" in memory(*sizes, none_encoded)[1]) == ("address" in none_encoded)

    (tmp_path / "preread.toml").write_text("[serve]\nkeys-cache-bytes = 1000000000000000\n")
    state, message = memory("--config", tmp_path / "preread.toml")
    assert (state, message.split(";")[0]) == ("warn", "does not fit once the caches are full")
    monkeypatch.setattr("checkpoint.compute.memory_left", lambda: 1 << 20)  # of a container
    state, message = memory()
    assert (state, message.split(";")[0]) == ("fail", "does not fit, with empty caches either")
    assert "of 1.0 MiB available" in message


def test_what_is_not_there(tmp_path: Path) -> None:
    missing = ("--model", tmp_path / "none", "--store", "redis://user:secret@127.0.0.1:1/0")
    answer, states = doctor(*missing, "--encoder-address", "127.0.0.1:1", "--threads", 10_000)
    assert answer.exit_code == 1
    assert (states["checkpoint"], states["store"], states["worker"]) == ("fail", "fail", "fail")
    assert states["threads"] == "warn"
    assert "secret" not in answer.stdout


def test_it_makes_no_store(tiny_checkpoint: Path, tmp_path: Path) -> None:
    answer, _ = doctor("--model", tiny_checkpoint, "--store", f"faiss:{tmp_path / 'store'}")
    assert answer.exit_code == 0
    assert not (tmp_path / "store").exists()


def test_health_of_a_running_pair(server_pair) -> None:
    for address in (server_pair.address, server_pair.encoder_address):
        answer = CliRunner().invoke(cli, ["health", "--address", address])
        assert answer.exit_code == 0, answer.output
    with socket.create_server(("127.0.0.1", 0)) as silent:
        arguments = ["--address", f"127.0.0.1:{silent.getsockname()[1]}", "--timeout-seconds", "0.2"]
        late = CliRunner().invoke(cli, ["health", *arguments])
    assert late.exit_code == 3
    assert "did not answer within the time limit; is `preread serve` running there" in late.stderr
    both = CliRunner().invoke(cli, ["health", "--address", f"{server_pair.address}, {server_pair.encoder_address}"])
    assert (both.exit_code, both.stdout.count("is ready")) == (0, 2)
    for address in ("127.0.0.1:1", f"{server_pair.address},127.0.0.1:1"):
        assert CliRunner().invoke(cli, ["health", "--address", address]).exit_code == 3


class Web(BaseHTTPRequestHandler):
    """Any web server; standard error, where it would write, is the command's here."""

    def log_message(self, *_: object) -> None:
        pass


def test_what_is_no_server_is_said_with_what_to_try(server_pair) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        for where, seen, advice in (
            (["127.0.0.1:1"], "nothing listens there", "is `preread serve` running there?"),
            ([f"127.0.0.1:{web.server_port}"], "does not speak gRPC", "--address takes the port of gRPC"),
            ([server_pair.address, "--tls"], "does not use TLS", "leave out --tls"),
        ):
            for command in (["health"], ["rerank", "q", "-c", "docs"], ["warm", "-c", "docs"]):
                answer = CliRunner().invoke(cli, [*command, "--address", *where])
                assert answer.exit_code == 3
                assert answer.stderr.startswith(f"preread: error: the server at {where[0]} could not be reached: ")
                assert seen in answer.stderr
                assert advice in answer.stderr
                assert len(answer.stderr.splitlines()) == 1
        web.shutdown()


@pytest.mark.parametrize("name", ["server", "worker"])
def test_doctor_sees_a_running_worker(server_pair, name: str) -> None:
    address = server_pair.encoder_address if name == "worker" else server_pair.address
    answer, states = doctor(
        "--model", server_pair.checkpoint, "--store", server_pair.store, "--encoder-address", address
    )
    assert states["worker"] == ("ok" if name == "worker" else "fail"), answer.stdout


def test_a_proxy_in_the_environment(server_pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead one: what is on this machine is reached without it, a worker elsewhere is not, and doctor says why."""
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    arguments = ["--model", server_pair.checkpoint, "--store", "memory:"]
    answer, states = doctor(*arguments, "--encoder-address", server_pair.encoder_address)
    assert (states["worker"], states["proxy"]) == ("ok", "ok"), answer.output
    assert "http_proxy" in answer.output
    health = ["health", "--address", server_pair.address]
    for service in ("", "live", "encoder"):
        assert CliRunner().invoke(cli, [*health, "--service", service]).exit_code == 0
    unknown = CliRunner().invoke(cli, [*health, "--service", "unknown"])
    assert unknown.exit_code == 2
    assert "--service is 'unknown'" in unknown.output

    answer, states = doctor(*arguments, "--encoder-address", "worker.invalid:50052")
    assert (states["worker"], states["proxy"], answer.exit_code) == ("fail", "warn", 1)
    assert answer.output.count("http_proxy") == 2
    assert "secret" not in answer.output

    health = CliRunner().invoke(cli, ["health", "--address", "worker.invalid:50052"])
    assert "http_proxy is set, so it is called through that proxy" in health.output
    assert "secret" not in health.output
