"""--config FILE of every command: settings in one TOML file, under flags and environment; and which source won.

A key is a flag without its dashes; at the top for every command that has it, in a table for one command, where it wins.
A table is named as the command is typed: [serve], ["collection drop"]. Not [collection.drop]: `collection` is a key.
doctor reads [serve] too. A key or a table that no command has is an error.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from preread_cli.flags import FILE, option

_MASK = "***"
_SECRETS = ("api_key", "encoder_api_key")
_USER = re.compile(r"(?<=://)\S*@")  # and password, of any URL in a text
_SOURCES = {
    ParameterSource.COMMANDLINE: "flags",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
    ParameterSource.DEFAULT: "defaults",
}
_Known = Mapping[str, Mapping[str, click.Option]]  # command -> key -> its option


def effective_lines(ctx: click.Context) -> Iterator[str]:
    """One line for each source that gave any of a command's settings; the defaults only with --debug."""
    shown = [name for name in _SOURCES.values() if name != "defaults" or ctx.find_root().params.get("debug")]
    by_source: dict[str, list[str]] = {source: [] for source in shown}
    for key, param in _options(ctx.command).items():
        name = str(param.name)
        value = ctx.params.get(name)
        source = _SOURCES.get(ctx.get_parameter_source(name) or ParameterSource.DEFAULT, "flags")
        if value is not None and value is not False and value not in ("", ()) and source in by_source:
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


def commands(group: click.Group, ctx: click.Context, above: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command below a group, by its name as it is typed: "serve", "collection drop". Imports all of them."""
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if isinstance(command, click.Group):
            yield from commands(command, ctx, f"{above}{name} ")
        elif command is not None:
            yield above + name, command


def _load(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Everything in the file is checked; the settings of this command become its defaults."""
    if path is None or ctx.resilient_parsing:
        return path
    name, root = _name(ctx), ctx.find_root().command
    known = {name: _options(ctx.command)}
    if isinstance(root, click.Group):
        known |= {one: _options(command) for one, command in commands(root, ctx.find_root())}
    try:
        ctx.default_map = _settings(tomllib.loads(path.read_text(encoding="utf-8")), known, name)
    except ValueError as exc:  # not TOML, not UTF-8, or not ours
        raise click.BadParameter(f"{path}: {exc}", ctx=ctx, param=param) from exc
    return path


_HELP = "Settings (TOML), keys named like the flags. Flags and environment win over it."
_option = option("--config", metavar="FILE", type=FILE, is_eager=True, callback=_load, expose_value=False, help=_HELP)


def with_config(command: click.Command) -> click.Command:
    """The command with --config, or a group whose commands have it."""
    if isinstance(command, click.Group):
        for one in command.commands.values():
            with_config(one)
    elif not any(one.name == "config" for one in command.params):
        _option(command)  # which appends it
        command.params.insert(0, command.params.pop())
    return command


def _name(ctx: click.Context) -> str:
    """The command as it is typed after `preread`."""
    above = ctx.parent
    return str(ctx.info_name) if above is None or above.parent is None else f"{_name(above)} {ctx.info_name}"


def _options(command: click.Command) -> dict[str, click.Option]:
    """By flag, without its dashes; --config itself is not among them."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    found = {flag.removeprefix("--"): one for one in options for flag in one.opts if flag.startswith("--")}
    return {flag: one for flag, one in found.items() if flag not in ("config", "help")}


def _settings(document: Mapping[str, Any], known: _Known, name: str) -> dict[str, Any]:
    """Values of the command `name` by option, as click takes them. ValueError: anything in the file is wrong."""
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    shared = {key: value for key, value in document.items() if key not in tables}
    for table, values in tables.items():
        if table not in known:
            nested = " ".join([table, *(key for key, value in values.items() if isinstance(value, dict))])
            raise ValueError(f"[{table}] is no table of a command{_nearest(nested, known, '[serve]')}")
        for key, value in values.items():
            _check(f"{table}.", key, value, {key: [one] for key, one in known[table].items()})
    every: dict[str, list[click.Option]] = {}
    for options in known.values():
        for key, one in options.items():
            every.setdefault(key, []).append(one)
    for key, value in shared.items():
        _check("", key, value, every)
    own, found = known[name], shared | (tables.get("serve", {}) if name == "doctor" else {}) | tables.get(name, {})
    for key in found.keys() & own.keys():  # a value at the top may suit another command only
        _check("", key, found[key], {key: [own[key]]})
    return {str(own[key].name): _value(own[key], value) for key, value in found.items() if key in own}


def _check(where: str, key: str, value: object, known: Mapping[str, list[click.Option]]) -> None:
    """Whether a key exists, and its value is of a kind that one of its options takes."""
    if key not in known:
        raise ValueError(f"{where}{key} is not a setting{_nearest(key, known, 'store')}")
    kind, expected = type(value).__name__, list(dict.fromkeys(one for found in known[key] for one in _kinds(found)))
    if kind not in expected or (isinstance(value, list) and not all(isinstance(part, str) for part in value)):
        # Not the value: it may be a secret in the wrong place.
        raise ValueError(f"{where}{key} is a {kind}; expected {' or '.join(expected)}")


def _nearest(given: str, known: Iterable[str], example: str) -> str:
    close = difflib.get_close_matches(given, known, 1)
    if not close:
        return f"; names are those of flags and commands, such as {example}"
    return f"; did you mean {close[0]}?" if " " not in close[0] else f'; did you mean ["{close[0]}"]?'


def _kinds(one: click.Option) -> tuple[str, ...]:
    if one.multiple or one.name == "api_key":  # a server's keys; a client shows the first, as from the environment
        return ("list", "str")
    if one.is_flag:
        return ("bool",)
    if isinstance(one.type, click.types.FloatParamType):
        return ("float", "int")
    return ("int",) if isinstance(one.type, click.types.IntParamType) else ("str",)


def _value(one: click.Option, value: Any) -> Any:
    """One string where there may be several is one; several where there is one, as in the environment."""
    if isinstance(value, list) and not one.multiple:
        return " ".join(value)
    return [value] if one.multiple and isinstance(value, str) else value
