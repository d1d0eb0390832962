"""`preread collection`: aliases, compaction, another encoding, dropping. Changes the store itself; asks no server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from preread_cli.failures import BAD_ITEMS, INTERRUPTED, CommandFailed
from preread_cli.options import (
    ADMIN_READ_SECONDS,
    compute_options,
    control_tokens_option,
    model_option,
    option,
    store_option,
)

if TYPE_CHECKING:
    from encoder_worker.passage_encoder import PassageEncoder
    from encoder_worker.reencoding import Reencoding

MAX_SHOWN = 20


@click.group()
def command() -> None:
    """Point an alias at a collection, compact, re-encode or drop it.

    To replace a collection while it is in use: index a second one beside it, point the alias at that
    one, drop the first. Readers see one or the other, never a mixture.
    """


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    from cache.open import open_store

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


@command.command("reencode")
@click.argument("collection")
@option("--into", metavar="NAME", help="The new collection.  [default: COLLECTION with .v2, .v3, ... after it]")
@option("--codec", metavar="CODEC", help="Store as this instead of the collection's own codec.")
@option("--keep-names", is_flag=True, help="Leave name and aliases with the old collection.")
@option("--missing", metavar="FILE", help="Write ids that need their input again to this file; - is standard output.")
@model_option
@control_tokens_option
@compute_options
@store_option
@click.pass_context
def reencode_command(ctx: click.Context, /, collection: str, **options: Any) -> None:
    """Train COLLECTION's codec again, and encode again what it had cut.

    For a codec that was trained on few or odd passages (`preread stats` shows the share of clipped numbers). Writes a
    new collection beside the old one: what was cut is encoded from the kept texts, the rest is taken over. When all
    of it is there, COLLECTION's name and aliases mean the new one, each in one step; until then readers see the old
    one. Run again to go on after an interruption. `preread collection drop` deletes the old one.

    \b
    Exit codes: 0 all done, 1 some passages need their input again (--missing has their ids) or writers never paused,
    130 interrupted.
    """
    from cache.collection import Collection
    from preread_cli.index import stopping
    from preread_cli.index_view import counted_progress
    from preread_edge.outputs import open_output

    def load() -> PassageEncoder:
        from checkpoint.compute import tune_process
        from encoder_worker.passage_encoder import PassageEncoder

        tune_process(options["threads"])
        limit = source.manifest.max_passage_tokens
        return PassageEncoder.load(
            options["model"],
            device=options["device"],
            dtype=options["dtype"],
            max_passage_tokens=limit,
            read_control_tokens=options["read_control_tokens"],
        )

    with _opened(options["store"]) as opened, ExitStack() as stack:
        from encoder_worker.reencoding import reencode

        source = Collection.open(opened, collection)
        codec = options["codec"] or source.manifest.codec
        if codec == source.manifest.codec and not source.codec.needs_training:
            raise CommandFailed(
                f"{source.name}: {codec} has no table to train, and cuts nothing; --codec names another"
            )
        missing = stack.enter_context(open_output(options["missing"])) if options["missing"] else None
        stop = stack.enter_context(stopping())
        done = reencode(
            source,
            options["into"] or _next_name(source.name),
            codec,
            load,
            move_names=not options["keep_names"],
            stop=stop,
            on_progress=stack.enter_context(counted_progress(source.name)),
        )
        if missing is not None:
            missing.writelines(f"{passage_id}\n" for passage_id in done.needs_input)
    _say_reencoded(done, codec)
    if done.report.interrupted:
        ctx.exit(INTERRUPTED)
    if done.needs_input or done.damaged or done.overtaken or done.report.num_refused:
        ctx.exit(BAD_ITEMS)


def _next_name(name: str) -> str:
    """docs -> docs.v2 -> docs.v3."""
    base, dot, number = name.rpartition(".v")
    return f"{base}.v{int(number) + 1}" if dot and number.isdecimal() else f"{name}.v2"


def _say_reencoded(done: Reencoding, codec: str) -> None:
    report = done.report
    click.echo(
        f"{done.source} -> {done.collection} as {codec}: {done.num_passages:,} passages, {report.num_stored:,} written "
        f"({done.num_from_texts:,} from their texts), {report.clipped_share:.2%} of the numbers clipped"
    )
    for entry in islice(report.refused, MAX_SHOWN):
        click.echo(f"refused: {entry['passage_id']}: {entry['message']}")
    for title, ids in (("needs its input again", done.needs_input), ("damaged, left out", done.damaged)):
        for passage_id in ids[:MAX_SHOWN]:
            click.echo(f"{title}: {passage_id}")
        if len(ids) > MAX_SHOWN:
            click.echo(f"{title}: {len(ids) - MAX_SHOWN:,} more")
    if done.needs_input:
        click.echo(f"`preread index --force -c {done.collection}` with the passages above encodes them again")
    for name in done.moved_names:
        click.echo(f"{name} -> {done.collection}")
    if done.source in done.moved_names:
        click.echo(f"the old one is there until `preread collection drop {done.source}`")
    if done.overtaken:
        click.echo(
            f"{done.source} was written to during every pass, and keeps its names: run again when writers pause",
            err=True,
        )
    if report.interrupted:
        click.echo("preread: interrupted; run again to go on from here", err=True)


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
