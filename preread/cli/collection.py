"""`preread collection`: aliases, compaction, dropping. Changes the store itself; asks no server, loads no model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from preread.cli.failures import CommandFailed
from preread.cli.options import ADMIN_READ_SECONDS, option, store_option


@click.group()
def command() -> None:
    """Point an alias at a collection, compact it or drop it.

    To replace a collection while it is in use: index a second one beside it, point the alias at that
    one, drop the first. Readers see one or the other, never a mixture.
    """


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    from cache.store import open_store

    store = open_store(url, read_budget_seconds=ADMIN_READ_SECONDS)
    try:
        yield store
    finally:
        store.close()


@command.command("alias")
@click.argument("alias")
@click.argument("collection", required=False)
@option("--remove", is_flag=True, help="Remove the alias instead; the collection stays.")
@store_option
def alias_command(alias: str, collection: str | None, remove: bool, store: str) -> None:
    """Make ALIAS another name of COLLECTION, in one step for every reader."""
    if remove == (collection is not None):
        raise click.UsageError("Give ALIAS and COLLECTION, or ALIAS and --remove.")
    with _opened(store) as opened:
        if remove:
            if not opened.remove_alias(alias):
                raise CommandFailed(f"alias: {alias!r} does not exist")
            click.echo(f"{alias} is no alias any more")
            return
        before = opened.aliases().get(alias)
        opened.set_alias(alias, collection)
        click.echo(f"{alias} -> {collection}" + (f" (was {before})" if before not in (None, collection) else ""))


@command.command("compact")
@click.argument("collection")
@store_option
def compact_command(collection: str, store: str) -> None:
    """Give back the space of deleted and replaced passages.

    For embedded stores (faiss:); Redis frees it at once.
    """
    from cache.collection import Collection
    from cache.store import public_url

    with _opened(store) as opened:
        name = Collection.open(opened, collection).name
        compact = getattr(opened, "compact", None)
        if compact is None:
            raise CommandFailed(
                f"{public_url(store)}: nothing to compact; only faiss: stores keep deleted passages on disk"
            )
        compact(name)
        click.echo(f"{name} is compact")


@command.command("drop")
@click.argument("collection")
@option("--yes", is_flag=True, help="Do not ask.")
@store_option
def drop_command(collection: str, yes: bool, store: str) -> None:
    """Delete COLLECTION and its passages. Refused while an alias points at it."""
    from cache.store import public_url

    with _opened(store) as opened:
        num_passages = opened.stats(collection).num_passages
        if not yes:
            click.confirm(f"Delete {collection} with {num_passages:,} passages from {public_url(store)}?", abort=True)
        opened.drop_collection(collection)
        click.echo(f"{collection} is gone ({num_passages:,} passages)")
