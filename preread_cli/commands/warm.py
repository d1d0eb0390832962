"""`preread warm`: fills a server's KV and prefix caches for some passages."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from preread_cli.commands.rerank import query_options, read_ids, stored_ids
from preread_cli.failures import BAD_ITEMS, CommandFailed
from preread_cli.options import client_settings, collection_option, option
from preread_cli.terminal import counted_progress, human_bytes

if TYPE_CHECKING:
    from preread import Warmed

# Passages of one call: the bar moves on after each, and requests to the server wait for none of them for long.
CHUNK = 64
MAX_SHOWN = 5
FLAGS = {"keys": "--keys-cache-bytes", "prefixes": "--prefix-cache-bytes"}


@click.command()
@collection_option(required=True, help="The collection, or alias, that holds the passages.")
@option("--ids", metavar="FILE", help="These passages: one id per line; - is standard input.  [default: all]")
@query_options
@click.pass_context
def warm(ctx: click.Context, /, **given: Any) -> None:
    """Fill a server's KV and prefix caches for some passages.

    Each passage's keys and values are computed, and the instruction read over it. A query over warmed passages,
    under the same instruction and at the same ratio, then costs its own tokens only. No score changes. Passages
    that are used more often may evict warmed ones.

    \b
    Examples:
      preread warm -c docs --ids most-read.txt
      preread warm -c docs --ids - --instruction "Find passages that answer the question"
    """
    from preread import Client

    ids = stored_ids(given["store"], given["collection"]) if given["ids"] is None else read_ids(given["ids"])
    if not ids:
        raise CommandFailed(f"{given['ids']}: no ids, nothing to warm")
    settings = client_settings(given, timeout_seconds=given["timeout_seconds"])
    options = {name: given[name] for name in ("collection", "instruction", "compression_ratio")}
    warmed: list[Warmed] = []
    with Client(given["address"], options=settings) as client, counted_progress("warming") as on_progress:
        for first in range(0, len(ids), CHUNK):
            warmed.append(client.warm(ids[first : first + CHUNK], model=given["model_name"], **options))
            on_progress(min(first + CHUNK, len(ids)), len(ids))
    missing = list(dict.fromkeys(id_ for one in warmed for id_ in one.missing_ids))
    if given["as_json"]:
        click.echo(json.dumps(_total(warmed) | {"missing_ids": missing}, ensure_ascii=False, indent=2))
    else:
        _print_total(_total(warmed), missing)
    if missing:
        ctx.exit(BAD_ITEMS)


def _total(warmed: Sequence[Warmed]) -> dict[str, Any]:
    last = warmed[-1]
    tiers = [
        dataclasses.asdict(tier) | {"num_kept": sum(one.tiers[i].num_kept for one in warmed)}
        for i, tier in enumerate(last.tiers)
    ]
    return {
        "model": last.model,
        "num_passages": sum(one.num_passages for one in warmed),
        "num_windows": sum(one.num_windows for one in warmed),
        "tiers": tiers,
    }


def _print_total(total: dict[str, Any], missing: Sequence[str]) -> None:
    click.echo(f"{total['model']}: {total['num_passages']:,} passages read, {total['num_windows']:,} windows")
    for tier in total["tiers"]:
        if not tier["max_bytes"]:
            click.echo(f"{tier['name']:<9} off ({FLAGS[tier['name']]} is 0)")
            continue
        use = f"{human_bytes(tier['num_bytes'])} of {human_bytes(tier['max_bytes'])} in use"
        click.echo(f"{tier['name']:<9} {tier['num_kept']:,} of {total['num_windows']:,} kept; {use}")
        if tier["num_kept"] < total["num_windows"]:
            click.echo(f"          the cache is full: a larger {FLAGS[tier['name']]} holds more")
    for passage_id in missing[:MAX_SHOWN]:
        click.echo(f"not stored: {passage_id}", err=True)
    if len(missing) > MAX_SHOWN:
        click.echo(f"not stored: {len(missing) - MAX_SHOWN:,} more", err=True)
