"""What the runner of transcripts accepts and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.terminal import Terminal
from tests.docs.transcripts import Block, blocks, pattern, typed


@pytest.mark.parametrize(
    ("page", "seen"),
    [
        ("8 of 8 scored in 44 ms", "8 of 8 scored in 1207 ms"),
        ("ready        in 2.6 s", "ready in 12.0 s"),
        ("398 tokens/s, 2.75% padding", "1,398 tokens/s, 0.00% padding"),
        ("1  0.7818   +1.28  p1", "1  0.0018   -1.98  p1   "),
        ('{"id": ..., "object": "list"}', '{"id": "x", "object": "list"}'),
        ("created  2026-11-29T12:39:06+00:00", "created  2027-01-02T03:04:05+00:00"),
    ],
)
def test_what_varies_compares_as_any_of_its_kind(page: str, seen: str) -> None:
    assert pattern([page]).match(seen + "\n")


@pytest.mark.parametrize(
    ("page", "seen"),
    [
        ("docs: 8 read, 8 stored", "docs: 8 read, 7 stored"),  # counts do not vary
        ("1  0.7818  p1", "1  0.7818  p2"),
        ("ready", "ready\nand more"),
        ("ready in 2.6 s", "ready in a moment"),
        ("", "ready"),
    ],
)
def test_what_does_not_vary_compares_as_written(page: str, seen: str) -> None:
    assert not pattern([page] if page else []).match(seen + "\n")


def test_dots_alone_are_any_lines() -> None:
    assert pattern(["a", "...", "b"]).match("a\nb\n")
    assert pattern(["a", "...", "b"]).match("a\n1\n2\nb\n")
    assert not pattern(["a", "...", "b"]).match("a\n1\n")
    assert pattern(["a"], more=True).match("a\n1\n")


def test_commands_are_found_in_pipes_lists_and_here_documents() -> None:
    assert typed("(cat a; sleep 1) | preread index - --format csv; preread stats") == [
        ["preread", "index", "-", "--format", "csv"],
        ["preread", "stats"],
    ]
    assert typed("cat <<'END'\npreread stats\nEND") == []
    assert typed("echo preread stats # preread stats") == [["preread", "stats"]]


def test_a_page_is_cut_into_blocks_spans_and_files(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "Run `preread\nstats` or:\n\n    preread verify\n\n<!-- a.py -->\n```python\nx = 1\n```\n"
        "<!-- console\n$ true\n-->\n```console\n$ cat <<END\n> a\n> END\na\n```\n"
    )

    found = blocks(tmp_path / "page.md")

    assert {(block.language, block.file) for block in found} == {
        ("span", None), ("", None), ("python", "a.py"), ("console", None),
    }  # fmt: skip
    assert [step.command for block in found if block.language == "console" for step in block.steps()] == [
        "true",
        "cat <<END\na\nEND",
    ]
    assert [list(block.commands()) for block in found if block.language in ("span", "")] == [
        ["preread verify"],
        ["preread stats"],
    ]


def console(*lines: str) -> Block:
    return Block("console", 1, list(lines))


def test_variables_the_status_and_answers_are_a_shells(terminal: Terminal) -> None:
    terminal.run(console("$ export GREETING=hello", "$ echo $GREETING; false", "hello", "$ echo $?", "1"))
    terminal.run(
        console("$ printf 'Sure? [y/N]: '; read answer; echo \"it was $answer\"", "Sure? [y/N]: y", "it was y")
    )


def test_ctrl_c_comes_once_what_is_above_it_was_seen(terminal: Terminal) -> None:
    waiting = "$ bash -c 'trap \"echo interrupted; exit 130\" INT; echo begun; while :; do sleep 0.05; done'"
    terminal.run(console(waiting, "begun", "^C", "interrupted", "$ echo $?", "130"))


@pytest.mark.parametrize(
    "lines", [("$ echo a", "b"), ("$ echo a",), ("$ false",), ("$ preread --hlep", "..."), ("$ echo 8 read", "7 read")]
)
def test_a_page_that_is_wrong_is_told(lines: tuple[str, ...], terminal: Terminal) -> None:
    with pytest.raises(AssertionError, match="line 2"):
        terminal.run(console(*lines))


def test_a_server_runs_until_the_next_of_its_kind(terminal: Terminal) -> None:
    serve = "$ preread serve --http-port 8080 --no-encoder"
    terminal.run(console(serve, "...", "http         http://127.0.0.1:8080", "ready in 1.0 s"))
    terminal.run(
        console("$ curl -s -o seen.json localhost:8080/health", "$ preread health", "127.0.0.1:50051 is ready")
    )
    terminal.run(console(serve, "...", "ready in 1.0 s", "^C", "stopping     calls in flight have 30 s to finish"))
    terminal.run(console("$ curl -s localhost:8080/health", "$ echo $?", "7"))


def test_a_command_has_a_terminal(terminal: Terminal) -> None:
    terminal.run(console("$ test -t 0 && test -t 1 && test -t 2 && stty size", "24 120"))
    terminal.run(console("$ preread stats --json", "[]"))  # what is written as a file is, to a stream that cannot seek


def test_what_is_left_in_the_background_goes_on(terminal: Terminal) -> None:
    left = "$ (sleep 0.2; echo done > done.txt) < /dev/null > left.log 2>&1 &"
    terminal.run(console(left, "$ until cat done.txt 2> /dev/null; do sleep 0.05; done", "done"))
