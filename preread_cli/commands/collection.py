"""`preread stats`, `verify`, `collection`: what a store holds, whether it is whole, changes to it; without a server."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from cache.errors import CollectionNotFound, StoreDamaged
from preread_cli import flags
from preread_cli.commands import passages
from preread_cli.commands.passages import opened_store
from preread_cli.config_file import masked
from preread_cli.failures import BAD_ITEMS, INTERRUPTED, CommandFailed
from preread_cli.flags import option
from preread_cli.models import compute_options, load_encoder, model_option
from preread_cli.passages import write_ids
from preread_cli.terminal import confirm, print_json, print_result, print_some, progress_bar
from preread_edge.outputs import human_bytes, is_stdout, open_output
from preread_edge.tables import Table, print_parts, print_tables

if TYPE_CHECKING:
    from cache.store import Store
    from encoder_worker.reencoding import Reencoding

_COUNTS = ("num_passages", "num_tokens", "num_states", "num_truncated", "num_clipped")
_SETTINGS = (
    "compression_ratio", "codec", "dim", "stores_text", "checkpoint", "fingerprint", "max_passage_tokens",
    "passage_template", "created_at",
)  # fmt: skip
_REENCODED = (
    "num_passages", "num_from_texts", "needs_input", "damaged", "moved_names", "overtaken", "complete",
)  # fmt: skip


@click.command()
@flags.collection(help="Only this one, by name or alias.")
@flags.as_json
@flags.store
@click.pass_context
def stats(ctx: click.Context, /, collection: str | None, as_json: bool, store: str) -> None:
    """Show what the store holds.

    One collection after another: which encoder wrote it, how it is stored, how much is in it. Bytes per
    passage are those of the records, without the store's own overhead. Exit code 1 when a collection cannot be
    read; the others are shown.
    """
    from cache.collection import Collection

    rows: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    with opened_store(store) as opened:
        aliases = opened.aliases()
        for name in [Collection.open(opened, collection).name] if collection else opened.list_collections():
            try:
                manifest = opened.read_manifest(name)
                if manifest is None:  # dropped a moment ago
                    continue
                counts = opened.stats(manifest.storage_name)
                finds_texts = opened.finds_texts(manifest.storage_name)
            except StoreDamaged as exc:
                unreadable[name] = str(exc)
                continue
            rows.append(
                {"collection": name, "aliases": sorted(alias for alias, target in aliases.items() if target == name)}
                | {one: getattr(counts, one) for one in _COUNTS}
                | {"clipped_share": counts.clipped_share(manifest.dim), "size_bytes": counts.size_bytes}
                | {one: getattr(manifest, one) for one in _SETTINGS}
                | {"finds_texts": finds_texts}
            )
    if as_json:
        print_json(rows)
    elif rows:
        print_tables(map(_described, rows))
    elif not unreadable:
        print_parts(f"{masked(store, 'store')} holds no collection; `preread index` makes one.")
    for name, reason in unreadable.items():
        print_parts(f"{name} cannot be read: {reason}", err=True)
    if unreadable:
        ctx.exit(BAD_ITEMS)


def _described(row: dict[str, Any]) -> Table:
    num_passages = row["num_passages"]
    per_passage = f" ({human_bytes(row['size_bytes'] / num_passages)} per passage)" if num_passages else ""
    clipped = f"{row['clipped_share']:.2%} of the numbers lie outside what the codec was trained for"
    unfindable = f", not found by text: `preread collection reindex {row['collection']}`"
    facts = {
        "collection": row["collection"] + "".join(f"  <- {alias}" for alias in row["aliases"]),
        "passages": f"{num_passages:,} ({row['num_truncated']:,} cut at {row['max_passage_tokens']:,} tokens)",
        "tokens": f"{row['num_tokens']:,}",
        "states": f"{row['num_states']:,} of {row['dim']} values, compression ratio {row['compression_ratio']}",
        "size": f"{human_bytes(row['size_bytes'])} as {row['codec']}{per_passage}",
        "clipped": clipped if row["num_clipped"] else "",
        "texts": ("stored" if row["stores_text"] else "not stored") + ("" if row["finds_texts"] else unfindable),
        "encoder": f"{row['checkpoint']} ({row['fingerprint'][:12]})",
        "created": row["created_at"],
    }
    return Table.facts(facts)


@click.command()
@flags.collection(required=True, help="The collection to verify.")
@option("--remove-damaged", is_flag=True, help="Remove what is damaged, so that `preread index` encodes it again.")
@option("--max-shown", type=click.IntRange(min=0), default=20, help="Show at most this many damaged passages.")
@flags.as_json
@flags.store
@click.pass_context
def verify(ctx: click.Context, /, collection: str, remove_damaged: bool, **options: Any) -> None:
    """Read a whole collection back and report damage.

    Checks version, lengths, checksum and id of every passage, decodes it, and checks its values; then what
    no passage shows: the catalogue's pages, its other rows, its counts, and whether commits are lost. Exit code
    1 when anything is damaged: the rest is not affected. --remove-damaged deletes damaged passages, and writes
    a damaged catalogue again out of what is whole. Indexing again leaves alone what is stored with the same
    text, damaged or not: remove it first.
    """
    with opened_store(options["store"]) as opened:
        found = _verified(opened, collection, remove_damaged=remove_damaged)
    if options["as_json"]:
        print_json(asdict(found))
    else:
        _print_verified(found, options["max_shown"], remove_damaged)
    if found.damaged or found.problems:
        ctx.exit(BAD_ITEMS)


@dataclass
class _Verified:
    collection: str
    num_passages: int = 0
    num_version_1: int = 0
    removed: int = 0
    clipped_share: float = 0.0  # of the numbers: outside what the codec was trained for
    damaged: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)


def _verified(store: Store, name: str, *, remove_damaged: bool) -> _Verified:
    from cache.collection import Collection

    try:
        found = _read(store, name)
    except StoreDamaged as exc:
        if not remove_damaged:
            raise
        found = _Verified(name, problems=[str(exc)])
    if not remove_damaged:
        return found
    if problems := found.problems:
        mended = store.mend()
        try:
            found = _read(store, name)
        except (CollectionNotFound, StoreDamaged):  # its manifest was damaged: what was left behind names it
            return _Verified(name, problems=problems, left_behind=mended)
        found.problems, found.left_behind = list(dict.fromkeys(problems + found.problems)), mended
    found.removed = Collection.open(store, name).delete_many([one["passage_id"] for one in found.damaged])
    return found


def _read(store: Store, name: str) -> _Verified:
    from cache.collection import Collection

    whole = Collection.open(store, name)
    audit = store.audit(whole.name)
    found = _Verified(whole.name, problems=list(audit.problems), orphans=list(audit.orphans))
    try:
        with progress_bar(f"reading {whole.name}", "passages") as on_progress:
            counts = whole.stats()
            found.clipped_share = counts.clipped_share(whole.manifest.dim)
            for passage_id, version, damage in whole.verify():
                found.num_passages += 1
                found.num_version_1 += version == 1
                if damage:
                    found.damaged.append({"passage_id": passage_id, "reason": damage})
                on_progress(found.num_passages, counts.num_passages)
    except StoreDamaged as exc:
        found.problems.append(str(exc))
    return found


def _print_verified(found: _Verified, max_shown: int, remove_damaged: bool) -> None:
    damaged = [f"{one['passage_id']}: {one['reason']}" for one in found.damaged]
    for title, lines in (("damaged", damaged), ("damaged", found.problems), ("left behind", found.left_behind)):
        print_some(title, lines, max_shown)
    if found.orphans:
        print_parts(f"{len(found.orphans):,} segment files of writes that were cut off; the next write removes them")
    if found.num_version_1:
        mend = "`preread collection compact` (faiss:) or a new collection (Redis) writes them again"
        print_parts(f"{found.num_version_1:,} records of version 1, which do not know their id; {mend}")
    if found.clipped_share:
        mend = f"and are cut to it; `preread collection reencode {found.collection}` trains it again"
        print_parts(f"{found.clipped_share:.2%} of the numbers lie outside what the codec was trained for, {mend}")
    removed = f", {found.removed:,} removed" if remove_damaged else ""
    mended = ", catalogue written again" if remove_damaged and found.problems else ""
    read = f"{found.num_passages:,} passages read, {len(found.damaged):,} damaged"
    print_parts(f"{found.collection}: {read}{removed}{mended}")


@click.group()
def collection() -> None:
    """Manage collections: aliases, names, single passages, upkeep, removal.

    To replace a collection while it is in use: index a second one next to it, point the alias at that
    one, drop the first. Readers see one or the other, never a mixture. A collection that has the name which
    readers use is renamed before, with that name as its alias.
    """


collection.add_command(passages.show)
collection.add_command(passages.remove)
collection.add_command(passages.delete)


@collection.command("alias")
@click.argument("alias")
@click.argument("collection", required=False)
@option("--remove", is_flag=True, help="Remove the alias instead; the collection stays.")
@flags.as_json
@flags.store
def _alias(alias: str, collection: str | None, remove: bool, as_json: bool, store: str) -> None:
    """Make ALIAS another name of COLLECTION, in one step for every reader."""
    if remove == (collection is not None):
        raise click.UsageError("Give ALIAS and COLLECTION, or ALIAS and --remove.")
    with opened_store(store) as opened:
        if collection is None:
            if not opened.remove_alias(alias):
                raise CommandFailed(f"alias: {alias!r} does not exist")
            said = f"{alias} is no alias any more"
        else:
            before = opened.aliases().get(alias)
            opened.set_alias(alias, collection)
            said = f"{alias} -> {collection}" + (f" (was {before})" if before not in (None, collection) else "")
    print_result({"alias": alias, "collection": collection}, said, as_json=as_json)


@collection.command("rename")
@click.argument("collection", metavar="OLD")
@click.argument("name", metavar="NEW")
@option("--alias", metavar="NAME", help="Point this alias at the collection too; usually OLD, which readers still use.")
@flags.as_json
@flags.store
def _rename(collection: str, name: str, alias: str | None, as_json: bool, store: str) -> None:
    """Give the collection OLD the name NEW.

    No passage is rewritten, and aliases of OLD follow. With `--alias OLD` readers find the collection by OLD at every
    moment, and the next version of it can be indexed under another name and take over the alias. Refused while the
    collection is written.
    """
    with opened_store(store) as opened:
        aliases = opened.rename_collection(collection, name, alias)
    said = [f"{collection} is now {name}", *(f"{one} -> {name}" for one in aliases)]
    print_result({"collection": name, "was": collection, "aliases": aliases}, "\n".join(said), as_json=as_json)


@collection.command("compact")
@click.argument("collection")
@flags.as_json
@flags.store
def _compact(collection: str, as_json: bool, store: str) -> None:
    """Free the space of deleted and replaced passages.

    For embedded stores (faiss:); Redis frees it at once.
    """
    from cache.collection import Collection

    with opened_store(store) as opened:
        found = Collection.open(opened, collection)
        if not opened.max_copy_bytes:
            nothing = "nothing to compact; only faiss: stores keep deleted passages on disk"
            raise CommandFailed(f"{masked(store, 'store')}: {nothing}")
        opened.compact(found.storage_name)
    print_result({"collection": found.name}, f"{found.name} is compact", as_json=as_json)


@collection.command("reindex")
@click.argument("collection")
@flags.as_json
@flags.store
def _reindex(collection: str, as_json: bool, store: str) -> None:
    """Make COLLECTION's passages findable by their text.

    For collections that were written by earlier versions: `preread serve` then finds a text that comes without an id.
    Reads headers, not states; in a faiss: store it does so for every collection, and writers wait meanwhile.
    """
    from cache.collection import Collection

    with opened_store(store) as opened, progress_bar("indexing texts", "passages") as on_progress:
        found = Collection.open(opened, collection)
        opened.index_texts(found.storage_name, on_progress)
    print_result({"collection": found.name}, f"{found.name} finds passages by their text", as_json=as_json)


@collection.command("reencode")
@click.argument("collection")
@option("--into", metavar="NAME", help="The new collection.  [default: COLLECTION with .v2, .v3, ... after it]")
@option("--codec", metavar="CODEC", help="Store as this instead of the collection's own codec.")
@option("--keep-names", is_flag=True, help="Leave name and aliases with the old collection.")
@option("--missing", metavar="FILE", help="Write ids that need their input again to this file; - is standard output.")
@model_option
@compute_options
@flags.as_json
@flags.store
@click.pass_context
def _reencode(ctx: click.Context, /, collection: str, **options: Any) -> None:
    """Train COLLECTION's codec again, and re-encode the passages it clipped.

    For a codec that was trained on few or odd passages (`preread stats` shows the share of clipped numbers). Writes a
    new collection next to the old one: what was cut is encoded from the kept texts, the rest is taken over. When all
    of it is there, COLLECTION's name and aliases mean the new one, each in one step; until then readers see the old
    one. Run again to go on after an interruption. `preread collection drop` deletes the old one.

    \b
    Exit codes: 0 all done, 1 some passages need their input again (--missing has their ids) or writers never paused,
    130 interrupted.
    """
    from cache.collection import Collection
    from encoder_worker.reencoding import reencode
    from preread_cli.commands.index import stopping

    if options["as_json"] and options["missing"] and is_stdout(options["missing"]):
        raise click.UsageError("--missing - and --json both print to standard output: give one of them.")
    with opened_store(options["store"]) as opened, ExitStack() as stack:
        source = Collection.open(opened, collection)
        codec = options["codec"] or source.manifest.codec
        if codec == source.manifest.codec and not source.codec.needs_training:
            raise CommandFailed(f"{source.name}: {codec} has no table to train, cuts nothing; --codec names another")
        missing = stack.enter_context(open_output(options["missing"])) if options["missing"] else None
        base, dot, number = source.name.rpartition(".v")
        next_name = f"{base}.v{int(number) + 1}" if dot and number.isdecimal() else f"{source.name}.v2"
        load = partial(load_encoder, options, max_passage_tokens=source.manifest.max_passage_tokens)
        done = reencode(
            source,
            options["into"] or next_name,
            codec,
            load,
            move_names=not options["keep_names"],
            stop=stack.enter_context(stopping()),
            on_progress=stack.enter_context(progress_bar(f"re-encoding {source.name}", "passages")),
        )
        if missing is not None:
            write_ids(missing, done.needs_input)
    if options["as_json"]:
        shown = {name: getattr(done, name) for name in _REENCODED} | {"report": done.report.summary()}
        print_json({"collection": done.source.name, "into": done.target.name, "codec": codec} | shown)
    else:
        _print_reencoded(done, codec)
    if done.report.interrupted:
        ctx.exit(INTERRUPTED)
    if done.needs_input or done.damaged or done.overtaken or done.report.num_refused:
        ctx.exit(BAD_ITEMS)


def _print_reencoded(done: Reencoding, codec: str) -> None:
    report, name = done.report, done.source.name
    written = f"{report.num_stored:,} written ({done.num_from_texts:,} from their texts)"
    counts = f"{done.num_passages:,} passages, {written}, {report.clipped_share:.2%} of the numbers clipped"
    print_parts(f"{name} -> {done.target.name} as {codec}: {counts}")
    refused = (f"{entry['passage_id']}: {entry['message']}" for entry in report.refused)
    print_some("refused", refused, num_lines=report.num_refused)
    print_some("needs its input again", done.needs_input)
    print_some("damaged, left out", done.damaged)
    if done.needs_input:
        print_parts(f"`preread index --force -c {done.target.name}` with the passages above encodes them again")
    for moved in done.moved_names:
        print_parts(f"{moved} -> {done.target.name}")
    if name in done.moved_names:
        print_parts(f"the old one is there until `preread collection drop {name}`")
    if done.overtaken:
        again = "and keeps its names: run again when writers pause"
        print_parts(f"{name} was written to during every pass, {again}", err=True)
    if report.interrupted:
        print_parts("preread: interrupted; run again to go on from here", err=True)


@collection.command("drop")
@click.argument("collection")
@flags.yes
@flags.as_json
@flags.store
def _drop(collection: str, yes: bool, as_json: bool, store: str) -> None:
    """Delete COLLECTION and its passages. Refused while an alias points at it."""
    with opened_store(store) as opened:
        manifest = None
        with suppress(StoreDamaged):  # a reason to drop it
            manifest = opened.read_manifest(collection)
        num_passages = 0 if manifest is None else opened.stats(manifest.storage_name).num_passages
        whole = f"{collection} with {num_passages:,} passages from {masked(store, 'store')}"
        confirm(f"Delete {whole}?", yes=yes)
        opened.drop_collection(collection)
    gone = f"{collection} is gone ({num_passages:,} passages)"
    print_result({"collection": collection, "num_passages": num_passages}, gone, as_json=as_json)
