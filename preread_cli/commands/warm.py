"""`preread warm`: passages into the caches of a server."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

import preread
from preread_cli import flags
from preread_cli.failures import BAD_ITEMS, CommandFailed
from preread_cli.flags import option
from preread_cli.passages import MAX_SHOWN, passage_ids
from preread_cli.terminal import print_json, print_some, progress_bar
from preread_edge.outputs import human_bytes
from preread_edge.tables import TEXT, WHOLE, Column, Table, print_parts

CHUNK = 64  # passages of one warming call: the bar moves on after each, and no request to the server waits for it long
CACHE_FLAGS = {"keys": "--keys-cache-bytes", "prefixes": "--prefix-cache-bytes"}


@click.command()
@flags.collection(required=True, help="The collection, or alias, that holds the passages.")
@option("--ids", metavar="FILE", help="These passages: one id per line; - is standard input.  [default: all]")
@flags.query
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
    options = {name: given[name] for name in ("collection", "instruction", "compression_ratio")}
    warmed = []
    settings = flags.client_settings(given)
    with (
        preread.Client(flags.addresses(given), options=settings) as client,
        progress_bar("warming", "passages") as on_progress,
    ):
        ids = passage_ids(client, given)
        if not ids:
            raise CommandFailed(f"{given['ids']}: no ids, nothing to warm")
        for first in range(0, len(ids), CHUNK):
            warmed.append(client.warm(ids[first : first + CHUNK], model=given["model_name"], **options))
            on_progress(min(first + CHUNK, len(ids)), len(ids))
    num_windows = sum(one.num_windows for one in warmed)
    tiers = [
        dataclasses.asdict(tiers[-1]) | {"num_kept": sum(tier.num_kept for tier in tiers)}
        for tiers in zip(*(one.tiers for one in warmed), strict=True)
    ]
    total = {"model": warmed[-1].model, "num_passages": sum(one.num_passages for one in warmed)}
    total |= {"num_windows": num_windows, "tiers": tiers}
    missing = list(dict.fromkeys(passage_id for one in warmed for passage_id in one.missing_ids))
    if given["as_json"]:
        print_json(total | {"missing_ids": missing})
    else:
        table = Table([Column("", WHOLE), Column("", TEXT)])
        for tier in tiers:
            flag, num_kept, size = CACHE_FLAGS[tier["name"]], tier["num_kept"], tier["max_bytes"]
            use = f"{human_bytes(tier['num_bytes'])} of {human_bytes(size)} in use"
            kept = f"{num_kept:,} of {num_windows:,} kept; {use}"
            table.add(tier["name"], kept if size else f"off ({flag} is 0)")
            if size and num_kept < num_windows:
                table.add("", f"the cache is full: a larger {flag} holds more")
        read = f"{total['num_passages']:,} passages read, {num_windows:,} windows"
        print_parts(f"{total['model']}: {read}", table)
        print_some("not stored", missing, MAX_SHOWN, err=True)
    if missing:
        ctx.exit(BAD_ITEMS)
