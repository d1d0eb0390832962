"""`preread warm`: has a server compute ahead what queries over some passages will need. Asks it; loads no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from preread_cli.failures import BAD_ITEMS, CommandFailed
from preread_cli.options import (
    address_option,
    client_options,
    collection_option,
    json_option,
    option,
    store_option,
    tls_options,
)

if TYPE_CHECKING:
    from preread import Client, Warmed

# Passages of one call: the bar moves on after each, and requests to the server wait for none of them for long.
CHUNK = 64
MAX_SHOWN = 5
FLAGS = {"keys": "--keys-cache-bytes", "prefixes": "--prefix-cache-bytes"}


@click.command()
@collection_option(help="The collection, or alias, that holds the passages.")
@option("--ids", metavar="FILE", help="These passages: one id per line; - is standard input.  [default: all]")
@option("--instruction", metavar="TEXT", help='What to look for, instead of the model\'s own task; "" for nothing.')
@option(
    "--compression-ratio",
    type=click.IntRange(min=0),
    default=0,
    help="The ratio they will be read at; 0: the server's own default.",
)
@option("--model-name", metavar="NAME", default="", help="Which of the server's models; without it, the first.")
@option("--timeout-seconds", type=click.FloatRange(min=0, min_open=True), default=300.0, help="For one call.")
@json_option
@store_option
@address_option
@tls_options
@click.pass_context
def command(ctx: click.Context, /, **given: Any) -> None:
    """Have a server compute ahead what queries over some passages will need.

    Fills the server's tiers: each passage's keys and values, and the instruction read over it. A query over
    warmed passages, under the same instruction and at the same ratio, then costs its own tokens only. No score
    changes. What is asked for more often may push warmed passages out again.

    \b
    Examples:
      preread warm -c docs --ids most-read.txt
      preread warm -c docs --ids - --instruction "Find passages that answer the question"
    """
    from preread import Client, Unavailable

    ids = _ids(given)
    options = client_options(given, timeout_seconds=given["timeout_seconds"])
    try:
        with Client(given["address"], options=options) as client:
            answers = list(_shown(_warm(client, ids, given), len(ids)))
    except Unavailable as exc:
        raise CommandFailed(f"{exc}; is `preread serve` running there?", 3) from exc
    missing = list(dict.fromkeys(id_ for answer in answers for id_ in answer.missing_ids))
    if given["as_json"]:
        click.echo(json.dumps(_total(answers) | {"missing_ids": missing}, ensure_ascii=False, indent=2))
    else:
        _report(answers, missing)
    if missing:
        ctx.exit(BAD_ITEMS)


def _ids(given: dict[str, Any]) -> Sequence[str]:
    from preread_cli.inputs import read_ids, stored_ids

    if given["ids"] is None:
        return stored_ids(given["store"], given["collection"])
    found = [candidate.passage_id or "" for candidate in read_ids(given["ids"])]
    if not found:
        raise CommandFailed(f"{given['ids']}: no ids, nothing to warm")
    return found


def _warm(client: Client, ids: Sequence[str], given: dict[str, Any]) -> Iterator[tuple[int, Warmed]]:
    """Answers, each with how many ids it was about."""
    options = {name: given[name] for name in ("collection", "instruction", "compression_ratio")}
    for first in range(0, len(ids), CHUNK):
        chunk = ids[first : first + CHUNK]
        yield len(chunk), client.warm(chunk, model=given["model_name"], **options)


def _shown(answers: Iterator[tuple[int, Warmed]], total: int) -> Iterator[Warmed]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("warming"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)
        for num_ids, answer in answers:
            bar.advance(task, num_ids)
            yield answer


def _total(answers: Sequence[Warmed]) -> dict[str, Any]:
    last = answers[-1]
    tiers = [
        asdict(tier) | {"num_kept": sum(answer.tiers[i].num_kept for answer in answers)}
        for i, tier in enumerate(last.tiers)
    ]
    return {
        "model": last.model,
        "num_passages": sum(answer.num_passages for answer in answers),
        "num_windows": sum(answer.num_windows for answer in answers),
        "tiers": tiers,
    }


def _report(answers: Sequence[Warmed], missing: Sequence[str]) -> None:
    from preread_cli.tables import human_bytes

    total = _total(answers)
    click.echo(f"{total['model']}: {total['num_passages']:,} passages read, {total['num_windows']:,} windows")
    for tier in total["tiers"]:
        if not tier["max_bytes"]:
            click.echo(f"{tier['name']:<9} off ({FLAGS[tier['name']]} is 0)")
            continue
        use = f"{human_bytes(tier['num_bytes'])} of {human_bytes(tier['max_bytes'])} in use"
        click.echo(f"{tier['name']:<9} {tier['num_kept']:,} of {total['num_windows']:,} kept; {use}")
        if tier["num_kept"] < total["num_windows"]:
            click.echo(f"          the tier is full: a larger {FLAGS[tier['name']]} holds more")
    for passage_id in missing[:MAX_SHOWN]:
        click.echo(f"not stored: {passage_id}", err=True)
    if len(missing) > MAX_SHOWN:
        click.echo(f"not stored: {len(missing) - MAX_SHOWN:,} more", err=True)
