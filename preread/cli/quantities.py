"""Shares, sizes and durations as people write them: 1%, 8KiB, 50ms; and lists with commas. Knows no command."""

from __future__ import annotations

import re
from typing import Any

import click

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
