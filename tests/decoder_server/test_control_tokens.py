"""--read-control-tokens: the official code's reading, in the fingerprint, and never where strangers could use it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.synthetic import make_cross_encoder
from cache.collection import Collection
from cache.open import open_store
from checkpoint import Checkpoint
from decoder_server.config import DecoderConfig, HttpConfig, ModelConfig
from decoder_server.models.loading import load_model
from decoder_server.server import DecoderServer, Gateway
from encoder_worker.config import EncoderConfig
from encoder_worker.server import EncoderServer
from preread.channel import is_loopback
from preread_cli.main import cli
from preread_edge.access import ApiKeys

KEYS = ApiKeys.parse(["rerank:0123456789abcdef"])
REACHABLE = ("0.0.0.0", "::", "[::]", "", "192.168.1.5", "10.0.0.1", "rerank.example.org", "::ffff:10.0.0.1", "0")


def decoder_server(host: str, keys: ApiKeys) -> Any:
    models = (ModelConfig("anywhere", read_control_tokens=True),)
    return DecoderServer(DecoderConfig(models=models, host=host), store=open_store("memory:control-tokens"), keys=keys)


def encoder_server(host: str, keys: ApiKeys) -> Any:
    config = EncoderConfig("anywhere", host=host, read_control_tokens=True)
    return EncoderServer(config, store=open_store("memory:control-tokens"), keys=keys)


def gateway(host: str, keys: ApiKeys) -> Any:
    return Gateway(HttpConfig(host=host, port=0), decoder_server("127.0.0.1", keys))


@pytest.mark.parametrize("host", REACHABLE)
@pytest.mark.parametrize("make", [decoder_server, encoder_server, gateway])
def test_no_server_that_others_reach_reads_them_without_keys(make: Callable[[str, ApiKeys], Any], host: str) -> None:
    with pytest.raises(ValueError, match=r"read_control_tokens is on and .* is reached from other machines"):
        make(host, ApiKeys())
    make(host, KEYS)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
@pytest.mark.parametrize("make", [decoder_server, encoder_server, gateway])
def test_a_loopback_server_reads_them(make: Callable[[str, ApiKeys], Any], host: str) -> None:
    assert is_loopback(host, unspecified=False)
    make(host, ApiKeys())


def test_the_command_says_so_before_anything_is_loaded() -> None:
    command = ["serve", "--host", "0.0.0.0", "--read-control-tokens", "--no-encoder", "--store", "memory:"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 2
    assert "is reached from other machines without a key" in result.output


def test_it_is_part_of_the_fingerprint_only_when_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    off = Checkpoint.open(tiny_checkpoint).identity.fingerprint
    on = Checkpoint.open(tiny_checkpoint, neutralise=False).identity.fingerprint
    assert on != off
    told = ["checkpoint", str(tiny_checkpoint), "--json"]
    shown = [json.loads(CliRunner().invoke(cli, [*told, *more]).output) for more in ([], ["--read-control-tokens"])]
    assert [one["fingerprint"] for one in shown] == [off, on]

    passages = tmp_path / "passages.jsonl"
    passages.write_text(json.dumps({"id": "a", "text": "fine<end_of_turn>"}) + "\n")
    command = ["index", str(passages), "-c", "odd", "--store", f"faiss:{tmp_path / 'store'}"]
    result = CliRunner().invoke(cli, [*command, "--model", str(tiny_checkpoint), "--read-control-tokens"])
    assert result.exit_code == 0, result.output
    store = open_store(f"faiss:{tmp_path / 'store'}")
    try:
        assert Collection.open(store, "odd").manifest.fingerprint == on
    finally:
        store.close()
    assert CliRunner().invoke(cli, [*command, "--model", str(tiny_checkpoint)]).exit_code == 2  # another encoder's


def test_a_cross_encoder_has_no_such_setting(tmp_path: Path) -> None:
    directory = make_cross_encoder(tmp_path / "bert", "BertForSequenceClassification")
    with pytest.raises(ValueError, match="a cross-encoder, which reads control tokens in texts as plain text"):
        load_model(ModelConfig(str(directory), profile="generic", read_control_tokens=True))
