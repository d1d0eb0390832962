"""`preread stats`: what a store holds. Reads the store itself; asks no server, loads no model."""

from __future__ import annotations

import json
from typing import Any

import click

from preread_cli.failures import BAD_ITEMS
from preread_cli.options import ADMIN_READ_SECONDS, collection_option, json_option, store_option


@click.command()
@collection_option(required=False, help="Only this one, by name or alias.")
@json_option
@store_option
@click.pass_context
def command(ctx: click.Context, /, collection: str | None, as_json: bool, store: str) -> None:
    """Show what the store holds.

    One collection after another: which encoder wrote it, how it is stored, how much is in it. Bytes per
    passage are those of the records, without the store's own overhead. Exit code 1 when a collection cannot be
    read; the others are shown.
    """
    from cache.open import open_store
    from cache.store import public_url

    opened = open_store(store, read_budget_seconds=ADMIN_READ_SECONDS)
    try:
        rows, unreadable = _describe(opened, collection)
    finally:
        opened.close()
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
    elif not rows and not unreadable:
        click.echo(f"{public_url(store)} holds no collection; `preread index` makes one.")
    else:
        _print(rows)
    for name, reason in unreadable.items():
        click.echo(f"{name} cannot be read: {reason}", err=True)
    if unreadable:
        ctx.exit(BAD_ITEMS)


def _describe(store: Any, only: str | None) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row per collection, and why others cannot be read."""
    from cache.collection import Collection
    from cache.errors import StoreDamaged

    aliases = store.aliases()
    names = [Collection.open(store, only).name] if only else store.list_collections()
    rows = []
    unreadable = {}
    for name in names:
        try:
            manifest = store.read_manifest(name)
            if manifest is None:  # dropped a moment ago
                continue
            stats = store.stats(name)
        except StoreDamaged as exc:
            unreadable[name] = str(exc)
            continue
        rows.append(
            {
                "collection": name,
                "aliases": sorted(alias for alias, target in aliases.items() if target == name),
                "num_passages": stats.num_passages,
                "num_tokens": stats.num_tokens,
                "num_states": stats.num_states,
                "num_truncated": stats.num_truncated,
                "num_clipped": stats.num_clipped,
                "clipped_share": stats.clipped_share(manifest.dim),
                "size_bytes": stats.size_bytes,
                "compression_ratio": manifest.compression_ratio,
                "codec": manifest.codec,
                "dim": manifest.dim,
                "stores_text": manifest.stores_text,
                "checkpoint": manifest.checkpoint,
                "fingerprint": manifest.fingerprint,
                "max_passage_tokens": manifest.max_passage_tokens,
                "passage_template": manifest.passage_template,
                "created_at": manifest.created_at,
            }
        )
    return rows, unreadable


def _print(rows: list[dict[str, Any]]) -> None:
    from preread_cli.tables import human_bytes, print_facts

    for position, row in enumerate(rows):
        if position:
            click.echo()
        num_passages = row["num_passages"]
        clipped = f"{row['clipped_share']:.2%} of the numbers lie outside what the codec was trained for"
        per_passage = f" ({human_bytes(row['size_bytes'] / num_passages)} per passage)" if num_passages else ""
        print_facts(
            {
                "collection": row["collection"] + "".join(f"  <- {alias}" for alias in row["aliases"]),
                "passages": f"{num_passages:,} ({row['num_truncated']:,} cut at {row['max_passage_tokens']:,} tokens)",
                "tokens": f"{row['num_tokens']:,}",
                "states": f"{row['num_states']:,} of {row['dim']} values, compression ratio {row['compression_ratio']}",
                "size": f"{human_bytes(row['size_bytes'])} as {row['codec']}{per_passage}",
                **({"clipped": clipped} if row["num_clipped"] else {}),
                "texts": "stored" if row["stores_text"] else "not stored",
                "encoder": f"{row['checkpoint']} ({row['fingerprint'][:12]})",
                "created": row["created_at"],
            }
        )
