"""`preread serve`'s options of what is kept in memory between requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from preread.cli.options import option

if TYPE_CHECKING:
    from decoder_server.tiers.budgets import TierBudgets

F = TypeVar("F", bound=Callable[..., Any])

MIB = 1 << 20


def tiers_options(function: F) -> F:
    """--cache-bytes, --keys-cache-bytes, --prefix-cache-bytes, --cache-format."""
    for decorate in (
        option(
            "--cache-format",
            type=click.Choice(["auto", "bfloat16", "int8"]),
            default="auto",
            help="How --keys-cache-bytes and --prefix-cache-bytes hold numbers; auto: as computed. int8 holds nearly "
            "twice as much as bfloat16 and moves scores a little.",
        ),
        option(
            "--prefix-cache-bytes",
            type=click.IntRange(min=0),
            default=256 * MIB,
            help="Memory for instructions already read over passages, per model: a query under the same instruction "
            "goes on from there; 0: none is kept.",
        ),
        option(
            "--keys-cache-bytes",
            type=click.IntRange(min=0),
            default=256 * MIB,
            help="Memory for what the model computes of passages before it reads a prompt, per model; 0: none is kept.",
        ),
        option(
            "--cache-bytes",
            type=click.IntRange(min=0),
            default=256 * MIB,
            help="Memory for stored states read before, and as much for states of inline texts.",
        ),
    ):
        function = decorate(function)
    return function


def budgets(options: Mapping[str, Any]) -> TierBudgets:
    """Of every model."""
    from decoder_server.tiers.budgets import TierBudgets

    return TierBudgets(options["keys_cache_bytes"], options["prefix_cache_bytes"], options["cache_format"])
