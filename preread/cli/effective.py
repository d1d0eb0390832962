"""The settings a server starts with, by where they came from, secrets masked. Knows no particular setting."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
from click.core import ParameterSource

MASK = "***"
_SECRETS = ("api_key", "encoder_api_key")
_USER = re.compile(r"(?<=://)\S*@")  # and password, of any URL in a text

_SOURCES = {
    ParameterSource.COMMANDLINE: "flags",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
    ParameterSource.DEFAULT: "defaults",
}


def effective_lines(ctx: click.Context) -> Iterator[str]:
    """One line for each source that gave any."""
    by_source: dict[str, list[str]] = {}
    for param in ctx.command.params:
        value = ctx.params.get(str(param.name))
        if not isinstance(param, click.Option) or value is None or value is False or value in ("", ()):
            continue
        source = _SOURCES.get(ctx.get_parameter_source(str(param.name)) or ParameterSource.DEFAULT, "flags")
        by_source.setdefault(source, []).append(f"{_flag(param)}={masked(str(param.name), value)}")
    for source in _SOURCES.values():
        if source in by_source:
            yield f"{source:<12} {' '.join(by_source[source])}"


def masked(name: str, value: object) -> str:
    """The value as it may be shown."""
    if name in _SECRETS:
        return MASK
    from cache.store import public_url

    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return public_url(text, MASK) if name == "store" else without_users(text)


def without_users(text: str) -> str:
    """A text whose URLs show neither users nor passwords."""
    return _USER.sub(f"{MASK}@", text)


def _flag(param: click.Option) -> str:
    return next(flag for flag in param.opts if flag.startswith("--")).removeprefix("--")
