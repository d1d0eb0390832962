"""`preread verify`: reads a collection back, every byte of it. Reads the store itself; loads no model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import click

from preread_cli.failures import BAD_ITEMS
from preread_cli.options import ADMIN_READ_SECONDS, collection_option, json_option, option, store_option

if TYPE_CHECKING:
    from cache.collection import Collection
    from cache.store import Store


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

    Checks version, lengths, checksum and id of every passage, decodes it, and checks its values; then what
    no passage shows: the catalogue's pages, its other rows, its counts, and whether commits are lost. Exit code
    1 when anything is damaged: the rest is not affected. --remove-damaged deletes damaged passages, and writes
    a damaged catalogue again out of what is whole. Indexing again leaves alone what is stored with the same
    text, damaged or not: remove it first.
    """
    from cache.open import open_store

    opened = open_store(store, read_budget_seconds=ADMIN_READ_SECONDS)
    try:
        found = _verified(opened, collection, remove_damaged=remove_damaged)
    finally:
        opened.close()
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        _print(found, max_shown, remove_damaged)
    if found.damaged or found.problems:
        ctx.exit(BAD_ITEMS)


@dataclass
class _Found:
    """Findings, for people and for machines."""

    collection: str
    num_passages: int = 0
    num_version_1: int = 0
    removed: int = 0
    clipped_share: float = 0.0  # of the numbers: outside what the codec was trained for
    damaged: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)


def _verified(store: Store, name: str, *, remove_damaged: bool) -> _Found:
    from cache.collection import Collection
    from cache.errors import CollectionNotFound, StoreDamaged

    mended: list[str] = []
    problems: list[str] = []
    try:
        found = _read(store, Collection.open(store, name))
        problems = found.problems
    except StoreDamaged as exc:
        if not remove_damaged:
            raise
        problems = [str(exc)]
    if remove_damaged and problems:
        mended = store.mend()
        try:
            found = _read(store, Collection.open(store, name))
        except (CollectionNotFound, StoreDamaged):  # its manifest was damaged: what was left behind names it
            return _Found(name, problems=problems, left_behind=mended)
        problems += [problem for problem in found.problems if problem not in problems]
    if remove_damaged:
        passage_ids = [one["passage_id"] for one in found.damaged]
        found.removed = Collection.open(store, name).delete_many(passage_ids)
    found.problems, found.left_behind = problems, mended
    return found


def _print(found: _Found, max_shown: int, remove_damaged: bool) -> None:
    for one in found.damaged[:max_shown]:
        click.echo(f"damaged: {one['passage_id']}: {one['reason']}")
    if len(found.damaged) > max_shown:
        click.echo(f"damaged: {len(found.damaged) - max_shown:,} more")
    for problem in found.problems[:max_shown]:
        click.echo(f"damaged: {problem}")
    for left in found.left_behind[:max_shown]:
        click.echo(f"left behind: {left}")
    if len(found.left_behind) > max_shown:
        click.echo(f"left behind: {len(found.left_behind) - max_shown:,} more")
    if found.orphans:
        click.echo(f"{len(found.orphans):,} segment files of writes that were cut off; the next write removes them")
    if found.num_version_1:
        click.echo(
            f"{found.num_version_1:,} records of version 1, which do not know their id; `preread collection compact` "
            "(faiss:) or a new collection (Redis) writes them again"
        )
    if found.clipped_share:
        click.echo(
            f"{found.clipped_share:.2%} of the numbers lie outside what the codec was trained for, and are cut to it; "
            f"`preread collection reencode {found.collection}` trains it again"
        )
    removed = f", {found.removed:,} removed" if remove_damaged else ""
    mended = ", catalogue written again" if remove_damaged and found.problems else ""
    click.echo(
        f"{found.collection}: {found.num_passages:,} passages read, {len(found.damaged):,} damaged{removed}{mended}"
    )


def _read(store: Store, whole: Collection) -> _Found:
    """Every passage, and what the store finds of itself."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cache.errors import StoreDamaged

    found = _Found(whole.name)
    audit = store.audit(whole.name)
    found.problems, found.orphans = list(audit.problems), list(audit.orphans)
    console = Console(stderr=True)
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            stats = whole.stats()
            found.clipped_share = stats.clipped_share(whole.manifest.dim)
            task = bar.add_task("", total=stats.num_passages)
            for one in whole.verify():
                found.num_passages += 1
                found.num_version_1 += one.version == 1
                if one.damage:
                    found.damaged.append({"passage_id": one.passage_id, "reason": one.damage})
                bar.advance(task)
    except StoreDamaged as exc:
        found.problems.append(str(exc))
    return found
