"""`preread serve`'s options of what is read when a request does not say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from preread.cli.options import option

F = TypeVar("F", bound=Callable[..., Any])

STAGES_METAVAR = "RATIO:KEEP,..."


def reading_options(function: F) -> F:
    """--read-ratio, --stages, --degrade, --degrade-queue-share."""
    for decorate in (
        option(
            "--degrade-queue-share",
            type=click.FloatRange(0, 1),
            default=0.5,
            metavar="SHARE",
            help="With --degrade: how full the queue may be, of what it may hold, before requests are read coarser.",
        ),
        option(
            "--degrade",
            is_flag=True,
            help="Read a request coarser than asked when it would miss its deadline, or the queue fills; its answer "
            "says so, and preread_degraded_requests_total counts it.",
        ),
        option(
            "--stages",
            metavar=STAGES_METAVAR,
            help="A cascade for requests that name no ratio: 32:100,4:20,1 reads every candidate at ratio 32, the "
            "best 100 at 4, the best 20 of those at 1.",
        ),
        option(
            "--read-ratio",
            type=click.IntRange(min=1),
            help="Ratio to read at when a request names none; where a collection is stored coarser, its next multiple. "
            " [default: as stored]",
        ),
    ):
        function = decorate(function)
    return function


def reading(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of DecoderConfig.

    Raises:
        click.UsageError: both are given, or stages cannot be read.
    """
    from preread.client.stages import parse_stages

    if options["stages"] and options["read_ratio"] is not None:
        raise click.UsageError("--stages and --read-ratio contradict each other: give one of them.")
    try:
        stages = parse_stages(options["stages"]) if options["stages"] else ()
    except ValueError as exc:
        raise click.UsageError(f"--stages: {exc}") from exc
    same = ("read_ratio", "degrade", "degrade_queue_share")
    return {"stages": stages} | {name: options[name] for name in same}
