"""`preread verify`: reads a collection back, every byte of it. Reads the store itself; loads no model."""

from __future__ import annotations

import json
from typing import Any

import click

from preread.cli.failures import BAD_ITEMS
from preread.cli.options import ADMIN_READ_SECONDS, collection_option, json_option, option, store_option


@click.command()
@collection_option()
@option("--remove-damaged", is_flag=True, help="Remove what is damaged, so that `preread index` encodes it again.")
@option("--max-shown", type=click.IntRange(min=0), default=20, help="Show this many damaged passages.")
@json_option
@store_option
@click.pass_context
def command(
    ctx: click.Context, /, collection: str, remove_damaged: bool, max_shown: int, as_json: bool, store: str
) -> None:
    """Read a whole collection back and report damage.

    Checks version, lengths and checksum of every passage, decodes it, and checks its values. Exit code 1
    when any passage is damaged: the rest is not affected. Indexing again leaves alone what is stored with the
    same text, damaged or not: remove it first.
    """
    from cache.collection import Collection
    from cache.store import open_store

    opened = open_store(store, read_budget_seconds=ADMIN_READ_SECONDS)
    try:
        whole = Collection.open(opened, collection)
        num_read, damaged = _read(whole, whole.stats().num_passages)
        num_removed = whole.delete_many([one.passage_id for one in damaged]) if remove_damaged else 0
    finally:
        opened.close()
    if as_json:
        rows = [{"passage_id": one.passage_id, "reason": one.reason} for one in damaged]
        counts = {"collection": whole.name, "num_passages": num_read, "removed": num_removed}
        click.echo(json.dumps(counts | {"damaged": rows}, indent=2))
    else:
        for one in damaged[:max_shown]:
            click.echo(f"damaged: {one.passage_id}: {one.reason}")
        removed = f", {num_removed:,} removed" if remove_damaged else ""
        if len(damaged) > max_shown:
            click.echo(f"damaged: {len(damaged) - max_shown:,} more")
        click.echo(f"{whole.name}: {num_read:,} passages read, {len(damaged):,} damaged" + removed)
    if damaged:
        ctx.exit(BAD_ITEMS)


def _read(whole: Any, num_passages: int) -> tuple[int, list[Any]]:
    """Number of passages read, and the damaged ones among them."""
    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cache.record import Damaged

    console = Console(stderr=True)
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    num_read = 0
    damaged = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=num_passages)
        for passage_id, states in whole.scan():
            num_read += 1
            if isinstance(states, Damaged):
                damaged.append(states)
            elif not np.isfinite(states.states).all():
                damaged.append(Damaged(passage_id, "decoded states are not finite"))
            bar.advance(task)
    return num_read, damaged
