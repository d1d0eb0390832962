"""What a store holds of one collection, for commands that ask a server about it. Loads no model."""

from __future__ import annotations

from itertools import islice

from preread.cli.failures import CommandFailed
from preread.cli.options import ADMIN_READ_SECONDS


def stored_ids(store_url: str, name: str, *, max_passages: int | None = None, otherwise: str = "") -> list[str]:
    """Ids of a whole collection, or of what an alias means, sorted.

    Args:
        max_passages: of more than these the command says no; None: there is no limit.
        otherwise: what it says then, beside how many there are.

    Raises:
        CommandFailed: more than that, or none.
    """
    from cache.collection import Collection
    from cache.store import open_store

    store = open_store(store_url, read_budget_seconds=ADMIN_READ_SECONDS)
    try:
        collection = Collection.open(store, name)
        num_passages = collection.stats().num_passages
        if max_passages is not None and num_passages > max_passages:
            raise CommandFailed(f"collection {name!r} has {num_passages:,} passages; {otherwise}")
        ids = sorted(passage_id for passage_id, _ in islice(store.scan(collection.name), max_passages))
    finally:
        store.close()
    if not ids:
        raise CommandFailed(f"collection {name!r} is empty")
    return ids
