"""--config FILE, settings in one TOML file, under the flags and the environment and over the defaults; and which won.

A key is a flag without its dashes. At the top it counts for every command that has it; in a table named like a command
([serve]) for that one, and wins; doctor reads [serve] too. A key that no command has is an error. Secrets are masked
wherever a setting is shown.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from preread_cli.options import FILE, option

# The commands that take --config; one file configures them all.
COMMANDS = ("serve", "encode-worker", "index", "doctor")
_MASK = "***"
_Flags = dict[str, click.Option]
_SECRETS = ("api_key", "encoder_api_key")
_USER = re.compile(r"(?<=://)\S*@")  # and password, of any URL in a text

_SOURCES = {
    ParameterSource.COMMANDLINE: "flags",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
    ParameterSource.DEFAULT: "defaults",
}


def effective_lines(ctx: click.Context) -> Iterator[str]:
    """One line for each source that gave any of a command's settings."""
    by_source: dict[str, list[str]] = {}
    for key, param in _flags(ctx.command).items():
        name = str(param.name)
        value = ctx.params.get(name)
        if value is None or value is False or value in ("", ()):
            continue
        source = _SOURCES.get(ctx.get_parameter_source(name) or ParameterSource.DEFAULT, "flags")
        by_source.setdefault(source, []).append(f"{key}={masked(value, name)}")
    for source in _SOURCES.values():
        if source in by_source:
            yield f"{source:<12} {' '.join(by_source[source])}"


def masked(value: object, name: str = "") -> str:
    """The value of an option, or any text, as it may be shown: no secrets, and no users in URLs."""
    if name in _SECRETS:
        return _MASK
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if name == "store":
        from cache.store import public_url

        return public_url(text, _MASK)
    return _USER.sub(f"{_MASK}@", text)


def _load(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and not ctx.resilient_parsing:
        group = ctx.find_root().command
        found: dict[str, click.Command | None] = {str(ctx.info_name): ctx.command}
        if isinstance(group, click.Group):
            found = {name: group.get_command(ctx, name) for name in COMMANDS}
        known = {name: _flags(command) for name, command in found.items() if command is not None}
        try:
            ctx.default_map = _settings(tomllib.loads(path.read_text(encoding="utf-8")), str(ctx.info_name), known)
        except ValueError as exc:  # not TOML, not UTF-8, or not ours
            raise click.BadParameter(f"{path}: {exc}", ctx=ctx, param=param) from exc
    return path


# Put it first: it fills in what the other options find.
config_option = option(
    "--config",
    metavar="FILE",
    type=FILE,
    is_eager=True,
    callback=_load,
    help="Settings (TOML), keys named like the flags. Flags and environment win over it.",
)


def _settings(document: Mapping[str, Any], name: str, known: Mapping[str, _Flags]) -> dict[str, Any]:
    """Parameter names and values for one command; everything else in the file is checked all the same.

    Raises:
        ValueError: a key, a table or a value that is no setting.
    """
    shared = {key: value for key, value in document.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    for table, values in tables.items():
        if table not in known:
            raise ValueError(f"[{table}] is not a command with settings; expected {', '.join(known)}")
        _check(f"{table}.", values, known[table])
    _check("", shared, {key: one for flags in known.values() for key, one in flags.items()})
    own = known.get(name, {})
    # What doctor looks at is what serve would be given.
    inherited = tables.get("serve", {}) if name == "doctor" else {}
    merged = {key: value for key, value in (shared | inherited).items() if key in own} | tables.get(name, {})
    # One string will do where there may be several.
    return {
        str(own[key].name): [value] if own[key].multiple and isinstance(value, str) else value
        for key, value in merged.items()
    }


def _flags(command: click.Command) -> _Flags:
    """By flag, without its dashes; --config itself is not among them."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    flags = {flag.removeprefix("--"): one for one in options for flag in one.opts if flag.startswith("--")}
    return {flag: one for flag, one in flags.items() if flag not in ("config", "help")}


def _check(where: str, values: Mapping[str, Any], known: _Flags) -> None:
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]}?" if close else "; keys are named like the flags, without dashes before"
            raise ValueError(f"{where}{key} is not a setting{hint}")
        kind, expected = type(value).__name__, _expected(known[key])
        if kind not in expected or (kind == "list" and not all(isinstance(one, str) for one in value)):
            # Not the value: it may be a secret in the wrong place.
            raise ValueError(f"{where}{key} is a {kind}; expected {' or '.join(expected)}")


def _expected(param: click.Option) -> tuple[str, ...]:
    if param.multiple:
        return ("list", "str") if "--model" in param.opts else ("list",)  # mostly there is one
    if param.is_flag:
        return ("bool",)
    if isinstance(param.type, click.types.IntParamType):
        return ("int",)
    return ("float", "int") if isinstance(param.type, click.types.FloatParamType) else ("str",)
