"""What commands print on real terminals of 40, 80 and 120 columns: no line is too long, and no number is cut."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.cells import cell_len

import preread_cli.terminal as terminal_module
from preread_cli.main import cli
from preread_cli.terminal import ProgressDisplay, progress_bar
from preread_edge.tables import LINE, NUMBER, TEXT, WHOLE, Column, Table, print_parts

PASSAGES = {
    f"p{i}": f"Passage number {i} speaks of {word}, and of the 1,024 things next to it. " * (1 + i % 3)
    for i, word in enumerate(["sky", "sea", "grass", "밤하늘과 별", "a-word-that-no-column-of-a-narrow-terminal-holds"])
}
COLLECTION = "a-collection-with-a-rather-long-name.v2"
WIDTHS = (40, 80, 120)
# Measured by every run: durations, speeds, memory that is free.
CHANGES = re.compile(r"[\d.,]+ (ms|s|min|h|GiB|tokens/s|passages/s)\b|\b(p50|p99) ms\b")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")

Show = Callable[..., str]


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Show:
    """Calls something whose standard streams are a terminal of so many columns; what appears on it."""

    def show(width: int, call: Callable[[], object]) -> str:
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        said = bytearray()

        def read() -> None:
            while True:
                try:
                    said.extend(os.read(leader, 65536))
                except OSError:  # the other end is closed
                    return

        reader = threading.Thread(target=read)
        reader.start()
        with os.fdopen(follower, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm-256color")
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            call()
        reader.join()
        os.close(leader)
        return ESCAPES.sub("", said.decode())

    return show


@pytest.fixture
def fits(on_terminal: Show) -> Callable[..., dict[int, str]]:
    """Runs a command into a pipe and on each terminal, and compares; what it printed by width."""

    def run(*arguments: object) -> dict[int, str]:
        given = list(map(str, arguments))
        piped = CliRunner().invoke(cli, given)
        assert piped.exit_code < 2, piped.output
        shown = {}
        for width in WIDTHS:
            said = on_terminal(width, lambda: _called(given, piped.exit_code))
            too_long = [line for line in re.split(r"[\r\n]+", said) if cell_len(line) > width]
            assert not too_long, said
            assert numbers(piped.stdout) <= numbers(said), (width, numbers(piped.stdout) - numbers(said), said)
            shown[width] = said
        assert "…" not in piped.stdout
        return shown

    return run


def _called(arguments: list[str], code: int) -> None:
    ended = cli.main(arguments, "preread", standalone_mode=False)
    assert (ended or 0) == code


def numbers(text: str) -> set[str]:
    """Words with a digit in them, without what is next to a number; paths and hashes may be broken."""
    words = {word.strip("()[]{},;:'\"") for word in CHANGES.sub("", text).split()}
    return {word for word in words if re.search(r"\d", word) and "/" not in word and len(word) <= 24}


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beir")
    files = {
        "corpus.jsonl": [{"_id": one, "text": text} for one, text in PASSAGES.items()],
        "queries.jsonl": [{"_id": f"q{i}", "text": f"passage number {i} of things"} for i in range(4)],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\tp{i}\t1\n" for i in range(4)))
    return folder


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Path, beir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"faiss:{tmp_path_factory.mktemp('shown') / 'store'}"
    given = ["index", beir / "corpus.jsonl", "-c", COLLECTION, "--store", url, "--model", tiny_checkpoint]
    answer = CliRunner().invoke(cli, [*map(str, given), "--alias", "live"])
    assert answer.exit_code == 0, answer.output
    return url


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty, without a digit in them."""
    words = ["sky", "sea", "grass", "night", "sun", "moon", "iron", "rust", "bread", "yeast"]
    rows = [{"query": f"what is {one}", "passage": f"of {one} and {other}"} for one in words for other in words[:2]]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_store_is_shown_on_every_terminal(fits, store: str, tiny_checkpoint: Path, beir: Path) -> None:
    shown = fits("stats", "--store", store)
    assert "collection  a-collection-with-a-rather-" in shown[40]
    fits("verify", "--collection", COLLECTION, "--store", store)
    fits("checkpoint", tiny_checkpoint)
    fits("doctor", "--store", store, "--model", tiny_checkpoint)
    for more in (["--dry-run"], ["--force"], []):
        fits("index", beir / "corpus.jsonl", "-c", COLLECTION, "--store", store, "--model", tiny_checkpoint, *more)


def test_an_evaluation_and_a_sweep_are_shown_on_every_terminal(fits, beir: Path, tiny_checkpoint, tmp_path) -> None:
    model = ("--model", tiny_checkpoint, "--device", "cpu", "--dtype", "float32")
    shown = fits("evaluate", beir, *model)
    assert "Reranking 4 queries with " in shown[120]
    grid = ("--stored-ratios", "1,2", "--codecs", "Flat SQ8", "--read-ratios", "1,2,8", "--cascades", "8:3,2")
    shown = fits("tune", beir, *model, *grid, "--all", "--timed-queries", 0, "--out", tmp_path / "out")
    assert "are kept from an earlier run" in " ".join(shown[120].split())
    assert shown[40].count("against r = 1") > 14  # a block for each row
    assert len(re.findall("stored +codec +read", shown[80])) == 2  # in two tables


def test_a_check_is_shown_on_every_terminal(fits, tiny_checkpoint: Path, pairs: Path) -> None:
    shown = fits("check", tiny_checkpoint, "--pairs", pairs)
    assert "farthest apart" in shown[80]  # random weights do not pass: the texts of these pairs are cut


def test_a_ranking_is_shown_on_every_terminal(fits, client, server_pair, tmp_path: Path) -> None:
    served = ("-c", COLLECTION, "--address", server_pair.address)
    fits("rerank", "what is the number of things that stand next to the sky?", *served, "--stages", "8:4,4")
    fits("warm", *served)
    (tmp_path / "queries.tsv").write_text("".join(f"q{i}\tthing {i}\n" for i in range(5)))
    fits("rerank", "--queries", tmp_path / "queries.tsv", *served, "--output", tmp_path / "out.run")


@pytest.mark.parametrize("width", WIDTHS)
def test_texts_give_way_and_numbers_do_not(on_terminal: Show, width: int) -> None:
    table = Table([Column("system", TEXT), Column("note", LINE), Column("p50 ms", NUMBER), Column("stages", WHOLE)])
    table.add("a system with a name of many words", "a note of many words " * 9, "1,234.56", "32:20,8:9,4")
    said = on_terminal(width, lambda: print_parts(table))
    assert {"1,234.56", "32:20,8:9,4"} <= set(said.split())
    assert "…" in said
    assert all(cell_len(line) <= width for line in said.splitlines())


@pytest.mark.parametrize("width", WIDTHS)
def test_a_bar_keeps_the_time_left_and_loses_the_rate_first(on_terminal: Show, width: int) -> None:
    def work() -> None:
        with progress_bar("re-encoding a-collection-with-a-long-name", "passages") as update:
            update(123_456, 5_000_000, rate=1234.5, seconds_left=4500.0)

    (line,) = {line.strip() for line in re.split(r"[\r\n]+", on_terminal(width, work)) if line.strip()}
    assert line.startswith("re-enc")
    assert line.endswith("  2%  1 h 15 min left" if width < 120 else "  2%  1,234.5/s  1 h 15 min left")
    assert ("123,456/5,000,000 passages" in line) == (width > 40)
    assert cell_len(line) <= width


def test_where_there_is_no_terminal_a_line_is_printed_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal_module, "FIRST_LINE_SECONDS", 0.0)
    with progress_bar("reading docs", "passages") as update:  # one line: the next is due in half a minute
        update(1, 4, rate=0.5, seconds_left=6.0)
        update(2, 4)
    assert capsys.readouterr().err == "reading docs: 1/4 passages, 25%, 0.5/s, 6.0 s left\n"
    monkeypatch.setattr(terminal_module, "LINE_SECONDS", 0.0)
    with ProgressDisplay() as progress:
        advance = progress.begin("score", 200, "pairs", kept=100)  # a resumed run goes on from there
        advance(50)
        advance(60)
        progress.begin("read", 7, "passages", kept=7)(0)
    first, second, third = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"score: 150/200 pairs, 75%, [\d,.]+/s, [\d.]+ s left", first)
    assert re.fullmatch(r"score: 200/200 pairs, 100%, [\d,.]+/s, in [\d.]+ s", second)
    assert third == "read: 7/7 passages, 100%, by an earlier run"


def test_every_long_command_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, store: str, beir: Path, pairs: Path, tiny_checkpoint, client, server_pair, tmp_path
) -> None:
    monkeypatch.setattr(terminal_module, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(terminal_module, "LINE_SECONDS", 0.0)
    served = ("-c", COLLECTION, "--address", server_pair.address)
    model, at = ("--model", tiny_checkpoint), ("--store", store)
    (tmp_path / "queries.tsv").write_text("q1\tone\nq2\ttwo\n")
    queries = ("--queries", tmp_path / "queries.tsv", "--output", tmp_path / "out.run")
    tuned = ("--stored-ratios", "1", "--codecs", "Flat", "--cascades", "none", "--timed-queries", 0)
    for arguments, expected in [
        (("index", beir / "corpus.jsonl", "-c", "other", *at, *model), r"other: 5 passages, 100%, .*/s"),
        (("collection", "reencode", "other", "--codec", "SQ8", *at, *model), r"re-encoding other: 5/5 passages, 100%"),
        (("verify", "-c", COLLECTION, *at), r"reading \S+: 2/5 passages, 40%, .*/s, .* left"),
        (("warm", *served), r"warming: 5/5 passages, 100%"),
        (("rerank", *queries, *served), r"reranking: 1/2 queries, 50%, .*/s, .* left"),
        (("evaluate", beir, *model), r"score: \d+/\d+ pairs, \d+%, .*/s, .* left"),
        (("tune", beir, *model, *tuned, "--out", tmp_path / "out"), r"score: \d+/\d+ pairs, \d+%, .*/s, .* left"),
        (("check", tiny_checkpoint, "--pairs", pairs), r"served, \w+: 20/20 pairs, 100%"),
    ]:
        answer = CliRunner().invoke(cli, list(map(str, arguments)))
        assert answer.exception is None or isinstance(answer.exception, SystemExit | click.exceptions.Exit)
        assert re.search(f"^{expected}", answer.stderr, re.MULTILINE), (arguments, answer.stderr)
