"""`preread collection show | remove | delete`: single passages of a stored collection, by id or by text."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from preread_cli import flags
from preread_cli.failures import BAD_ITEMS, CommandFailed
from preread_cli.flags import option
from preread_cli.passages import MAX_SHOWN, read_ids, read_texts
from preread_cli.terminal import confirm, print_json, print_some
from preread_edge.outputs import human_bytes
from preread_edge.tables import Table, print_parts, print_tables

if TYPE_CHECKING:
    from cache.collection import Collection
    from cache.record import Damaged, Record
    from cache.store import Store

ASK_ABOVE = 10  # passages; fewer are typed with care, or soon indexed again
_AT_ONCE = 10_000  # ids of one write


def opened_store(url: str) -> closing[Store]:
    from cache.open import open_store

    return closing(open_store(url, read_budget_seconds=flags.ADMIN_READ_SECONDS))


@click.command()
@click.argument("collection")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@option("--ids", "ids_file", metavar="FILE", help="Remove these: one id per line; - is standard input.")
@flags.yes
@flags.as_json
@flags.store
@click.pass_context
def remove(
    ctx: click.Context, /, collection: str, ids: tuple[str, ...], ids_file: str | None, yes: bool, **options: Any
) -> None:
    """Remove passages of COLLECTION by id.

    A server that reads the store follows within a second; none is needed. On a terminal it asks before it removes
    more than 10; a script, or one that gives the ids on standard input, is not asked. In a faiss: store `preread
    collection compact` frees their space.

    \b
    Examples:
      preread collection remove docs p17 p23
      preread index passages.jsonl -c docs --not-in-input gone.txt
      preread collection remove docs --ids gone.txt

    Exit code 1 when some of the ids were not stored; the others are removed.
    """
    from cache.collection import Collection

    if bool(ids) == (ids_file is not None):
        raise click.UsageError("Give ids, or a file of them with --ids.")
    wanted = list(dict.fromkeys(ids if ids_file is None else read_ids(ids_file)))
    with opened_store(options["store"]) as opened:
        target = Collection.open(opened, collection)
        is_few = len(wanted) <= ASK_ABOVE or ids_file == "-" or not sys.stdin.isatty()
        confirm(f"Remove {len(wanted):,} passages from {target.name}?", yes=yes or is_few)
        num_removed, missing = _removed(target, wanted)
        can_compact = opened.max_copy_bytes > 0
    if options["as_json"]:
        print_json({"collection": target.name, "num_removed": num_removed, "not_stored": missing})
    else:
        print_some("not stored", missing, MAX_SHOWN, err=True)
        space = f"; `preread collection compact {target.name}` frees their space" if can_compact and num_removed else ""
        print_parts(f"{target.name}: {num_removed:,} passages removed, {len(missing):,} not stored{space}")
    if missing:
        ctx.exit(BAD_ITEMS)


@click.command()
@click.argument("collection")
@option("--text", "texts", multiple=True, metavar="TEXT", help="Delete passages of this text; may be repeated.")
@option(
    "--texts",
    "texts_file",
    metavar="FILE",
    help="Delete passages of these texts: a text per line, or in a .jsonl file a string, or an object with text and "
    "perhaps title; - is standard input.",
)
@flags.as_json
@flags.store
@click.pass_context
def delete(
    ctx: click.Context, /, collection: str, texts: tuple[str, ...], texts_file: str | None, as_json: bool, store: str
) -> None:
    """Delete every passage of COLLECTION that was encoded from a text.

    For erasure: passages are found by the SHA-256 of the very text, under whatever ids, and nothing of them stays in
    the store's files; a faiss: store is compacted. A server that reads the store follows within a second, except for
    texts that it encoded itself: those it forgets with its memory. A text that is sent again is kept again by a
    server with --write-through.

    
    Examples:
      preread collection delete docs --text "The sky is blue because air scatters blue light most."
      preread collection delete docs --texts gone.jsonl

    Exit code 1 when under some of the texts nothing was stored; it names them by their SHA-256.
    """
    from cache.collection import Collection
    from cache.states import text_digest

    if bool(texts) == (texts_file is not None):
        raise click.UsageError("Give texts with --text, or a file of them with --texts.")
    digests = [text_digest(one) for one in (texts if texts_file is None else read_texts(texts_file))]
    with opened_store(store) as opened:
        target = Collection.open(opened, collection)
        if not opened.finds_texts(target.storage_name):
            mend = f"`preread collection reindex {target.name}` makes them so"
            raise CommandFailed(f"{target.name}: its passages cannot be found by their text; {mend}")
        num_removed, missing = 0, list[bytes]()
        for first in range(0, len(digests), _AT_ONCE):
            num, not_stored = target.delete_texts(digests[first : first + _AT_ONCE])
            num_removed, missing = num_removed + num, missing + not_stored
        if num_removed:
            opened.compact(target.storage_name)
    shown = [one.hex() for one in missing]
    if as_json:
        print_json({"collection": target.name, "num_removed": num_removed, "not_stored": shown})
    else:
        print_some("not stored", shown, MAX_SHOWN, err=True)
        print_parts(f"{target.name}: {num_removed:,} passages deleted, {len(shown):,} texts not stored")
    if missing:
        ctx.exit(BAD_ITEMS)


def _removed(target: Collection, ids: list[str]) -> tuple[int, list[str]]:
    """How many were removed, and which ids were not stored."""
    num_removed, missing = 0, []
    for first in range(0, len(ids), _AT_ONCE):
        some = ids[first : first + _AT_ONCE]
        # A damaged header is as none; reading the passage tells the two apart.
        doubted = [one for one, digest in zip(some, target.digests(some), strict=True) if digest is None]
        missing += [one for one, record in zip(doubted, target.get_records(doubted), strict=True) if record is None]
        num_removed += target.delete_many(some)
    return num_removed, missing


@click.command()
@click.argument("collection")
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@flags.as_json
@flags.store
@click.pass_context
def show(ctx: click.Context, /, collection: str, ids: tuple[str, ...], as_json: bool, store: str) -> None:
    """Show passages of COLLECTION: text, stored states, and whether they are sound.

    Exit code 1 when one is damaged or not stored.
    """
    from cache.collection import Collection

    with opened_store(store) as opened:
        target = Collection.open(opened, collection)
        records = target.get_records(ids)
    rows = [_row(target, passage_id, record) for passage_id, record in zip(ids, records, strict=True)]
    if as_json:
        print_json(rows)
    else:
        print_tables(map(_described, rows))
    if not all(row["sound"] for row in rows):
        ctx.exit(BAD_ITEMS)


def _row(target: Collection, passage_id: str, record: Record | Damaged | None) -> dict[str, Any]:
    from cache.record import Record

    row = {"passage_id": passage_id, "stored": record is not None, "sound": isinstance(record, Record), "damage": None}
    if not isinstance(record, Record):
        return row if record is None else row | {"damage": record.reason}
    header = record.header
    return row | {
        "num_states": header.num_states,
        "num_tokens": header.num_tokens,
        "num_windows": header.num_windows,
        "compression_ratio": header.compression_ratio,
        "truncated": header.truncated,
        "codec": target.manifest.codec,
        "dim": target.manifest.dim,
        "num_clipped": header.num_clipped,
        "size_bytes": header.total_bytes,
        "text_digest": header.text_digest.hex(),
        "text": record.text,
    }


def _described(row: dict[str, Any]) -> Table:
    facts = {"passage": row["passage_id"], "record": "sound"}
    if not row["sound"]:
        return Table.facts(facts | {"record": f"damaged: {row['damage']}" if row["stored"] else "not stored"})
    split = f", in {row['num_windows']:,} windows" if row["num_windows"] > 1 else ""
    return Table.facts(
        facts
        | {
            "tokens": f"{row['num_tokens']:,}{split}{', cut at the limit' if row['truncated'] else ''}",
            "states": f"{row['num_states']:,} of {row['dim']} values, compression ratio {row['compression_ratio']}",
            "size": f"{human_bytes(row['size_bytes'])} as {row['codec']}",
            "clipped": f"{row['num_clipped']:,} values" if row["num_clipped"] else "",
            "digest": f"{row['text_digest']} (SHA-256 of the text)",
            "text": "not stored" if row["text"] is None else row["text"],
        }
    )
