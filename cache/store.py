"""Store: where records lie, by collection and passage id; and `open_store`, which finds one by URL.

A store knows records, manifests and aliases. It does not know floats: encoding and decoding is `collection.py`.
Every store obeys the same contract, tests/cache/test_store_contract.py.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cache.errors import StoreUrlError
from cache.manifest import Manifest
from cache.record import Damaged, Header, Record


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts of one collection.

    size_bytes: sum of packed records, without the store's own overhead
    num_clipped: numbers over all passages that lay outside the range their codec was trained for
    """

    num_passages: int = 0
    num_states: int = 0
    num_tokens: int = 0
    num_truncated: int = 0
    size_bytes: int = 0
    num_clipped: int = 0

    def clipped_share(self, dim: int) -> float:
        """Those, as a share of all numbers."""
        return self.num_clipped / max(1, self.num_states * dim)


@dataclass(frozen=True, slots=True)
class Audit:
    """Findings of a store about itself, beside its passages.

    problems: damage that reading passages does not show, a sentence each
    orphans: files or keys that belong to nothing, without anything being lost; the next write may remove them
    """

    problems: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()


def sum_headers(headers: Iterable[Header | None]) -> StoreStats:
    """Stats out of the headers of a collection; damaged ones (None) are counted as passages only."""
    num_passages = num_states = num_tokens = num_truncated = size_bytes = num_clipped = 0
    for header in headers:
        num_passages += 1
        if header is not None:
            num_states += header.num_states
            num_tokens += header.num_tokens
            num_truncated += header.truncated
            size_bytes += header.total_bytes
            num_clipped += header.num_clipped
    return StoreStats(num_passages, num_states, num_tokens, num_truncated, size_bytes, num_clipped)


class Store(Protocol):
    """Records by collection and passage id. Synchronous and thread-safe.

    Reading from a collection that does not exist finds nothing; writing to one raises CollectionNotFound. Ids and names
    out of bounds raise InvalidName. All methods may raise StoreUnavailable and the other store errors of errors.py.
    """

    def put_many(self, collection: str, records: Mapping[str, Record]) -> None:
        """Write records, replacing what was there. Each is whole or absent; on return all are durable and readable."""
        ...

    def get_many(self, collection: str, passage_ids: Sequence[str]) -> list[Record | Damaged | None]:
        """One entry per id, in order: the record, Damaged where its bytes fail a check, None where there is none."""
        ...

    def delete_many(self, collection: str, passage_ids: Sequence[str]) -> int:
        """Remove passages; returns how many were there."""
        ...

    def contains_many(self, collection: str, passage_ids: Sequence[str]) -> list[bytes | None]:
        """The stored text digest per id, or None, also for a damaged header; states are not read."""
        ...

    def headers_many(self, collection: str, passage_ids: Sequence[str]) -> list[Header | None]:
        """The stored header per id, or None where there is none or it is damaged; states are not read."""
        ...

    def scan(self, collection: str) -> Iterator[tuple[str, Record | Damaged]]:
        """Every passage once, in no particular order. Passages written or deleted meanwhile may or may not be seen."""
        ...

    def stats(self, collection: str) -> StoreStats: ...

    def audit(self, collection: str) -> Audit:
        """Look for damage that reading the passages of a collection does not show; reads no states."""
        ...

    def mend(self) -> list[str]:
        """Put right what `audit` finds, keep what is whole, and say what was left behind, a sentence each."""
        ...

    def generation(self, collection: str) -> int:
        """A number that is another one after every write to or drop of the collection; tiers in front compare it."""
        ...

    def read_manifest(self, collection: str) -> Manifest | None: ...

    def write_manifest(self, manifest: Manifest) -> None:
        """Create the collection it names. Raises CollectionExists where a collection or alias has the name."""
        ...

    def list_collections(self) -> list[str]:
        """Names, sorted; aliases not included."""
        ...

    def drop_collection(self, collection: str) -> None:
        """Remove manifest and passages. Raises CollectionNotFound, or CollectionInUse while an alias points at it."""
        ...

    def aliases(self) -> dict[str, str]:
        """Alias to collection name."""
        ...

    def set_alias(self, alias: str, collection: str, *, shadowing: bool = False) -> None:
        """Point an alias at a collection, in one step for all readers. Raises CollectionNotFound, CollectionExists.

        shadowing: also where a collection has that name. The name then opens the alias' collection, until the
        alias is removed; `drop_collection` still means the shadowed one.
        """
        ...

    def remove_alias(self, alias: str) -> bool:
        """Whether there was such an alias."""
        ...

    def close(self) -> None: ...


def open_store(
    url: str,
    *,
    tier_bytes: int = 0,
    tier_staleness_seconds: float = 0.0,
    lock_timeout_seconds: float = 30.0,
    read_budget_seconds: float = 0.1,
    write_budget_seconds: float = 30.0,
    ttl_seconds: int | None = None,
    tls_ca_file: str | None = None,
) -> Store:
    """Open a store by URL.

    memory:[NAME]          in this process, shared by everyone who opens the same name; gone when the last one closes it
    faiss:PATH             embedded, a directory, made on first write; `lock_timeout_seconds` to wait for another writer
    redis://[user:password@]HOST[:PORT][/DB]           shared; rediss:// for TLS (`tls_ca_file`: trust this authority)
    redis+cluster://HOST[:PORT][,HOST[:PORT]...]       a Redis cluster; rediss+cluster:// for TLS
        `read_budget_seconds` bounds an online read (bytes that come earn it 10 ms a megabyte more),
        `write_budget_seconds` each step of a write or scan,
        `ttl_seconds` lets passages expire

    tier_bytes: size of an in-process tier in front of it, 0 for none; it asks the store for changes before every read
    unless `tier_staleness_seconds` allows otherwise.

    Raises StoreUrlError. Nothing is connected or created before it is used.
    """
    scheme, separator, rest = url.partition(":")
    if not separator:
        raise StoreUrlError(
            f"store: {public_url(url)!r} has no scheme, expected memory:, faiss:PATH, redis://, rediss:// or redis+cluster://"
        )
    is_redis = scheme in ("redis", "rediss", "redis+cluster", "rediss+cluster")
    if ttl_seconds is not None and not is_redis:
        raise StoreUrlError(
            f"ttl_seconds: {ttl_seconds} has no meaning for {public_url(url)!r}, only Redis expires passages"
        )
    store: Store
    if scheme == "memory":
        from cache.memory import MemoryStore

        store = MemoryStore.shared(rest)
    elif scheme == "faiss":
        from cache.faiss.store import FaissStore

        if not rest:
            raise StoreUrlError(f"store: {url!r} has no path, expected faiss:PATH")
        store = FaissStore(rest, lock_timeout_seconds=lock_timeout_seconds)
    elif is_redis:
        from cache.redis.store import RedisStore

        store = RedisStore(
            url,
            read_budget_seconds=read_budget_seconds,
            write_budget_seconds=write_budget_seconds,
            ttl_seconds=ttl_seconds,
            tls_ca_file=tls_ca_file,
        )
    else:
        raise StoreUrlError(
            f"store: {public_url(url)!r}, expected memory:, faiss:PATH, redis://, rediss:// or redis+cluster://"
        )
    if tier_bytes:
        from cache.read_cache import CachedStore

        store = CachedStore(store, max_bytes=tier_bytes, staleness_seconds=tier_staleness_seconds)
    return store


_SHOWN_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::\d{1,5})?"
_SHOWN = re.compile(rf"{_SHOWN_HOST}(?:,{_SHOWN_HOST})*(?:/\d*)?")
_SHOWN_OPTIONS = re.compile(r"prefix=[A-Za-z0-9._-]*")
_SHOWN_UNKNOWN = re.compile(r"[\w+.-]*:(?:/[\w./-]*)?")  # no URL: a scheme alone, or a path behind it
_HIDDEN = "***"


def public_url(store: str, mask: str = "") -> str:
    """A store URL as it may be shown: without user, password and whatever could be a part of them.

    Shows what is known to be harmless, hosts, database and prefix, and `***` in place of the rest: a password may hold
    any character, and a URL that is shown because it is wrong may be cut anywhere.

    Args:
        mask: stands in the place of user and password; "": nothing does.
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
