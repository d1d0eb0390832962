"""Flags: made from knobs, shared by commands; `--some-flag` can be set as PREREAD_SOME_FLAG, the command line wins."""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

import preread
from preread_edge.settings import Config, Knob, ServerConfig

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=Config)

ADMIN_READ_SECONDS = 5.0  # of commands that look at a store: a slow one is not broken, a hanging one is not waited for
SHORT_RETRY_SECONDS = 1.0  # of a command that someone waits for: that no server is there should be said soon
LONG_RETRY_SECONDS = 60.0  # of one that runs for hours: it goes on over a restart of the server
BATCH_READ_SECONDS = 30.0  # of commands that run for minutes: a slow store is better than one given up on

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT = click.Path(dir_okay=False, allow_dash=True, path_type=Path)
COUNT = click.IntRange(min=1)
SECONDS = click.FloatRange(min=0, min_open=True)
PORT = click.IntRange(0, 65535)


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
    """An option for every knob of some dataclasses, or of the fields `only`; one flag in several of them is one option.

    Flags in `without_default` are None where they are not given.
    """
    found = {one.flag: one for each in settings for one in each.knobs() if not only or one.name in only}
    made = []
    for one in found.values():
        declared: dict[str, Any] = {"help": one.help}
        if one.shown_default:
            declared["help"] += f"  [default: {one.shown_default}]"
        kind, least = one.kind if one.parse is None else "text", one.at_least if one.above is None else one.above
        if one.is_file:
            declared["type"] = click.Path(exists=True, dir_okay=False)
        elif one.choices:
            declared["type"] = click.Choice(one.choices)
        elif kind == "int":
            declared["type"] = click.INT if least is None else click.IntRange(least, one.at_most)
        elif kind == "float":
            declared["type"] = click.FloatRange(least, one.at_most, min_open=one.above is not None)
        elif kind in ("bool", "tuple[str, ...]"):
            declared["is_flag" if kind == "bool" else "multiple"] = True
        if one.metavar:
            declared["metavar"] = one.metavar
        if one.flag not in without_default and one.default not in ("", ()) and one.default is not False:
            declared["default"] = one.default
        made.append(option(one.flag, **declared))
    return options_of(*made)


def from_options(config: type[C], options: Mapping[str, Any], **others: Any) -> C:
    """A dataclass from the options of its knobs, or, where a field has none, from the option of its name, or `others`.

    Raises click.UsageError: values that cannot be read, or that exclude each other.
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


no_encoder = option("--no-encoder", is_flag=True, help="Answer from stored states only.")
store = knob_options(ServerConfig, only=["store"])
threads = option("--threads", type=COUNT, help="Processor threads.  [default: torch's, within a container's quota]")
collection = partial(option, "-c", "--collection", metavar="NAME")
yes = option("--yes", is_flag=True, help="Do not ask.")  # terminal.confirm does
# Of every command that prints a result.
as_json = option("--json", "as_json", is_flag=True, help="Print one JSON document instead, and nothing else.")
json_file = option("--json-file", type=OUTPUT, help="Write everything to this file too, as JSON.")
pairs = option("--pairs", type=FILE, help="JSON lines: query, passage, maybe instruction.  [default: 100 built in]")
client = options_of(
    option(
        "--address",
        metavar="HOST:PORT,...",
        default="127.0.0.1:50051",
        help="Address of the server, or of several equal ones with commas.",
    ),
    option("--tls", is_flag=True, help="Use TLS with the system's certificates."),
    option("--tls-ca-file", type=FILE, help="Trust this certificate (PEM) and use TLS."),
    option("--tls-cert-file", type=FILE, help="Show this certificate (PEM), for mutual TLS."),
    option("--tls-key-file", type=FILE, help="The key of --tls-cert-file (PEM)."),
    option("--api-key", metavar="KEY", help="Shown to a server that requires one."),
)

query = options_of(
    option("--instruction", metavar="TEXT", help='Task instruction, instead of the model\'s own; "" for none.'),
    option(
        "--compression-ratio",
        type=click.IntRange(min=0),
        default=0,
        help="Score at exactly this ratio, a multiple of the stored one; 0: at the server's own default.",
    ),
    option("--model-name", metavar="NAME", default="", help="Model to use, of those served.  [default: the first]"),
    option("--timeout-seconds", type=SECONDS, default=300.0, help="Time limit of one request."),
    as_json,
    client,
)


def typed(ctx: click.Context) -> set[str]:
    """Parameters on the command line itself; those of the environment or a file may be meant for other commands."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def addresses(given: Mapping[str, Any]) -> str | list[str]:
    """The one of --address, or those in it."""
    found = [one.strip() for one in given["address"].split(",")]
    return found[0] if len(found) == 1 else found


def client_settings(
    given: Mapping[str, Any], retry_seconds: float = SHORT_RETRY_SECONDS
) -> "preread.ClientOptions":  # evaluated, it would load gRPC
    """Of `client` and --timeout-seconds. Raises ValueError: a certificate without its key, or the reverse."""
    # Before gRPC is loaded, which would write its own lines about a failed handshake next to the error's.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from preread_edge.access import ApiKeys

    files = [given[f"tls_{name}_file"] for name in ("ca", "cert", "key")]
    tls = preread.TlsFiles(*files) if given["tls"] or any(files) else None
    keys = (given["api_key"] or "").split()  # a server reads the same variable, and may have several with scopes there
    api_key = ApiKeys.split(keys[0])[1] if keys else None
    retry = preread.RetryPolicy(budget_seconds=retry_seconds)
    return preread.ClientOptions(tls=tls, api_key=api_key, timeout_seconds=given["timeout_seconds"], retry=retry)
