"""Collections by name or alias: each is opened once, and again when its name means another one."""

import logging
import time
from dataclasses import dataclass
from threading import Lock

from cache import errors
from cache.collection import Collection
from cache.manifest import Manifest
from cache.record import check_name
from cache.store import Store, StoreStats
from checkpoint import EncoderIdentity
from preread.errors import FailedPrecondition, InvalidRequest, NotFound, Unavailable

log = logging.getLogger(__name__)

PAGE_SIZE, MAX_PAGE_SIZE = 1000, 5000  # of ids; so many, of 512 bytes each, fit the 4 MiB that gRPC clients receive


THROWAWAY = "throwaway-"  # begins the names of collections that the page at / makes, and anyone may drop who may write


@dataclass(frozen=True, slots=True)
class StoredCollection:
    """One collection of a store, as it is listed."""

    manifest: Manifest
    stats: StoreStats
    aliases: tuple[str, ...]


def describe(store: Store, unreadable: dict[str, str] | None = None) -> list[StoredCollection]:
    """Every collection that can be read; `unreadable`, else the log, is told why another cannot. Raises CacheError."""
    aliases = sorted(store.aliases().items())
    described = []
    for name in store.list_collections():
        try:
            if (manifest := store.read_manifest(name)) is not None:  # else dropped a moment ago
                own = tuple(alias for alias, target in aliases if target == name)
                described.append(StoredCollection(manifest, store.stats(manifest.storage_name), own))
        except errors.StoreDamaged as exc:
            if unreadable is None:
                log.warning("collection %r cannot be read: %s", name, exc)
            else:
                unreadable[name] = str(exc)
    return described


def list_ids(store: Store, name: str, page_size: int, page_token: str) -> tuple[list[str], str]:
    """A page of a collection's passage ids, of any encoder, and the token of the next one, "" with the last.

    Raises InvalidRequest for a size or token out of range, and as Catalogue.open does. Blocks on the store.
    """
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        raise InvalidRequest("page_size", page_size, f"1..{MAX_PAGE_SIZE}, or 0 for {PAGE_SIZE}")
    try:
        check_name("collection", name)
    except errors.InvalidName as exc:
        raise InvalidRequest("collection", name, "the name of a collection or alias") from exc
    collection = Catalogue(store, None, 0.0).open(name)
    try:
        return collection.list_ids(page_size or PAGE_SIZE, page_token)
    except errors.InvalidPageToken as exc:
        expected = f"the next_page_token of the page before ({exc}); list from the first page, without a token"
        raise InvalidRequest("page_token", page_token, expected) from exc
    except errors.CacheError as exc:
        raise Unavailable(f"the store could not be read: {exc}") from exc


def drop_throwaway(store: Store, name: str) -> int:
    """Removes a throw-away collection and returns how many passages it had. Blocks on the store.

    Raises InvalidRequest for any other name, and the store's errors: CollectionNotFound, CollectionInUse by an alias.
    """
    if not check_name("collection", name).startswith(THROWAWAY):
        expected = f"a name that begins with {THROWAWAY}; `preread collection drop` removes others"
        raise InvalidRequest("collection", name, expected)
    manifest = store.read_manifest(name)
    num_passages = store.stats(manifest.storage_name).num_passages if manifest is not None else 0
    store.drop_collection(name)
    return num_passages


class Catalogue:
    """The collections of one store that one encoder's states may be read from; without an encoder, texts of any."""

    def __init__(self, store: Store, identity: EncoderIdentity | None, check_seconds: float) -> None:
        self.store = store
        self._encoder = (identity.fingerprint, identity.checkpoint) if identity is not None else (None, "")
        self._check_seconds = check_seconds  # until a name is looked up again: a moved alias is noticed by then
        self._opened: dict[str, tuple[Collection, float]] = {}  # and when each was checked, on time.monotonic's clock
        self._lock = Lock()
        self._failed: tuple[float, errors.CacheError] | None = None  # when the store last did not answer, and how

    def fresh(self, name: str) -> Collection | None:
        """The collection if it is open and was checked a moment ago; never blocks on the store."""
        collection, checked = self._opened.get(name, (None, 0.0))
        return collection if time.monotonic() - checked < self._check_seconds else None

    def first_ids(self, name: str, num_ids: int) -> list[str]:
        """Some passages of a collection, the store's first; raises as `open` does. Blocks on the store."""
        collection, ids, page_token = self.open(name), list[str](), ""
        while True:
            page, page_token = collection.list_ids(num_ids, page_token)
            ids += page
            if len(ids) >= num_ids or not page_token:
                return ids[:num_ids]

    def open(self, name: str) -> Collection:
        """The collection that `name`, itself or as an alias, means now. Blocks on the store.

        Raises NotFound; InvalidRequest for no name a collection can have; FailedPrecondition where another encoder
        wrote it, or it cannot be read; Unavailable where the store does not answer and it is not open yet.
        """
        came = time.monotonic()
        with self._lock:
            known, checked = self._opened.get(name, (None, 0.0))
            if known is not None and checked >= came:
                return known  # another thread looked while this one waited
            checked = time.monotonic()
            try:
                if self._failed is not None and self._failed[0] >= came:
                    raise self._failed[1]  # and was kept waiting: not each of them in turn
                # Equal manifests, not equal names: a collection may be dropped and rewritten.
                if known is not None and self.store.read_manifest(self.store.resolve(name)) == known.manifest:
                    collection = known
                else:
                    fingerprint, checkpoint = self._encoder
                    collection = Collection.open(self.store, name, fingerprint=fingerprint, checkpoint=checkpoint)
            except errors.CollectionNotFound as exc:
                self._opened.pop(name, None)
                raise NotFound("collection", name, str(exc)) from exc
            except errors.EncoderMismatch as exc:
                raise FailedPrecondition("ENCODER_MISMATCH", name, str(exc)) from exc
            except errors.InvalidName as exc:
                raise InvalidRequest("collection", name, "the name of a collection or alias") from exc
            except (errors.StoreUnavailable, errors.StoreLocked, errors.StoreAccessDenied) as exc:
                checked = time.monotonic()
                self._failed = (checked, exc)
                if known is None:
                    raise Unavailable(str(exc)) from exc
                # The last meaning of the name serves: a cache may still hold states, and texts can be encoded.
                collection = known
            except errors.CacheError as exc:  # damaged, not readable by us, of an unknown version
                raise FailedPrecondition("COLLECTION_UNREADABLE", name, str(exc)) from exc
            self._opened[name] = collection, checked
            return collection
