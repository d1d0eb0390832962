"""`preread stats | verify | collection` over a store, in processes of their own; damage is real damage."""

from __future__ import annotations

import json
import os
import pty
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from cache.open import open_store
from preread_cli.main import cli

ROOT = Path(__file__).parents[2]
NUM_PASSAGES = 12


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "preread", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def indexed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an embedded store with one collection. Indexed in a process of its own, like everything
    that sets torch up: such settings are for the whole process."""
    directory = tmp_path_factory.mktemp("indexed")
    passages = directory / "passages.jsonl"
    rows = [{"id": f"p{i}", "text": f"Passage number {i}."} for i in range(NUM_PASSAGES)]
    passages.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = f"faiss:{directory / 'store'}"
    answer = run("index", str(passages), "-c", "docs", "--store", store, "--model", str(tiny_checkpoint))
    assert answer.returncode == 0, answer.stderr
    return directory / "store"


@pytest.fixture
def store(indexed: Path, tmp_path: Path) -> str:
    """A copy, to be changed."""
    shutil.copytree(indexed, tmp_path / "store")
    return f"faiss:{tmp_path / 'store'}"


def in_process(*arguments: str, store: str, stdin: str | None = None):
    return CliRunner().invoke(cli, [*arguments, "--store", store], input=stdin)


def test_stats_show_what_is_there(store: str, tiny_checkpoint: Path) -> None:
    assert in_process("collection", "alias", "live", "docs", store=store).exit_code == 0
    answer = run("stats", "--json", "--store", store)

    assert answer.returncode == 0
    (row,) = json.loads(answer.stdout)
    assert row["collection"] == "docs"
    assert row["aliases"] == ["live"]
    assert row["num_passages"] == NUM_PASSAGES
    assert row["checkpoint"] == str(tiny_checkpoint)
    assert json.loads(in_process("stats", "-c", "live", "--json", store=store).stdout) == [row]
    table = in_process("stats", store=store).stdout
    assert "docs  <- live" in table
    assert "12 (0 cut at 1,024 tokens)" in table


def test_a_collection_is_renamed_unless_it_is_written(store: str) -> None:
    with closing(open_store(store)) as opened, opened.lease("docs"):
        refused = run("collection", "rename", "docs", "docs-1", "--alias", "docs", "--store", store)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert "collection 'docs' is being written by process " in refused.stderr
    renamed = in_process("collection", "rename", "docs", "docs-1", "--alias", "docs", store=store)
    assert (renamed.exit_code, renamed.stdout) == (0, "docs is now docs-1\ndocs -> docs-1\n")
    again = in_process("collection", "rename", "docs", "docs-1", store=store)
    assert again.exit_code == 2
    assert "'docs' is an alias of 'docs-1'; expected the name of a collection" in again.stderr
    (row,) = json.loads(in_process("stats", "--json", store=store).stdout)
    assert (row["collection"], row["aliases"], row["num_passages"]) == ("docs-1", ["docs"], NUM_PASSAGES)
    assert in_process("verify", "-c", "docs", store=store).stdout == "docs-1: 12 passages read, 0 damaged\n"
    compacted = in_process("collection", "compact", "docs", store=store)
    assert (compacted.exit_code, compacted.stdout) == (0, "docs-1 is compact\n")


def test_an_empty_store_is_no_error(tmp_path: Path) -> None:
    answer = in_process("stats", store=f"faiss:{tmp_path / 'new'}")

    assert answer.exit_code == 0
    assert "holds no collection" in answer.stdout


def test_a_whole_collection_verifies(store: str) -> None:
    answer = run("verify", "-c", "docs", "--store", store)

    assert answer.returncode == 0
    assert answer.stdout == "docs: 12 passages read, 0 damaged\n"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x01
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, remove])
def test_damage_is_reported_and_ends_with_1(store: str, damage: Callable[[Path], None]) -> None:
    directory = Path(store.removeprefix("faiss:"))
    largest = max((p for p in directory.rglob("*") if p.is_file() and "sqlite" not in p.name and p.suffix != ".db"),
                  key=lambda p: p.stat().st_size)  # fmt: skip
    damage(largest)

    answer = run("verify", "-c", "docs", "--store", store)
    as_json = in_process("verify", "-c", "docs", "--json", store=store)

    assert answer.returncode == as_json.exit_code == 1
    damaged = json.loads(as_json.stdout)["damaged"]
    assert 1 <= len(damaged) <= NUM_PASSAGES
    assert f"12 passages read, {len(damaged)} damaged" in answer.stdout
    assert f"damaged: {damaged[0]['passage_id']}: {damaged[0]['reason']}" in answer.stdout


def test_damage_is_removed_when_asked(store: str) -> None:
    directory = Path(store.removeprefix("faiss:"))
    flip(max(directory.rglob("*.faiss"), key=lambda path: path.stat().st_size))

    removed = in_process("verify", "-c", "docs", "--remove-damaged", store=store)
    again = in_process("verify", "-c", "docs", store=store)

    assert removed.exit_code == 1
    assert "1 damaged, 1 removed" in removed.stdout
    assert again.stdout == "docs: 11 passages read, 0 damaged\n"
    assert again.exit_code == 0


def change(store: str, statement: str) -> None:
    with closing(
        sqlite3.connect(f"{store.removeprefix('faiss:')}/catalogue.sqlite", isolation_level=None)
    ) as catalogue:
        assert catalogue.execute(statement).rowcount == 1


def test_damage_of_the_catalogue_is_reported_and_mended(store: str) -> None:
    change(store, "UPDATE collections SET num_states = num_states + 1")
    change(store, "UPDATE passages SET passage_id = CAST('other' AS BLOB) WHERE passage_id = CAST('p3' AS BLOB)")
    answer = in_process("verify", "-c", "docs", store=store)
    assert answer.exit_code == 1
    assert "damaged: other: checksum of the header does not match" in answer.stdout
    assert "damaged: num_states of collection 'docs' is " in answer.stdout
    as_json = json.loads(in_process("verify", "-c", "docs", "--json", store=store).stdout)
    assert len(as_json["problems"]) == len(as_json["damaged"]) == 1

    mended = in_process("verify", "-c", "docs", "--remove-damaged", store=store)
    assert mended.exit_code == 1
    assert "left behind: passage 'other'" in mended.stdout
    assert "catalogue written again" in mended.stdout
    again = in_process("verify", "-c", "docs", store=store)
    assert again.stdout == "docs: 11 passages read, 0 damaged\n"


def test_what_is_left_of_a_collection_that_cannot_be_mended_is_said(store: str) -> None:
    opened = open_store(store)
    manifest = opened.read_manifest("docs")
    assert manifest is not None
    opened.write_manifest(replace(manifest, collection="faq"))
    opened.close()
    change(store, "UPDATE collections SET manifest = x'7b7d' WHERE name = 'docs'")
    mended = in_process("verify", "-c", "docs", "--remove-damaged", store=store)
    assert mended.exit_code == 1
    assert "left behind: collection 'docs': " in mended.stdout
    assert "left behind: passage 'p3': " in mended.stdout
    assert in_process("verify", "-c", "faq", store=store).stdout == "faq: 0 passages read, 0 damaged\n"


def test_a_damaged_alias_is_one_clear_error_until_it_is_mended(store: str) -> None:
    assert in_process("collection", "alias", "live", "docs", store=store).exit_code == 0
    change(store, "UPDATE aliases SET name = 'docz'")
    for command in (["verify", "-c", "docs"], ["stats"], ["collection", "alias", "live", "--remove"]):
        answer = run(*command, "--store", store)
        if command[0] != "collection":  # which removes it unread
            assert answer.returncode == 3
            assert "checksum of alias 'live' does not match" in answer.stderr
    change(store, "INSERT INTO aliases (alias, name) VALUES ('live', 'docs')")
    mended = in_process("verify", "-c", "docs", "--remove-damaged", store=store)
    assert "left behind: alias 'live'" in mended.stdout
    assert in_process("verify", "-c", "docs", store=store).stdout == "docs: 12 passages read, 0 damaged\n"


def test_an_alias_moves_in_one_step_and_guards_what_it_names(store: str) -> None:
    assert in_process("collection", "alias", "live", "docs", store=store).stdout == "live -> docs\n"

    dropped = in_process("collection", "drop", "docs", "--yes", store=store)
    assert dropped.exit_code == 2
    assert "live" in dropped.stderr

    assert in_process("collection", "alias", "live", "--remove", store=store).exit_code == 0
    assert in_process("collection", "alias", "live", "--remove", store=store).exit_code == 2
    assert in_process("collection", "alias", "live", "nowhere", store=store).exit_code == 2
    assert in_process("collection", "alias", "live", store=store).exit_code == 2


def at_a_terminal(typed: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    command = [sys.executable, "-m", "preread", *arguments]
    try:
        return subprocess.run(command, stdin=theirs, capture_output=True, text=True, cwd=ROOT, check=False)
    finally:
        os.close(ours)
        os.close(theirs)


def test_dropping_asks_first(store: str) -> None:
    refused = at_a_terminal("n\n", "collection", "drop", "docs", "--store", store)
    assert refused.returncode == 1
    assert "12 passages" in refused.stderr

    unasked = in_process("collection", "drop", "docs", store=store, stdin="y\n")
    assert unasked.exit_code == 2
    assert "--yes is needed without a terminal" in unasked.stderr

    assert at_a_terminal("y\n", "collection", "drop", "docs", "--store", store).returncode == 0
    assert json.loads(in_process("stats", "--json", store=store).stdout) == []
    assert in_process("collection", "drop", "docs", "--yes", store=store).exit_code == 2


def test_compacting_keeps_every_passage(store: str) -> None:
    assert in_process("collection", "compact", "docs", store=store).exit_code == 0
    assert "12 passages read, 0 damaged" in in_process("verify", "-c", "docs", store=store).stdout
    assert in_process("collection", "compact", "nowhere", store=store).exit_code == 2


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("nonsense", 2, "nonsense"),
        ("redis://127.0.0.1:1", 3, "127.0.0.1:1"),
        ("faiss:/proc/no/such", 2, "'docs' does not exist"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line(url: str, code: int, message: str) -> None:
    answer = run("verify", "-c", "docs", "--store", url)

    assert answer.returncode == code
    assert message in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
