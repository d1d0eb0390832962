"""Lookup by text: the collections in which a request's texts may be found, so that clients that know no ids hit states.

The order is fixed, by `--lookup` or by name, so the same text gets the same states, whichever request it comes with.
"""

import logging
import time
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

from cache.collection import Collection
from cache.errors import CacheError
from cache.record import check_name
from decoder_server.engine.collections import Catalogue
from preread.errors import PrereadError

log = logging.getLogger(__name__)

MAX_LOOKUPS = 8  # collections that are looked into where none are named: each costs a text that is in none a read


class LookedUp(NamedTuple):
    """A collection that texts are looked up in, and all of its names."""

    collection: Collection
    names: frozenset[str]


class Lookup:
    """The collections of one encoder that texts are looked up in, in order; noticed again like moved aliases."""

    def __init__(self, catalogue: Catalogue, names: Sequence[str] | None, check_seconds: float) -> None:
        """`names` are collections or aliases; None: the first MAX_LOOKUPS by name. Raises InvalidName."""
        self._catalogue = catalogue
        self._names = None if names is None else [check_name("lookup", name) for name in names]
        self._check_seconds = check_seconds
        self._opened: tuple[LookedUp, ...] = ()
        self._checked = -float("inf")
        self._lock = Lock()
        self._told: set[str] = set()  # what the log has

    def fresh(self) -> tuple[LookedUp, ...] | None:
        """The collections, if they were looked at a moment ago; never blocks on the store."""
        return self._opened if time.monotonic() - self._checked < self._check_seconds else None

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
        for name in self._names if self._names is not None else store.list_collections():
            if self._names is None and len(found) == MAX_LOOKUPS:
                self._tell(f"texts are looked up in the first {MAX_LOOKUPS} collections; --lookup names others")
                break
            try:
                collection = self._catalogue.open(name)
            except PrereadError as exc:  # of another encoder, damaged, or not there yet
                if self._names is not None:
                    self._tell(f"texts are not looked up in {name}: {exc}")
                continue
            if store.finds_texts(collection.storage_name):
                found[collection.name] = collection
            else:
                mend = f"`preread collection reindex {collection.name}` makes it do so"
                self._tell(f"texts are not looked up in {collection.name}, which has no index of them; {mend}")
        names = {one: {one} for one in found}
        for alias, name in store.aliases().items() if found else ():
            names.get(name, set()).add(alias)
        return [LookedUp(one, frozenset(names[name])) for name, one in found.items()]

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning("%s", what)
