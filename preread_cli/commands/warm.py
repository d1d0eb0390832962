"""`preread warm`: fills a server's KV and prefix caches for some passages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from preread_cli.commands.rerank import passage_ids, query_options
from preread_cli.failures import BAD_ITEMS, CommandFailed
from preread_cli.options import client_settings, collection_option, option
from preread_cli.terminal import counted_progress, human_bytes, print_json, print_some

if TYPE_CHECKING:
    from preread import Warmed

# Passages of one call: the bar moves on after each, and requests to the server wait for none of them for long.
CHUNK = 64
MAX_SHOWN = 5
CACHE_FLAGS = {"keys": "--keys-cache-bytes", "prefixes": "--prefix-cache-bytes"}


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

    ids = passage_ids(given)
    if not ids:
        raise CommandFailed(f"{given['ids']}: no ids, nothing to warm")
    settings = client_settings(given, timeout_seconds=given["timeout_seconds"])
    options = {name: given[name] for name in ("collection", "instruction", "compression_ratio")}
    warmed: list[Warmed] = []
    with Client(given["address"], options=settings) as client, counted_progress("warming") as on_progress:
        for first in range(0, len(ids), CHUNK):
            warmed.append(client.warm(ids[first : first + CHUNK], model=given["model_name"], **options))
            on_progress(min(first + CHUNK, len(ids)), len(ids))
    total = {
        "model": warmed[-1].model,
        "num_passages": sum(one.num_passages for one in warmed),
        "num_windows": sum(one.num_windows for one in warmed),
        "tiers": [
            dataclasses.asdict(tiers[-1]) | {"num_kept": sum(tier.num_kept for tier in tiers)}
            for tiers in zip(*(one.tiers for one in warmed), strict=True)
        ],
    }
    missing = list(dict.fromkeys(passage_id for one in warmed for passage_id in one.missing_ids))
    if given["as_json"]:
        print_json(total | {"missing_ids": missing})
    else:
        _print_warmed(total)
        print_some("not stored", missing, MAX_SHOWN, err=True)
    if missing:
        ctx.exit(BAD_ITEMS)


def _print_warmed(total: Mapping[str, Any]) -> None:
    click.echo(f"{total['model']}: {total['num_passages']:,} passages read, {total['num_windows']:,} windows")
    for tier in total["tiers"]:
        flag = CACHE_FLAGS[tier["name"]]
        if not tier["max_bytes"]:
            click.echo(f"{tier['name']:<9} off ({flag} is 0)")
            continue
        use = f"{human_bytes(tier['num_bytes'])} of {human_bytes(tier['max_bytes'])} in use"
        click.echo(f"{tier['name']:<9} {tier['num_kept']:,} of {total['num_windows']:,} kept; {use}")
        if tier["num_kept"] < total["num_windows"]:
            click.echo(f"          the cache is full: a larger {flag} holds more")
