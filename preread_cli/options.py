"""Shares, sizes and durations as people write them: 1%, 8KiB, 50ms; and lists with commas. Knows no command.

Options that commands share, and the rule that every flag has an environment twin.

`--some-flag` can be set as PREREAD_SOME_FLAG; the command line wins. Nothing below reads the environment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import preread
from cache import DEFAULT_CODEC, KNOWN_CODECS

if TYPE_CHECKING:
    from preread import ClientOptions


_NUMBER = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[a-zA-Z%]*)")


class Quantity(click.ParamType[float]):
    """A number with one of some units, in the base unit."""

    def __init__(self, name: str, units: dict[str, float], example: str) -> None:
        self.name = name
        self._units = units
        self._example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = _NUMBER.fullmatch(str(value).strip())
        if match is None or match["unit"].lower() not in self._units:
            self.fail(f"{value!r}; expected {self._example}", param, ctx)
        return float(match["number"]) * self._units[match["unit"].lower()]


SHARE = Quantity("PERCENT", {"%": 0.01}, "a percentage, such as 1%")
SIZE = Quantity(
    "BYTES",
    {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "kib": 1024, "mib": 1024**2},
    "a number of bytes, such as 8KiB or 8192",
)
DURATION = Quantity("TIME", {"us": 1e-6, "ms": 1e-3, "s": 1}, "a time with its unit, such as 50ms or 0.5s")


class Integers(click.ParamType[tuple[int, ...]]):
    """1,2,4 -> (1, 2, 4)."""

    name = "R,R,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}; expected integers with commas between them, such as 1,4,16", param, ctx)


class Words(click.ParamType[tuple[str, ...]]):
    """`Flat SQ8 OPQ48,PQ48` -> those three: a FAISS factory string may hold commas, so blanks separate."""

    name = "CODEC ..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(value.split())


F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_STORE = "faiss:./preread-data"
DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_ENCODER_ADDRESS = "127.0.0.1:50052"
# Of commands that look at a store: a slow one does not pass for a broken one, a hanging one keeps no person waiting.
ADMIN_READ_SECONDS = 5.0
SHIPPED_MODEL = Path(preread.__file__).parent / "models" / "preread-mini"


def environment_name(*flags: str) -> str:
    """`--some-flag/--no-some-flag` -> PREREAD_SOME_FLAG: the first long form names the twin."""
    long = next(flag for flag in flags if flag.startswith("--"))
    return "PREREAD_" + long.split("/")[0].strip().removeprefix("--").replace("-", "_").upper()


def option(*flags: str, **settings: Any) -> Callable[[F], F]:
    """click.option with its environment twin, shown in the help beside the default."""
    settings.setdefault("envvar", environment_name(*flags))
    settings.setdefault("show_envvar", True)
    if isinstance(settings.get("type"), click.IntRange | click.FloatRange):
        settings.setdefault("metavar", "SECONDS" if environment_name(*flags).endswith("_SECONDS") else "N")
    settings.setdefault("show_default", settings.get("default") not in (None, ""))
    return click.option(*flags, **settings)


class OutputFolder(click.Path):
    """A folder to write into; made where there is none."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) == "-":
            self.fail("-: several files are written; expected a folder", param, ctx)
        return super().convert(value, param, ctx)


def store_option(function: F) -> F:
    """--store URL."""
    return option(
        "--store",
        metavar="URL",
        default=DEFAULT_STORE,
        help="Where states are kept: faiss:PATH (a directory, no server), redis://HOST:PORT/DB, rediss://..., "
        "redis+cluster://..., or memory: (gone when the process ends).",
    )(function)


def collection_option(*, required: bool = True, help: str = "The set of passages to use.") -> Callable[[F], F]:
    """-c, --collection NAME."""
    return option("-c", "--collection", metavar="NAME", required=required, help=help)


def codec_option(function: F) -> F:
    """--codec CODEC; None where it was not given."""
    return option("--codec", metavar="CODEC", help=f"{KNOWN_CODECS}.  [default: {DEFAULT_CODEC}]")(function)


def allow_clipped_option(function: F) -> F:
    """--allow-clipped."""
    return option(
        "--allow-clipped",
        is_flag=True,
        help="Store also passages that a trained codec was not trained for: over 5% of a write's numbers outside its "
        "ranges. Their scores will be wrong.",
    )(function)


def shipped_model() -> str | None:
    """Directory of the checkpoint that came with the package, if one did."""
    return str(SHIPPED_MODEL) if (SHIPPED_MODEL / "config.json").exists() else None


def _model_or_shipped(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    model = value or shipped_model()
    if model is None and not ctx.resilient_parsing:
        raise click.MissingParameter(
            "Name a T5Gemma 2 reranker: a directory or a hub id; none came with this installation.",
            ctx=ctx,
            param=param,
        )
    return model or ""


def model_option(function: F) -> F:
    """--model DIR|HUB_ID, with the shipped checkpoint as its default; always a string when the command runs."""
    return option(
        "--model",
        metavar="DIR|HUB_ID",
        callback=_model_or_shipped,
        help="Checkpoint: a directory or a Hugging Face id, such as KaLM-Embedding/KaLM-Reranker-V1-Nano. "
        "Without it, the small one that comes with preread.",
    )(function)


def compute_options(function: F) -> F:
    """--device, --dtype, --threads: where and how the model computes."""
    for decorate in (
        option(
            "--threads",
            type=click.IntRange(min=1),
            help="Processor threads. Without it, torch's choice, and no more than a container's quota pays for.",
        ),
        option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16"]),
            default="auto",
            help="Number format; auto takes bfloat16 only where the hardware multiplies it natively.",
        ),
        option("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="auto takes CUDA where there is any."),
    ):
        function = decorate(function)
    return function


def address_option(function: F) -> F:
    """--address HOST:PORT of a reranking server."""
    return option("--address", metavar="HOST:PORT", default=DEFAULT_ADDRESS, help="The server to ask.")(function)


def _key_to_show(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A server reads the same variable and may have several keys there, with scopes: its first, without them."""
    from preread_edge.keys import without_scopes

    return without_scopes(value.split()[0]) if value and value.split() else None


def tls_options(function: F) -> F:
    """--tls, --tls-ca-file, --tls-cert-file, --tls-key-file, --api-key: how a client command reaches a server."""
    for decorate in (
        option("--api-key", metavar="KEY", callback=_key_to_show, help="Shown to a server that asks for one."),
        option(
            "--tls-key-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="The key of --tls-cert-file (PEM).",
        ),
        option(
            "--tls-cert-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Show this certificate (PEM), for mutual TLS.",
        ),
        option(
            "--tls-ca-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Trust this certificate (PEM) and use TLS.",
        ),
        option("--tls", is_flag=True, help="Use TLS with the system's certificates."),
    ):
        function = decorate(function)
    return function


def client_options(given: Mapping[str, Any], **settings: Any) -> ClientOptions:
    """What `tls_options` were given, and other settings of ClientOptions.

    Raises:
        ValueError: a certificate without its key, or the reverse.
    """
    from preread import ClientOptions, TlsFiles

    files = [given[f"tls_{name}_file"] for name in ("ca", "cert", "key")]
    tls = TlsFiles(*files) if given["tls"] or any(files) else None
    return ClientOptions(tls=tls, api_key=given["api_key"], **settings)


def control_tokens_option(function: F) -> F:
    """--read-control-tokens, of every command that opens an fbnl checkpoint."""
    return option(
        "--read-control-tokens",
        is_flag=True,
        help="Read <end_of_turn> and the like in queries and passages as control tokens, as KaLM's own code does: a "
        "text can then write the prompt. For comparing with it; part of the encoder's fingerprint.",
    )(function)


def json_option(function: F) -> F:
    """--json: one JSON document on standard output instead of a table."""
    return option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(function)
