"""--config FILE, settings in one TOML file, under the flags and the environment and over the defaults; and which won.

A key is a flag without its dashes; at the top for every command that has it, in a table named like a command for that
one, where it wins. doctor reads [serve] too. A key that no command has is an error.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from preread_cli.flags import FILE, option

COMMANDS = ("serve", "encode-worker", "index", "doctor")  # that take --config; one file configures them all
_MASK = "***"
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
    by_source: dict[str, list[str]] = {source: [] for source in _SOURCES.values()}
    for key, param in _options(ctx.command).items():
        name = str(param.name)
        value = ctx.params.get(name)
        if value is not None and value is not False and value not in ("", ()):
            source = _SOURCES.get(ctx.get_parameter_source(name) or ParameterSource.DEFAULT, "flags")
            by_source[source].append(f"{key}={masked(value, name)}")
    return (f"{source:<12} {' '.join(settings)}" for source, settings in by_source.items() if settings)


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
    """Everything in the file is checked; the settings of this command become its defaults."""
    if path is None or ctx.resilient_parsing:
        return path
    name, group = str(ctx.info_name), ctx.find_root().command
    commands: dict[str, click.Command | None] = {name: ctx.command}
    if isinstance(group, click.Group):
        commands = {one: group.get_command(ctx, one) for one in COMMANDS}
    known = {one: _options(command) for one, command in commands.items() if command is not None}
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        tables = {key: value for key, value in document.items() if isinstance(value, dict)}
        shared = {key: value for key, value in document.items() if key not in tables}
        for table, values in tables.items():
            if table not in known:
                raise ValueError(f"[{table}] is not a command with settings; expected {', '.join(known)}")
            _check(f"{table}.", values, known[table])
        _check("", shared, {key: one for options in known.values() for key, one in options.items()})
    except ValueError as exc:  # not TOML, not UTF-8, or not ours
        raise click.BadParameter(f"{path}: {exc}", ctx=ctx, param=param) from exc
    own = known.get(name, {})
    if name == "doctor":  # it looks at what serve would be given
        shared |= tables.get("serve", {})
    ctx.default_map = {  # one string will do where there may be several
        str(own[key].name): [value] if own[key].multiple and isinstance(value, str) else value
        for key, value in (shared | tables.get(name, {})).items()
        if key in own
    }
    return path


_HELP = "Settings (TOML), keys named like the flags. Flags and environment win over it."
# Put it first: it fills in what the other options find.
config_option = option("--config", metavar="FILE", type=FILE, is_eager=True, callback=_load, help=_HELP)


def _options(command: click.Command) -> dict[str, click.Option]:
    """By flag, without its dashes; --config itself is not among them."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    found = {flag.removeprefix("--"): one for one in options for flag in one.opts if flag.startswith("--")}
    return {flag: one for flag, one in found.items() if flag not in ("config", "help")}


def _check(where: str, values: Mapping[str, Any], known: Mapping[str, click.Option]) -> None:
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]}?" if close else "; keys are named like the flags, without dashes before"
            raise ValueError(f"{where}{key} is not a setting{hint}")
        one, kind = known[key], type(value).__name__
        if one.multiple:
            expected = ["list", "str"] if "--model" in one.opts else ["list"]  # mostly there is one model
        elif isinstance(one.type, click.types.FloatParamType):
            expected = ["float", "int"]
        else:
            expected = ["bool" if one.is_flag else "int" if isinstance(one.type, click.types.IntParamType) else "str"]
        if kind not in expected or (kind == "list" and not all(isinstance(part, str) for part in value)):
            # Not the value: it may be a secret in the wrong place.
            raise ValueError(f"{where}{key} is a {kind}; expected {' or '.join(expected)}")
