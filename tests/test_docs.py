"""What the documentation shows exists: commands, flags, files, links, and the Python it prints compiles."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

from checkpoint.settings import CheckpointSettings
from preread_cli.main import cli
from tests.docs.transcripts import blocks, typed

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]


def shown_commands() -> list[object]:
    """`preread …` in code blocks and in code spans."""
    return [
        pytest.param(words, id=f"{page.name}:{block.line}: {' '.join(words)[:60]}")
        for page in PAGES
        for block in blocks(page)
        for command in block.commands()
        for words in typed(command)
    ]


def parameters(command: click.Command) -> set[str]:
    return {flag for p in command.params if isinstance(p, click.Option) for flag in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize("words", shown_commands())
def test_a_shown_command_exists_with_its_flags(words: list[str]) -> None:
    words = words[1:]
    command: click.Command = cli
    while words and isinstance(command, click.Group):
        while words and words[0].startswith("-"):
            assert words[0] in parameters(command) | {"--help", "--version"}
            words = words[1:]
        if not words or words[0] == "COMMAND":
            return
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"there is no {words[0]!r}"
        command, words = found, words[1:]
    flags = {word.split("=")[0] for word in words if word.startswith("-") and word != "-"}
    assert flags <= parameters(command) | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    targets += re.findall(r"`((?:scripts|docs|examples|cache|proto|deploy)/[\w./-]*)`", text)
    for target in targets:
        assert (page.parent / target).exists() or (ROOT / target).exists(), f"{page.name} names {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_named_in_the_text_exist(page: Path) -> None:
    every: set[str] = {"--help", "--version"}
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        every |= parameters(command) | parameters(cli)
        if isinstance(command, click.Group):
            every |= {flag for one in command.commands.values() for flag in parameters(one)}
    elsewhere = {"--split", "--first-stage", "--task-instructions"}  # the latter two of preread.integrations.mteb
    named = set(re.findall(r"`(--[a-z-]+)", page.read_text())) - elsewhere
    assert named <= every


def test_the_readmes_python_compiles() -> None:
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        compile(block, "README.md", "exec")


def test_the_shown_preread_json_is_one(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "formats.md").read_text(), re.DOTALL)
    (tmp_path / "preread.json").write_text(shown)

    assert CheckpointSettings.load(tmp_path).max_passage_tokens == 1024
    assert set(json.loads(shown)) == {"format_version", *CheckpointSettings.__dataclass_fields__}
