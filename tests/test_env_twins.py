"""Every flag of every command can be set in the environment, under its own name with PREREAD_ before it."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from preread_cli import flags
from preread_cli.main import COMMANDS, cli


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
    flag = next(one for one in option.opts if one.startswith("--"))
    assert option.envvar == "PREREAD_" + flag.removeprefix("--").replace("-", "_").upper()


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
    assert first_lines == {name: text for section in COMMANDS.values() for name, (_, text) in section.items()}


# A variable is named by its flag, whichever command has it, and sets it for all of them. Where commands explain the
# flag in different words, here is why one value is right for each.
SHARED = {
    "the same limit or place, in each command's words": {
        "CODEC", "COLLECTION", "COMPRESSION_RATIO", "IDS", "INSTRUCTION", "MAX_BATCH_TOKENS", "MAX_LINE_BYTES",
        "MAX_QUEUE_TOKENS", "QUERIES", "RUN", "SEED", "SPLIT", "STAGES", "TIMEOUT_SECONDS",
    },
    "the name that readers use, pointed at a collection": {"ALIAS"},
    "a server may have several models, with spaces between them; the others read one": {"MODEL"},
    "a server's keys; a client shows the first of them": {"API_KEY"},
    "a server's certificate; a client shows it for mutual TLS, and needs TLS_CA_FILE to trust the server's": {
        "TLS_CERT_FILE",
    },
}  # fmt: skip


def test_a_variable_that_commands_explain_differently_is_meant_to_be_shared() -> None:
    said: dict[str, set[object]] = {}
    for _, command in EVERY:
        for one in command.params:
            if isinstance(one, click.Option) and one.envvar:
                said.setdefault(str(one.envvar), set()).add((one.help, one.is_flag, one.multiple))
    different = {name.removeprefix("PREREAD_") for name, ways in said.items() if len(ways) > 1}
    assert different == set().union(*SHARED.values())


def test_no_variable_is_a_switch_here_and_a_value_there() -> None:
    switches: dict[str, set[bool]] = {}
    for _, command in EVERY:
        for one in command.params:
            if isinstance(one, click.Option) and one.envvar:
                switches.setdefault(str(one.envvar), set()).add(bool(one.is_flag))
    assert [name for name, ways in switches.items() if len(ways) > 1] == []


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("0123456789abcdef", "0123456789abcdef"),
        ("rerank,index:0123456789abcdef admin:fedcba9876543210", "0123456789abcdef"),
        ("with:colon-0123456789", "with:colon-0123456789"),
        ("", None),
    ],
)
def test_a_client_shows_the_first_key_of_a_servers_variable(
    given: str, shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREREAD_API_KEY", given)
    health = cli.get_command(click.Context(cli), "health")
    assert health is not None
    assert flags.client_settings(health.make_context("health", []).params).api_key == shown


def test_the_environment_is_read_and_the_command_line_wins(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREREAD_STORE", f"faiss:{tmp_path / 'from-environment'}")

    assert "from-environment" in CliRunner().invoke(cli, ["stats"]).output
    assert "from-flag" in CliRunner().invoke(cli, ["stats", "--store", f"faiss:{tmp_path / 'from-flag'}"]).output
