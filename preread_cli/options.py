"""Options: made from knobs, shared by commands, and the rule that every flag has an environment twin.

`--some-flag` can be set as PREREAD_SOME_FLAG; the command line wins. Nothing below reads the environment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from preread_edge.settings import Config, Knob, ServerConfig

if TYPE_CHECKING:
    from preread import ClientOptions

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=Config)

# Of commands that look at a store: a slow one does not pass for a broken one, a hanging one keeps no person waiting.
ADMIN_READ_SECONDS = 5.0
# Of commands that run for minutes: a slow store is better than one given up on.
BATCH_READ_SECONDS = 30.0
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def option(*flags: str, **settings: Any) -> Callable[[F], F]:
    """click.option with its environment twin, named by the first long flag, both shown in the help."""
    long = next(flag for flag in flags if flag.startswith("--")).split("/")[0]
    twin = "PREREAD_" + long.removeprefix("--").replace("-", "_").upper()
    if isinstance(settings.get("type"), click.IntRange | click.FloatRange):
        settings.setdefault("metavar", "SECONDS" if twin.endswith("_SECONDS") else "N")
    settings.setdefault("show_default", settings.get("default") not in (None, ""))
    return click.option(*flags, envvar=twin, show_envvar=True, **settings)


def options_of(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in this order."""
    return lambda function: reduce(lambda made, decorate: decorate(made), reversed(decorators), function)


def knob_options(
    *settings: type[Config], only: Collection[str] = (), without_default: Collection[str] = ()
) -> Callable[[F], F]:
    """An option for every knob of some dataclasses; one flag in several of them is one option.

    Args:
        only: names of fields; empty: all of them.
        without_default: flags that are None where they are not given.
    """
    found = {one.flag: one for each in settings for one in each.knobs() if not only or one.name in only}
    return options_of(*(_knob_option(one, one.flag not in without_default) for one in found.values()))


def _knob_option(one: Knob, with_default: bool) -> Callable[[F], F]:
    least = one.at_least if one.above is None else one.above
    kinds: dict[str, dict[str, Any]] = {
        "int": {"type": click.INT if one.at_least is None else click.IntRange(one.at_least, one.at_most)},
        "float": {"type": click.FloatRange(least, one.at_most, min_open=one.above is not None)},
        "bool": {"is_flag": True},
        "tuple[str, ...]": {"multiple": True},
    }
    declared = {"help": one.help} | (kinds.get(one.kind, {}) if one.parse is None else {})
    if one.shown_default:
        declared["help"] += f"  [default: {one.shown_default}]"
    if one.choices:
        declared["type"] = click.Choice(one.choices)
    if one.metavar:
        declared["metavar"] = one.metavar
    if one.is_file:
        declared["type"] = click.Path(exists=True, dir_okay=False)
    elif with_default and one.default not in ("", ()) and one.default is not False:
        declared["default"] = one.default
    return option(one.flag, **declared)


def from_options(config: type[C], options: Mapping[str, Any], **others: Any) -> C:
    """A dataclass from the options of its knobs, or where it has none from those that are named like its fields.

    Args:
        others: fields that have no option, or another value.

    Raises:
        click.UsageError: values that cannot be read, or that exclude each other.
    """
    known = {one.name: one for one in config.knobs()}
    values = dict(others)
    for field in dataclasses.fields(config):
        one = known.get(field.name, Knob(help="", name=field.name, flag=field.name))
        given = options.get(one.option_name)
        if given is None or field.name in others:
            continue
        try:
            values[field.name] = given if one.parse is None else one.parse(given)
        except ValueError as exc:
            raise click.UsageError(f"{one.flag}: {exc}") from exc
    try:
        return config(**values)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc


store_option = knob_options(ServerConfig, only=["store"])
threads_option = option(
    "--threads",
    type=click.IntRange(min=1),
    help="Processor threads. Without it, torch's choice, and no more than a container's quota pays for.",
)
collection_option = partial(option, "-c", "--collection", metavar="NAME")
json_option = option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
json_file_option = option(
    "--json-file",
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write everything to this file; - prints it instead of the table.",
)


def _key_to_show(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A server reads the same variable and may have several keys there, with scopes: its first, without them."""
    from preread_edge.access import ApiKeys

    return ApiKeys.split(value.split()[0])[1] if value and value.split() else None


client_options = options_of(
    option("--address", metavar="HOST:PORT", default="127.0.0.1:50051", help="Address of the server."),
    option("--tls", is_flag=True, help="Use TLS with the system's certificates."),
    option("--tls-ca-file", type=FILE, help="Trust this certificate (PEM) and use TLS."),
    option("--tls-cert-file", type=FILE, help="Show this certificate (PEM), for mutual TLS."),
    option("--tls-key-file", type=FILE, help="The key of --tls-cert-file (PEM)."),
    option("--api-key", metavar="KEY", callback=_key_to_show, help="Shown to a server that requires one."),
)


def client_settings(given: Mapping[str, Any], **settings: Any) -> ClientOptions:
    """The values of `client_options`, and other settings of ClientOptions.

    Raises:
        ValueError: a certificate without its key, or the reverse.
    """
    from preread import ClientOptions, TlsFiles

    files = [given[f"tls_{name}_file"] for name in ("ca", "cert", "key")]
    tls = TlsFiles(*files) if given["tls"] or any(files) else None
    return ClientOptions(tls=tls, api_key=given["api_key"], **settings)
