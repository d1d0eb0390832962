"""The documentation shows no command that no test has run, and nothing that is not seen."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

from preread_cli.main import cli
from tests.docs.terminal import Terminal
from tests.docs.transcripts import Block, Step, blocks, typed

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*/README.md"))]
RUN = [page for page in PAGES if any(block.language == "console" for block in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_types_shows_what_the_page_shows(page: Path, terminal: Terminal) -> None:
    if shutil.which("curl") is None and "$ curl" in page.read_text():
        pytest.skip("NO CURL: this page is not run (Debian: apt-get install curl)")
    for block in blocks(page):
        try:
            terminal.run(block)
        except AssertionError as exc:
            raise AssertionError(f"{page.relative_to(ROOT)}, {exc}") from None


def shown() -> list[Any]:
    """Every `preread …` of every page, and every curl, run or not."""
    return [
        pytest.param(block, line, id=f"{page.relative_to(ROOT)}:{block.line}: {line[:60]}")
        for page in PAGES
        for block in blocks(page)
        if block.language != "console"
        for line in block.commands()
        if line.startswith("preread ") or "127.0.0.1" in line or "localhost" in line
    ]


@pytest.fixture(scope="module")
def ran() -> list[tuple[str, frozenset[str]]]:
    """Command and flags of every `preread …` in a transcript."""
    commands = [step.command for page in RUN for block in blocks(page) for step in console(block)]
    return [flagged(words) for command in commands for words in typed(command)]


def console(block: Block) -> list[Step]:
    return block.steps() if block.language == "console" else []


def flagged(words: list[str]) -> tuple[str, frozenset[str]]:
    """The command that these words are, such as `collection drop`, and its flags by their long names."""
    command: click.Command = cli
    names: list[str] = []
    flags: set[str] = set()
    for word in words[1:]:
        found = command.get_command(click.Context(command), word) if isinstance(command, click.Group) else None
        if found is not None:
            command = found
            names.append(word)
        elif word.startswith("-") and len(word) > 1:
            (name,) = {max(one.opts, key=len) for one in command.params if word.split("=")[0] in one.opts} or {word}
            flags.add(name)
    return " ".join(names), frozenset(flags)


@pytest.mark.parametrize(("block", "line"), shown())
def test_what_a_page_does_not_run_is_part_of_what_was_run(
    block: Block, line: str, ran: list[tuple[str, frozenset[str]]]
) -> None:
    """A command in a sentence, or with names that only stand for something, has been run with these flags elsewhere."""
    assert not line.startswith(("curl", "grpcurl")), "show it in a block of the language console, and it is run"
    command, flags = flagged(shlex.split(line, comments=True))
    alike = [others for one, others in ran if command in (one, "")]  # "": `preread COMMAND --help`
    assert any(flags <= others for others in alike), "no transcript has run this with these flags"
