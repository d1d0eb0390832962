"""Laws of settings: flag over environment over file over default; the unknown is an error; secrets stay hidden."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from preread_cli.commands.serve import serve
from preread_cli.config_file import effective_lines, masked
from preread_cli.main import cli


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What `preread serve` would start with: parsed parameters and the lines it prints."""

    def parse(toml: str, *flags: str, **environment: str):
        file = tmp_path / "preread.toml"
        file.write_text(toml)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        parent = click.Context(cli, info_name="preread")
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
        ("[rerank]\nport = 5", "[rerank] is not a command with settings"),
        ('port = "5"', "port is a str; expected int"),
        ("port = true", "port is a bool; expected int"),
        ("no-encoder = 1", "no-encoder is a int; expected bool"),
        ('api-key = "x"', "api-key is a str; expected list"),
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


def test_every_flag_of_a_server_can_be_in_the_file(tmp_path: Path) -> None:
    lines = []
    for option in serve.params:
        if isinstance(option, click.Option) and option.name != "config":
            flag = next(one for one in option.opts if one.startswith("--")).removeprefix("--")
            number = isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
            value = "true" if option.is_flag else '["x"]' if option.multiple else "1" if number else '"x"'
            lines.append((option.name, f"{flag} = {value}"))
    (tmp_path / "preread.toml").write_text("\n".join(line for _, line in lines))
    context = click.Context(serve, info_name="serve", parent=click.Context(cli, info_name="preread"))
    with pytest.raises(click.UsageError, match="'x'"):  # every key is one, and then the values are read
        serve.parse_args(context, ["--config", str(tmp_path / "preread.toml")])
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
