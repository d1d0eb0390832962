"""`preread collection show | remove` over a faiss and a Redis store, and ids in files; damage is real damage."""

from __future__ import annotations

import gzip
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cache.collection import Collection, StoredPassage
from cache.manifest import Manifest
from cache.open import open_store
from cache.states import PassageStates, text_digest
from preread_cli.main import cli
from tests.redis_fixture import RedisServer

ROOT = Path(__file__).parents[2]
DIM, RATIO, NUM_PASSAGES = 8, 4, 30


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(params=["faiss", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store with p0 to p29 in `docs`; every text is its id twice, and p1 was cut."""
    if request.param == "redis":
        server = request.getfixturevalue("redis_server")
        with server.client() as client:
            client.flushall()
        url = server.url
    else:
        url = f"faiss:{tmp_path / 'store'}"
    manifest = Manifest(
        collection="docs", fingerprint="a" * 64, checkpoint="test/encoder", dim=DIM, max_passage_tokens=1024,
        passage_template="{text}", pooling_version=1, compression_ratio=RATIO,
    )  # fmt: skip
    with closing(open_store(url)) as opened:
        passages = []
        for i in range(NUM_PASSAGES):
            text, states = f"p{i} p{i}", np.full((2, DIM), i, np.float32)
            passages.append(StoredPassage(f"p{i}", PassageStates(states, (7,), RATIO, i == 1, text_digest(text)), text))
        Collection.create(opened, manifest).put_many(passages)
    return url


def run(*arguments: str, store: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["collection", *arguments, "--store", store], input=stdin)


def stored(store: str) -> set[str]:
    with closing(open_store(store)) as opened:
        return {passage_id for passage_id, _ in opened.scan("docs")}


def flip(store: str, passage_id: str, server: RedisServer | None) -> None:
    """Changes a byte of a passage's codes behind the store's back."""
    if server is not None:
        with server.client() as client:
            (key,) = [one for one in client.scan_iter() if one.endswith(f":{passage_id}".encode())]
            value = bytearray(client.get(key))
            value[-len(passage_id) * 2 - 4] ^= 1  # before the text
            client.set(key, bytes(value))
        return
    (segment,) = Path(store.removeprefix("faiss:")).rglob("*.faiss")
    data = bytearray(segment.read_bytes())
    at = data.index(np.full(DIM, int(passage_id[1:]), np.float16).tobytes())
    data[at] ^= 1
    segment.write_bytes(data)


def test_a_passage_is_shown_as_it_is_stored(store: str) -> None:
    shown = run("show", "docs", "p1", "p2", "--json", store=store)
    assert shown.exit_code == 0
    cut, whole = json.loads(shown.stdout)
    assert cut | {"size_bytes": 0} == {
        "passage_id": "p1", "stored": True, "sound": True, "damage": None, "num_states": 2, "num_tokens": 7,
        "num_windows": 1, "compression_ratio": RATIO, "truncated": True, "codec": "SQfp16", "dim": DIM,
        "num_clipped": 0, "size_bytes": 0, "text_digest": text_digest("p1 p1").hex(), "text": "p1 p1",
    }  # fmt: skip
    assert not whole["truncated"]
    assert cut["size_bytes"] > 2 * DIM * 2
    table = run("show", "docs", "p1", store=store).stdout
    rows = [line.split(maxsplit=1) for line in table.splitlines()]
    assert rows[1:3] == [["record", "sound"], ["tokens", "7, cut at the limit"]]
    assert rows[3] == ["states", "2 of 8 values, compression ratio 4"]
    assert rows[-1] == ["text", "p1 p1"]


def test_what_is_not_stored_or_damaged_is_said_next_to_the_others(store: str, request: pytest.FixtureRequest) -> None:
    flip(store, "p3", request.getfixturevalue("redis_server") if store.startswith("redis") else None)
    shown = run("show", "docs", "p2", "p3", "nowhere", "x" * 600, "--json", store=store)
    assert shown.exit_code == 1
    sound, damaged, missing, impossible = json.loads(shown.stdout)
    assert sound["sound"]
    assert damaged == {
        "passage_id": "p3", "stored": True, "sound": False, "damage": "checksum of the states does not match"
    }  # fmt: skip
    assert not missing["stored"]
    assert not impossible["stored"]
    table = run("show", "docs", "p3", "nowhere", store=store).stdout
    rows = [line.split(maxsplit=1) for line in table.splitlines()]
    assert rows[:2] == [["passage", "p3"], ["record", "damaged: checksum of the states does not match"]]
    assert rows[-2:] == [["passage", "nowhere"], ["record", "not stored"]]
    # Damaged is stored, so it can be removed.
    assert run("remove", "docs", "p3", store=store).exit_code == 0
    assert "p3" not in stored(store)


def test_ids_are_removed_and_the_others_named(store: str) -> None:
    removed = run("remove", "docs", "p1", "p2", "p1", "nowhere", "x" * 600, store=store)
    assert removed.exit_code == 1
    assert "docs: 2 passages removed, 2 not stored" in removed.stdout
    assert ("`preread collection compact docs` frees their space" in removed.stdout) == store.startswith("faiss")
    assert "not stored: nowhere\n" in removed.stderr
    assert stored(store) == {f"p{i}" for i in range(NUM_PASSAGES)} - {"p1", "p2"}
    again = run("remove", "docs", "p0", "p1", "--json", store=store)
    assert again.exit_code == 1
    assert json.loads(again.stdout) == {"collection": "docs", "num_removed": 1, "not_stored": ["p1"]}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_ids_come_from_a_file_or_standard_input(store: str, tmp_path: Path, packed: bool) -> None:
    ids = "\n".join(f" p{i} " for i in range(20)).encode() + b"\n\n"
    file = tmp_path / "ids.txt"
    file.write_bytes(gzip.compress(ids) if packed else ids)
    assert run("remove", "docs", "--ids", str(file), store=store).exit_code == 0
    assert run("remove", "docs", "--ids", "-", store=store, stdin="p20\r\np21\r\n").exit_code == 0
    assert stored(store) == {f"p{i}" for i in range(22, NUM_PASSAGES)}


def test_no_ids_or_two_places_for_them_are_an_error_and_an_empty_file_is_none(store: str, tmp_path: Path) -> None:
    (tmp_path / "none.txt").touch()
    assert run("remove", "docs", store=store).exit_code == 2
    assert run("remove", "docs", "p1", "--ids", str(tmp_path / "none.txt"), store=store).exit_code == 2
    assert run("remove", "docs", "--ids", str(tmp_path / "absent.txt"), store=store).exit_code == 2
    assert run("remove", "nowhere", "p1", store=store).exit_code == 2
    assert run("remove", "docs", "--ids", str(tmp_path / "none.txt"), store=store).exit_code == 0
    assert len(stored(store)) == NUM_PASSAGES


@pytest.mark.parametrize("store", ["faiss"], indirect=True)
@pytest.mark.parametrize(("answer", "options", "num_left"), [("n", [], 30), ("y", [], 18), (None, ["--yes"], 18)])
def test_a_terminal_is_asked_before_many_are_removed(
    store: str, answer: str | None, options: list[str], num_left: int
) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "preread", "collection", "remove", "docs", *options, "--store", store]
    command += [f"p{i}" for i in range(12)]
    streams = {"stdin": theirs, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **streams, text=True, cwd=ROOT) as process:
        if answer is not None:
            os.write(ours, f"{answer}\n".encode())
        _, told = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert ("Remove 12 passages from docs?" in told) == (answer is not None)
    assert process.returncode == (1 if answer == "n" else 0)
    assert len(stored(store)) == num_left


def keep_copies(store: str, num: int) -> None:
    """One text under so many ids, next to the others."""
    with closing(open_store(store)) as opened:
        collection = Collection.open(opened, "docs")
        states = PassageStates(np.ones((2, DIM), np.float32), (7,), RATIO, False, text_digest("told many times"))
        collection.put_many([StoredPassage(f"copy{i}", states, "told many times") for i in range(num)])


def test_a_text_is_erased_under_every_id(store: str) -> None:
    keep_copies(store, 2500)
    deleted = run("delete", "docs", "--text", "told many times", "--text", "p3 p3", store=store)
    assert (deleted.exit_code, deleted.stdout) == (0, "docs: 2,501 passages deleted, 0 texts not stored\n")
    assert stored(store) == {f"p{i}" for i in range(NUM_PASSAGES)} - {"p3"}
    again = run("delete", "docs", "--text", "p3 p3", "--text", "p4 p4", "--json", store=store)
    assert again.exit_code == 1
    assert json.loads(again.stdout) == {
        "collection": "docs", "num_removed": 1, "not_stored": [text_digest("p3 p3").hex()]
    }  # fmt: skip
    verified = CliRunner().invoke(cli, ["verify", "-c", "docs", "--store", store])
    assert (verified.exit_code, verified.stdout) == (0, "docs: 28 passages read, 0 damaged\n")


@pytest.mark.parametrize("store", ["redis"], indirect=True)  # the index of a faiss: store cannot fall behind
def test_ids_that_lead_nowhere_hide_no_passage(store: str, redis_server: RedisServer) -> None:
    """A text's set may name passages that are gone: here a thousand of them, before the one that is there."""
    keep_copies(store, 1)
    with redis_server.client() as client:
        (key,) = client.keys(f"preread:t:docs:{text_digest('told many times').hex()[:32]}")
        client.zadd(key, {f"a{i}": 0 for i in range(1500)})
    assert run("delete", "docs", "--text", "told many times", store=store).exit_code == 0
    assert "copy0" not in stored(store)


@pytest.mark.parametrize("store", ["faiss"], indirect=True)
def test_nothing_of_an_erased_text_stays_on_disk(store: str, tmp_path: Path) -> None:
    text, states = "a secret: 4711", np.full((2, DIM), 1234, np.float32)
    with closing(open_store(store)) as opened:
        one = StoredPassage("s1", PassageStates(states, (7,), RATIO, False, text_digest(text)), text)
        Collection.open(opened, "docs").put_many([one])

    def traces() -> list[bool]:
        found = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
        return [what in found for what in (text.encode(), text_digest(text), states.astype(np.float16).tobytes())]

    assert traces() == [True, True, True]
    assert run("delete", "docs", "--text", text, store=store).exit_code == 0
    assert traces() == [False, False, False]


def test_texts_come_from_a_file_or_standard_input(store: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("p1 p1\np2 p2\n\n")
    (tmp_path / "rows.jsonl").write_text('"p3 p3"\n{"text": "p4", "title": "p4"}\n{"text": "p5 p5", "id": 7}\n')
    assert run("delete", "docs", "--texts", str(tmp_path / "lines.txt"), store=store).exit_code == 0
    assert run("delete", "docs", "--texts", str(tmp_path / "rows.jsonl"), store=store).exit_code == 0
    assert run("delete", "docs", "--texts", "-", store=store, stdin="p6 p6\n").exit_code == 0
    assert stored(store) == {"p0", *(f"p{i}" for i in range(7, NUM_PASSAGES))}
    (tmp_path / "wrong.jsonl").write_text('"p7 p7"\n[1]\n')
    wrong = run("delete", "docs", "--texts", str(tmp_path / "wrong.jsonl"), store=store)
    assert wrong.exit_code == 2
    assert "wrong.jsonl:2: '[1]'; expected a JSON string" in wrong.stderr
    assert run("delete", "docs", store=store).exit_code == 2
    assert run("delete", "docs", "--text", "x", "--texts", "-", store=store).exit_code == 2
    assert "p7" in stored(store)


def test_a_damaged_passage_goes_with_its_text(store: str, request: pytest.FixtureRequest) -> None:
    flip(store, "p3", request.getfixturevalue("redis_server") if store.startswith("redis") else None)
    assert run("delete", "docs", "--text", "p3 p3", store=store).exit_code == 0
    assert "p3" not in stored(store)
