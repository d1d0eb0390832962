"""A store whose reads are timed and weighed. Does not know who listens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from cache.errors import CacheError
from cache.record import Damaged, Record
from cache.store import Store

# seconds, bytes of the records that came, whether it went well; called on the thread that read
OnRead = Callable[[float, int, bool], None]


def timed(store: Store, on_read: OnRead) -> Store:
    """`store` itself in all but `get_many`, which tells `on_read` of every call."""
    return cast(Store, _Timed(store, on_read))


class _Timed:
    def __init__(self, store: Store, on_read: OnRead) -> None:
        self._store = store
        self._on_read = on_read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_many(self, collection: str, passage_ids: Sequence[str]) -> list[Record | Damaged | None]:
        start = time.monotonic()
        try:
            records = self._store.get_many(collection, passage_ids)
        except CacheError:
            self._on_read(time.monotonic() - start, 0, False)
            raise
        num_bytes = sum(record.size_bytes for record in records if isinstance(record, Record))
        self._on_read(time.monotonic() - start, num_bytes, True)
        return records
