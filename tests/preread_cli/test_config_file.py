"""Laws of settings: flag over environment over file over default; the unknown is an error; secrets stay hidden."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from preread_cli.config_file import commands, effective_lines, masked
from preread_cli.main import cli

COMMANDS = dict(commands(cli, click.Context(cli)))
serve = COMMANDS["serve"]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What `preread serve` would start with: parsed parameters and the lines it prints."""

    def parse(toml: str, *flags: str, **environment: str):
        file = tmp_path / "preread.toml"
        file.write_text(toml)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        parent = cli.make_context("preread", ["--debug", "serve"])
        arguments = ["--config", str(file), *flags]
        context = serve.make_context("serve", arguments, parent=parent)
        return context.params, "\n".join(effective_lines(context))

    return parse


def test_flag_over_environment_over_file_over_default(settings) -> None:
    toml = 'model = "m"\nmax-candidates = 5\nmax-queue-requests = 6\nlog-level = "error"\nport = 7'
    found, lines = settings(toml, "--max-candidates", "9", PREREAD_MAX_CANDIDATES="8", PREREAD_MAX_QUEUE_REQUESTS="8")
    assert (found["max_candidates"], found["max_queue_requests"], found["log_level"]) == (9, 8, "error")
    assert found["host"] == "127.0.0.1"
    shown = dict(line.split(maxsplit=1) for line in lines.splitlines())
    assert "max-candidates=9" in shown["flags"]
    assert "max-queue-requests=8" in shown["environment"]
    assert "log-level=error" in shown["file"]
    assert "host=127.0.0.1" in shown["defaults"]


def test_defaults_are_listed_for_debugging_only(tmp_path: Path) -> None:
    above = click.Context(cli, info_name="preread")
    context = serve.make_context("serve", ["--model", "m", "--port", "7"], parent=above)
    assert list(effective_lines(context)) == ["flags        model=m port=7"]


def test_a_value_at_the_top_may_suit_one_command_only(tmp_path: Path) -> None:
    """Several models are a server's: no other command takes one of them in silence, one without models runs."""
    file = tmp_path / "preread.toml"
    file.write_text(f'model = ["a", "b"]\nstore = "faiss:{tmp_path}"')
    above = click.Context(cli, info_name="preread")
    assert serve.make_context("serve", ["--config", str(file)], parent=above).params["models"] == ("a", "b")
    assert CliRunner().invoke(cli, ["stats", "--config", str(file)]).exit_code == 0
    answer = CliRunner().invoke(cli, ["evaluate", "--config", str(file)])
    assert "model is a list; expected str" in " ".join(answer.output.split())


def test_a_table_is_for_one_command_and_wins(settings) -> None:
    found, _ = settings('model = "m"\nport = 1\n[serve]\nport = 2\n[encode-worker]\nport = 3')
    assert found["port"] == 2


def test_lists_and_switches(settings) -> None:
    found, lines = settings('model = "m"\nno-encoder = true\napi-key = ["rerank:0123456789abcdef", "fedcba9876543210"]')
    assert found["no_encoder"] is True
    assert found["api_key"] == ("rerank:0123456789abcdef", "fedcba9876543210")
    assert "0123456789abcdef" not in lines
    assert "api-key=***" in lines


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("max-candidate = 5", "did you mean max-candidates?"),
        ("[serve]\nmax-unacknowledged-passages = 5", "serve.max-unacknowledged-passages is not a setting"),
        ("[rerank]\nport = 5", "rerank.port is not a setting"),
        ("[rerunk]\nport = 5", "[rerunk] is no table of a command; did you mean rerank?"),
        ("[collection.drop]\nyes = true", '[collection] is no table of a command; did you mean ["collection drop"]?'),
        ('["collection drop"]\nyess = true', "collection drop.yess is not a setting; did you mean yes?"),
        ('store = "x"\n[stats]\nstore = 5', "stats.store is a int; expected str"),
        ('port = "5"', "port is a str; expected int"),
        ("port = true", "port is a bool; expected int"),
        ("no-encoder = 1", "no-encoder is a int; expected bool"),
        ("api-key = 5", "api-key is a int; expected list or str"),
        ("config = 'x'", "config is not a setting"),
        ("port = ", "Invalid value"),
        ("port = 99999", "port"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, toml: str, message: str) -> None:
    file = tmp_path / "preread.toml"
    file.write_text(toml)
    answer = CliRunner().invoke(cli, ["serve", "--model", "m", "--config", str(file)])
    assert answer.exit_code == 2
    assert message in " ".join(answer.output.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_file_and_every_flag_in_it(name: str, tmp_path: Path) -> None:
    command, lines = COMMANDS[name], []
    assert "PREREAD_CONFIG" in {option.envvar for option in command.params if isinstance(option, click.Option)}
    for option in command.params:
        if isinstance(option, click.Option) and option.name != "config":
            flag = next(one for one in option.opts if one.startswith("--")).removeprefix("--")
            number = isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
            value = "true" if option.is_flag else '["x"]' if option.multiple else "1" if number else '"x"'
            lines.append((option.name, f"{flag} = {value}"))
    (tmp_path / "preread.toml").write_text("\n".join(line for _, line in lines))
    above = click.Context(cli, info_name="preread")
    *groups, own = name.split()
    for one in groups:
        above = click.Context(click.Group(one), info_name=one, parent=above)
    context = click.Context(command, info_name=own, parent=above)
    with suppress(click.UsageError):  # every key is one, and then the values are read
        command.parse_args(context, ["--config", str(tmp_path / "preread.toml")])
    assert context.default_map is not None
    assert set(context.default_map) == {name for name, _ in lines}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:6379/0", "redis://***@host:6379/0"),
        ("rediss://host/0?password=secret&x=1", "rediss://host/0?***"),
        ("faiss:./data", "faiss:./data"),
    ],
)
def test_a_password_in_a_url_is_masked(url: str, shown: str) -> None:
    assert masked(url, "store") == shown


@pytest.mark.parametrize("arguments", [["stats"], [], ["stats", "--stor"], ["collection", "drop", "docs", "x"]])
def test_a_password_in_the_wrong_place_is_not_quoted(arguments: list[str]) -> None:
    answer = CliRunner().invoke(cli, [*arguments, "redis://user:s3cr@3t/x@host:6379/0"])
    assert answer.exit_code == 2
    assert "s3cr" not in answer.output
    assert "3t/x" not in answer.output
