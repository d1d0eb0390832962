"""`preread warm` and Client.warm against a running server."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from preread import AsyncClient
from preread_cli.main import cli

COLLECTION = "cli-warm"
PASSAGES = {f"w{i}": f"Warm passage number {i}." for i in range(5)}


@pytest.fixture
def warm(command):
    return partial(command, "warm")


def test_a_whole_collection_is_warmed(warm) -> None:
    answer = warm("-c", COLLECTION, "--instruction", "Find what warms.")

    assert answer.exit_code == 0, answer.output
    assert "tiny-reranker: 5 passages read, 5 windows" in answer.stdout
    assert "keys      5 of 5 kept; " in answer.stdout
    assert "prefixes  5 of 5 kept; " in answer.stdout
    assert "of 256.0 MiB in use" in answer.stdout


def test_ids_from_a_file_and_json_out(warm, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("w1\nw3\nnowhere\n")
    answer = warm("-c", COLLECTION, "--ids", str(tmp_path / "ids"), "--json")

    assert answer.exit_code == 1  # one of them is not there
    said = json.loads(answer.stdout)
    assert (said["num_passages"], said["missing_ids"]) == (2, ["nowhere"])
    assert [tier["num_kept"] for tier in said["tiers"]] == [2, 2]


def test_both_clients_say_the_same(server_pair, client) -> None:
    async def ask():
        async with AsyncClient(server_pair.address) as other:
            return await other.warm(["w1", "w2"], collection=COLLECTION)

    ours, theirs = client.warm(["w1", "w2"], collection=COLLECTION), asyncio.run(ask())
    assert (ours.num_passages, ours.missing_ids) == (theirs.num_passages, theirs.missing_ids) == (2, ())
    with pytest.raises(TypeError, match="passage_ids is a str"):
        client.warm("w1", collection=COLLECTION)


def test_no_server_is_3_and_says_what_to_start() -> None:
    answer = CliRunner().invoke(cli, ["warm", "-c", "x", "--ids", "-", "--address", "127.0.0.1:1"], input="a\n")

    assert answer.exit_code == 3
    assert "is `preread serve` running there?" in answer.stderr


def test_nothing_to_warm_is_said(warm) -> None:
    answer = warm("-c", COLLECTION, "--ids", "-", stdin="\n")

    assert answer.exit_code == 2
    assert "no ids, nothing to warm" in answer.stderr


def test_a_server_that_cannot_list_passages_is_said_and_what_to_do() -> None:
    older = grpc.server(ThreadPoolExecutor(1))  # without the call, as before it was there
    address = f"127.0.0.1:{older.add_insecure_port('127.0.0.1:0')}"
    older.start()
    answer = CliRunner().invoke(cli, ["warm", "-c", "x", "--address", address])
    older.stop(0).wait()

    assert answer.exit_code == 2
    assert f"the server at {address} cannot list passages: it is older than this command" in answer.stderr
    assert "Name the passages with --ids" in answer.stderr
