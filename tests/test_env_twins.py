"""Every flag of every command can be set in the environment, under its own name with PREREAD_ before it."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from preread.cli.main import COMMANDS, cli
from preread.cli.options import environment_name


def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from walk(child, (*path, name))


EVERY = list(walk(cli, ("preread",)))
FLAGS = [
    pytest.param(option, id=" ".join((*path, option.opts[-1])))
    for path, command in EVERY
    for option in command.params
    if isinstance(option, click.Option) and "--version" not in option.opts
]


@pytest.mark.parametrize("option", FLAGS)
def test_a_flag_has_its_twin(option: click.Option) -> None:
    assert option.envvar == environment_name(*option.opts)


@pytest.mark.parametrize("option", FLAGS)
def test_a_flag_is_explained_and_shows_its_twin(option: click.Option) -> None:
    assert option.help
    assert option.show_envvar


@pytest.mark.parametrize(("path", "command"), EVERY, ids=[" ".join(path) for path, _ in EVERY])
def test_a_command_is_explained(path: tuple[str, ...], command: click.Command) -> None:
    answer = CliRunner().invoke(cli, [*path[1:], "--help"])

    assert answer.exit_code == 0
    assert command.help
    assert len(command.help.splitlines()[0]) < 80


def test_the_command_list_says_what_the_commands_say() -> None:
    first_lines = {path[-1]: (command.help or "").splitlines()[0] for path, command in EVERY if len(path) == 2}
    assert first_lines == {name: text for section in COMMANDS.values() for name, text in section.items()}


def test_the_environment_is_read_and_the_command_line_wins(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREREAD_STORE", f"faiss:{tmp_path / 'from-environment'}")

    assert "from-environment" in CliRunner().invoke(cli, ["stats"]).output
    assert "from-flag" in CliRunner().invoke(cli, ["stats", "--store", f"faiss:{tmp_path / 'from-flag'}"]).output
