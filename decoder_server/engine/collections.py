"""Collections by name or alias: each is opened once, and again when its name means another one.

`open` blocks on the store: call it off the event loop.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from threading import Lock

from cache.collection import Collection
from cache.errors import (
    CacheError,
    CollectionNotFound,
    EncoderMismatch,
    InvalidName,
    StoreAccessDenied,
    StoreDamaged,
    StoreLocked,
    StoreUnavailable,
)
from cache.manifest import Manifest
from cache.store import Store, StoreStats
from checkpoint import EncoderIdentity
from preread.errors import FailedPrecondition, InvalidRequest, NotFound, Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredCollection:
    """One collection of a store, as it is listed."""

    manifest: Manifest
    stats: StoreStats
    aliases: tuple[str, ...]


def describe(store: Store) -> list[StoredCollection]:
    """Every collection that can be read, by name; the log has the others. Blocks on the store and raises its errors."""
    described, unreadable = survey(store)
    for name, reason in unreadable.items():
        log.warning("collection %r cannot be read: %s", name, reason)
    return described


def survey(store: Store) -> tuple[list[StoredCollection], dict[str, str]]:
    """The same, and why each other collection cannot be read: damage costs its own collection only."""
    aliases = sorted(store.aliases().items())
    described: list[StoredCollection] = []
    unreadable: dict[str, str] = {}
    for name in store.list_collections():
        own = tuple(alias for alias, target in aliases if target == name)
        try:
            manifest = store.read_manifest(name)
            if manifest is not None:  # else dropped a moment ago
                described.append(StoredCollection(manifest, store.stats(name), own))
        except StoreDamaged as exc:
            unreadable[name] = str(exc)
    return described, unreadable


@dataclass(slots=True)
class _Opened:
    collection: Collection
    checked: float  # time.monotonic()


class Catalogue:
    """The collections of one store that one encoder's states, or texts, may be read from."""

    def __init__(self, store: Store, identity: EncoderIdentity | None, check_seconds: float) -> None:
        """
        Args:
            identity: the encoder; None: only texts are read, and any collection will do.
            check_seconds: how long an opened collection is trusted before its name is looked up
                again; a moved alias is noticed within that time.
        """
        self.store = store
        self._identity = identity
        self._check_seconds = check_seconds
        self._opened: dict[str, _Opened] = {}
        self._lock = Lock()
        self._failed: tuple[float, CacheError] | None = None  # when the store last did not answer, and how

    def fresh(self, name: str) -> Collection | None:
        """The collection if it is open and was checked a moment ago; never blocks on the store."""
        opened = self._opened.get(name)
        if opened is None or time.monotonic() - opened.checked >= self._check_seconds:
            return None
        return opened.collection

    def open(self, name: str) -> Collection:
        """The collection that `name`, itself or as an alias, means now.

        Raises:
            NotFound: no such collection.
            InvalidRequest: no name a collection can have.
            FailedPrecondition: another encoder wrote it, or it cannot be read.
            Unavailable: the store does not answer and the collection is not open yet.
        """
        came = time.monotonic()
        with self._lock:
            known = self._opened.get(name)
            if known is not None and known.checked >= came:
                return known.collection  # another thread looked while this one waited
            try:
                if self._failed is not None and self._failed[0] >= came:
                    raise self._failed[1]  # and was kept waiting: not each of them in turn
                opened = self._look_up(name)
            except CollectionNotFound as exc:
                self._opened.pop(name, None)
                raise NotFound("collection", name, str(exc)) from exc
            except EncoderMismatch as exc:
                raise FailedPrecondition("ENCODER_MISMATCH", name, str(exc)) from exc
            except InvalidName as exc:
                raise InvalidRequest("collection", name, "the name of a collection or alias") from exc
            except (StoreUnavailable, StoreLocked, StoreAccessDenied) as exc:
                self._failed = (time.monotonic(), exc)
                if name not in self._opened:
                    raise Unavailable(str(exc)) from exc
                # The last meaning of the name serves: a cache may still hold states, and texts can be encoded.
                opened = _Opened(self._opened[name].collection, time.monotonic())
            except CacheError as exc:  # damaged, not readable by us, of an unknown version
                raise FailedPrecondition("COLLECTION_UNREADABLE", name, str(exc)) from exc
            self._opened[name] = opened
            return opened.collection

    def _look_up(self, name: str) -> _Opened:
        now = time.monotonic()
        known = self._opened.get(name)
        # Equal manifests, not equal names: a collection may be dropped and rewritten.
        if known and self.store.read_manifest(self.store.resolve(name)) == known.collection.manifest:
            return _Opened(known.collection, now)
        identity = self._identity
        if identity is None:
            opened = Collection.open(self.store, name)
        else:
            opened = Collection.open(self.store, name, fingerprint=identity.fingerprint, checkpoint=identity.checkpoint)
        return _Opened(opened, now)
