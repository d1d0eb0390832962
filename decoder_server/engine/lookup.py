"""Lookup by text: the collections in which a request's texts may be found, so that clients that know no ids hit states.

The order is fixed, by `--lookup` or by name, so the same text gets the same states, whichever request it comes with.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock
from typing import NamedTuple

from cache.collection import Collection
from cache.errors import CacheError
from cache.record import check_name, is_text_id
from decoder_server.engine.collections import THROWAWAY, Catalogue
from preread.errors import NotFound, PrereadError

log = logging.getLogger(__name__)

_CHECKED_IDS = 100  # of an indexed collection any tells
MAX_LOOKUPS = 8  # collections that are looked into where none are named: each costs a text that is in none a read


class LookedUp(NamedTuple):
    """A collection that texts are looked up in, and all of its names."""

    collection: Collection
    names: frozenset[str]


class Lookup:
    """The collections of one encoder that texts are looked up in, in order; noticed again like moved aliases."""

    def __init__(
        self, catalogue: Catalogue, names: Sequence[str] | None, check_seconds: float, write_through: str = ""
    ) -> None:
        """`names` are collections or aliases; None: the first MAX_LOOKUPS by name. Raises InvalidName.

        The collection that is written through, if there is one, is the last unless `names` has it.
        """
        self._catalogue = catalogue
        self._names = None if names is None else [check_name("lookup", name) for name in names]
        self._write_through = check_name("write_through", write_through) if write_through else ""
        self._check_seconds = check_seconds
        self._opened: tuple[LookedUp, ...] = ()
        self._checked = -float("inf")
        self._lock = Lock()
        self._told: set[str] = set()  # what the log has

    def fresh(self) -> tuple[LookedUp, ...] | None:
        """The collections, if they were looked at a moment ago; never blocks on the store."""
        return self._opened if time.monotonic() - self._checked < self._check_seconds else None

    def names_of(self, name: str) -> frozenset[str]:
        """All names of the collection that has this one, as far as it was there when it was looked for."""
        return next((one.names for one in self._opened if name in one.names), frozenset([name]))

    def open(self) -> tuple[LookedUp, ...]:
        """The collections as they are now, or as they were when the store last answered. Blocks on the store."""
        came = time.monotonic()
        with self._lock:
            if self._checked < came:  # else another thread looked while this one waited
                try:
                    self._opened = tuple(self._look())
                except CacheError as exc:
                    self._tell(f"texts are looked up where they were: {exc}")
                self._checked = time.monotonic()
            return self._opened

    def _look(self) -> list[LookedUp]:
        store, found = self._catalogue.store, dict[str, Collection]()
        # Not in throw-away collections: an upload from the page must not change the scores of other callers.
        every = (name for name in store.list_collections() if not name.startswith(THROWAWAY))
        names = self._names if self._names is not None else every
        last = [self._write_through] if self._write_through and self._write_through not in (self._names or ()) else []
        for name in (*names, *last):
            if self._names is None and len(found) == MAX_LOOKUPS and name not in last:
                self._tell(f"texts are looked up in the first {MAX_LOOKUPS} collections; --lookup names others")
                continue
            try:
                collection = self._catalogue.open(name)
            except NotFound as exc:  # not there yet; the first text that is kept makes it
                if self._names is not None and name != self._write_through:
                    self._tell(f"texts are not looked up in {name}: {exc}")
                continue
            except PrereadError as exc:  # of another encoder, or damaged
                if self._names is not None or name in last:
                    self._tell(f"texts are not looked up in {name}: {exc}")
                continue
            if name in last and self._names is None:
                found.pop(collection.name, None)  # by its name it came earlier
            if store.finds_texts(collection.storage_name):
                found[collection.name] = collection
            else:
                mend = f"`preread collection reindex {collection.name}` makes it do so"
                self._tell(f"texts are not looked up in {collection.name}, which has no index of them; {mend}")
        called = {one: {one} for one in found}
        for alias, name in store.aliases().items() if found else ():
            called.get(name, set()).add(alias)
        return [LookedUp(one, frozenset(called[name])) for name, one in found.items()]

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning("%s", what)


def check_write_through(catalogue: Catalogue, name: str) -> None:
    """Raises ValueError for a collection that was indexed: what is kept is evicted. Blocks on the store.

    The worker looks at all ids before it writes; a store that does not answer now is looked at there.
    """
    with suppress(PrereadError, CacheError):
        if others := [one for one in catalogue.first_ids(name, _CHECKED_IDS) if not is_text_id(one)]:
            expected = "a name that is free, or a collection of kept states alone"
            raise ValueError(f"write_through is {name!r}, which holds {others[0]!r:.100}; expected {expected}")
