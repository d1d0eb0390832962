"""Store: the contract of a place for records, by collection and passage id (tests/cache/test_store_contract.py).

Methods about passages take the collection's storage name (`Manifest.storage_name`), so that a collection that is open
stays readable and writable when it is renamed; methods about names take the name it has now.
"""

import json
import os
import re
import secrets
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from cache.errors import CollectionExists, CollectionNotFound, StoreLocked
from cache.manifest import Manifest
from cache.record import Damaged, Header, Record, check_name

MAX_IDS_OF_TEXT = 4  # enough to find one that is whole; a text may be stored under any number

OnProgress = Callable[[int, int], None]  # how many are done, of how many


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts of one collection."""

    num_passages: int = 0
    num_states: int = 0
    num_tokens: int = 0
    num_truncated: int = 0
    size_bytes: int = 0  # of packed records, without the store's overhead
    num_clipped: int = 0  # numbers that lay outside the range their codec was trained for

    @classmethod
    def of(cls, headers: Iterable[Header | None]) -> "StoreStats":
        """Stats from the headers of a collection; damaged ones (None) are counted as passages only."""
        num_passages, sums = 0, [0] * 5
        for header in headers:
            num_passages += 1
            if header is not None:
                sums = [a + b for a, b in zip(sums, header.counts, strict=True)]
        return cls(num_passages, *sums)

    def clipped_share(self, dim: int) -> float:
        """num_clipped as a share of all numbers."""
        return self.num_clipped / max(1, self.num_states * dim)


@dataclass(frozen=True, slots=True)
class Audit:
    """Findings of a store about itself."""

    problems: tuple[str, ...] = ()  # damage that reading passages does not show, a sentence each
    orphans: tuple[str, ...] = ()  # files or keys that belong to nothing; the next write may remove them


class Store(ABC):
    """Records by collection and passage id. Synchronous and thread-safe.

    `storage_name` is that of a collection's manifest: its name, unless it or an earlier one of its name was renamed.
    Reading from a collection that does not exist finds nothing; writing to one raises CollectionNotFound. Ids and names
    out of bounds raise InvalidName. All methods may raise StoreUnavailable and the other store errors of errors.py.
    """

    @abstractmethod
    def put_many(self, storage_name: str, records: Mapping[str, Record]) -> None:
        """Write records, replacing what was there. Each is whole or absent; on return all are durable and readable."""

    @abstractmethod
    def get_many(self, storage_name: str, passage_ids: Sequence[str]) -> list[Record | Damaged | None]:
        """One entry per id, in order: the record, Damaged where its bytes fail a check, None where there is none."""

    @abstractmethod
    def delete_many(self, storage_name: str, passage_ids: Sequence[str]) -> int:
        """Remove passages; returns how many were there."""

    @abstractmethod
    def headers_many(self, storage_name: str, passage_ids: Sequence[str], *, bulk: bool = False) -> list[Header | None]:
        """The stored header per id, None where there is no whole one; `bulk`: within a writer's time budget."""

    @abstractmethod
    def scan(self, storage_name: str) -> Iterator[tuple[str, Record | Damaged]]:
        """Every passage once, in no particular order. Passages written or deleted meanwhile may or may not be seen."""

    @abstractmethod
    def list_ids(self, storage_name: str, limit: int, after: bytes = b"") -> tuple[list[str], bytes]:
        """Passage ids in the store's own order, and `after` of the next page; b"" with the last. Reads no records.

        A page has about `limit` ids: at times fewer, none even, or some more. Raises InvalidPageToken for an `after`
        that is of no earlier page, or of one from before the store could have lost its order.
        """

    @abstractmethod
    def ids_of_texts(
        self, storage_name: str, digests: Sequence[bytes], limit: int = MAX_IDS_OF_TEXT
    ) -> list[list[str]]:
        """Passages by the SHA-256 of their text: per digest up to `limit` ids, the first in order of bytes.

        They are hints: a passage may have another text by now, or be gone, so its record's own digest decides. Where
        `finds_texts` is false, passages are missed.
        """

    @abstractmethod
    def finds_texts(self, storage_name: str) -> bool:
        """Whether passages can be found by text: not in collections that were made before stores kept the digests."""

    @abstractmethod
    def index_texts(self, storage_name: str, on_progress: OnProgress | None = None) -> None:
        """Make all passages of a collection findable by text; where they are, it changes nothing.

        May run beside readers and writers, and again after an interruption. Raises CollectionNotFound.
        """

    def one_read(self) -> AbstractContextManager[object]:
        """The reads of this thread within the block share the time budget of one, where the store has such a budget."""
        return nullcontext()

    def without_waiting(self) -> AbstractContextManager[object]:
        """Writes of this thread within the block raise StoreLocked immediately where another writer is in the way."""
        return nullcontext()

    @abstractmethod
    def stats(self, storage_name: str) -> StoreStats: ...

    # Bytes that `compact` takes for a while, at most. 0: it has nothing to do, deleting a passage frees its bytes.
    max_copy_bytes = 0

    def dead_bytes(self, storage_name: str) -> int:
        """Bytes of deleted and replaced passages that the store still holds, until `compact` frees them."""
        return 0

    def compact(self, storage_name: str) -> object:
        """Free the bytes of deleted and replaced passages, where the store holds any. Raises CollectionNotFound."""
        return None

    def audit(self, collection: str) -> Audit:
        """Look for damage that reading the passages of a collection does not show; reads no states."""
        return Audit()

    def mend(self) -> list[str]:
        """Repair what `audit` finds, keep what is whole, and return what was left behind, a sentence each."""
        return []

    @abstractmethod
    def generation(self, storage_name: str) -> int:
        """A number that changes with every write to or drop of the collection; a read cache compares it."""

    @abstractmethod
    def read_manifest(self, collection: str) -> Manifest | None: ...

    @abstractmethod
    def lease(self, collection: str, *, shared: bool = False) -> AbstractContextManager[Callable[[], None]]:
        """Hold the collection of that name, which need not exist yet, for writes: alone, or next to `shared` leases.

        Yields a function that raises StoreLocked where the lease was lost meanwhile. It ends with its process, in Redis
        soon after. No method but `rename_collection` looks at leases. Raises StoreLocked, naming the writer.
        """

    @abstractmethod
    def write_manifest(self, manifest: Manifest) -> Manifest:
        """Create the collection `manifest.collection`; its manifest, with the storage name that was free.

        Raises CollectionExists, also where an alias has that name.
        """

    @abstractmethod
    def list_collections(self) -> list[str]:
        """Collection names, sorted; aliases are not among them."""

    @abstractmethod
    def drop_collection(self, collection: str) -> None:
        """Remove a collection with all its passages. Raises CollectionNotFound, CollectionInUse by an alias."""

    @abstractmethod
    def rename_collection(self, collection: str, name: str, alias: str | None = None) -> list[str]:
        """Give a collection another name; its aliases follow, and `alias`, often the old name, becomes one of them.

        No passage is rewritten, and readers find the collection by the old or the new name at every moment. Returns its
        aliases. Raises CollectionNotFound, CollectionExists where `name` or `alias` is taken, and StoreLocked where a
        writer holds one of the names.
        """

    @abstractmethod
    def aliases(self) -> dict[str, str]:
        """Alias to collection name."""

    def resolve(self, name: str) -> str:
        """The collection that a name or an alias stands for at this moment, which need not exist."""
        return self.aliases().get(name, name)

    @abstractmethod
    def set_alias(self, alias: str, collection: str, *, shadowing: bool = False) -> None:
        """Point an alias at a collection, in one step for all readers. Raises CollectionNotFound.

        Raises CollectionExists where a collection has the alias' name, unless `shadowing`: the name then opens the
        alias' collection, until the alias is removed; `drop_collection` still means the shadowed one.
        """

    @abstractmethod
    def remove_alias(self, alias: str) -> bool:
        """Whether there was such an alias."""

    @abstractmethod
    def close(self) -> None: ...


def this_writer() -> str:
    """This process and moment, as others are told; no two are equal."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    writer = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "nonce": secrets.token_hex(8)}
    return json.dumps(writer)


def locked_by(collection: str, writer: bytes) -> StoreLocked:
    """The error that names a writer, as `this_writer` told it; its bytes may be damaged."""
    told = "another process"
    with suppress(ValueError, TypeError, KeyError):
        read = json.loads(writer)
        host, since = ("".join(filter(str.isprintable, str(read[key])))[:253] for key in ("host", "since"))
        told = f"process {int(read['pid'])} on {host} since {since}"
    return StoreLocked(f"collection {collection!r} is being written by {told}; try again when that has ended")


def aliases_of_renamed(
    collection: str, name: str, alias: str | None, names: Container[str], aliases: Mapping[str, str]
) -> list[str]:
    """What `rename_collection` points at the new name, given all names and aliases; raises what it raises."""
    check_name("collection", name)
    if collection not in names:
        is_alias = f" is an alias of {aliases[collection]!r};" if collection in aliases else ""
        raise CollectionNotFound(
            f"collection: {collection!r}{is_alias or ' does not exist in this store;'} expected "
            "the name of a collection"
        )
    if name in names:
        raise CollectionExists(f"collection: {name!r} already exists in this store")
    if name in aliases:
        raise CollectionExists(f"collection: {name!r} is an alias of {aliases[name]!r}; expected a name that is free")
    moved = {one for one, target in aliases.items() if target in (collection, name)}
    if alias is not None and check_name("alias", alias) not in moved:
        if alias == name or (alias in names and alias != collection):
            raise CollectionExists(f"alias: {alias!r} is the name of a collection")
        if alias in aliases:
            raise CollectionExists(f"alias: {alias!r} points at {aliases[alias]!r}; expected a name that is free")
        moved.add(alias)
    return sorted(moved)


_SHOWN_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::\d{1,5})?"
_SHOWN = re.compile(rf"{_SHOWN_HOST}(?:,{_SHOWN_HOST})*(?:/\d*)?")
_SHOWN_OPTIONS = re.compile(r"prefix=[A-Za-z0-9._-]*")
_SHOWN_UNKNOWN = re.compile(r"[\w+.-]*:(?:/[\w./-]*)?")  # no URL: a scheme alone, or a path behind it
_HIDDEN = "***"


def public_url(store: str, mask: str = "") -> str:
    """A store URL as it may be shown: without user and password, in whose place `mask` stands.

    Shows what is known to be harmless, hosts, database and prefix, and `***` in place of the rest: a password may hold
    any character, and a URL that is shown because it is wrong may be cut anywhere.
    """
    scheme, separator, rest = store.partition(":")
    if scheme in ("faiss", "memory") or not (separator or "@" in store):
        return store  # a path or a name
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) or not rest.startswith("//"):
        return store if _SHOWN_UNKNOWN.fullmatch(store) else _HIDDEN
    rest = rest[2:]
    end = min((i for i in map(rest.find, "/?#") if i >= 0), default=len(rest))  # of the part that names hosts
    if "@" in rest[end:] and _SHOWN.fullmatch(rest[:end].rpartition("@")[2]):
        return f"{scheme}://{_HIDDEN}"  # an option that holds an @, or a password that holds a slash: none can tell
    user, _, rest = rest.rpartition("@")
    place, question, options = rest.partition("?")
    shown = place if _SHOWN.fullmatch(place) else _HIDDEN
    if question:
        shown += f"?{options}" if _SHOWN_OPTIONS.fullmatch(options) else f"?{_HIDDEN}"
    return f"{scheme}://{mask}@{shown}" if user and mask else f"{scheme}://{shown}"
