# ruff: noqa: N818 - the names say what happened; `CacheError` already says that it is an error.
"""Every error the cache raises on purpose; OSError, sqlite3.Error, redis.RedisError are translated with `from`."""

from collections.abc import Mapping


class CacheError(Exception):
    """Base of everything below."""


class StoreUrlError(CacheError):
    """The store URL cannot be understood."""


class StoreUnavailable(CacheError):
    """Down, over its time budget, or the circuit breaker is open; the same call may succeed later."""


class StoreFull(CacheError):
    """No room left: disk, quota or Redis maxmemory."""


class StoreAccessDenied(CacheError):
    """The store may not be read or written with these permissions or credentials."""


class StoreLocked(CacheError):
    """Another writer holds the collection, or held the embedded store for longer than the timeout."""


class StoreDamaged(CacheError):
    """The catalogue of a store cannot be read, or is of an unknown version."""


class CollectionNotFound(CacheError):
    """No collection or alias of that name."""


class CollectionGone(CollectionNotFound):
    """The collection was dropped, or its store removed, after it was opened."""


class CollectionExists(CacheError):
    """The name is taken by a collection or an alias."""


class CollectionInUse(CacheError):
    """An alias still points at the collection."""

    @classmethod
    def check(cls, collection: str, aliases: Mapping[str, str]) -> None:
        if users := sorted(alias for alias, name in aliases.items() if name == collection):
            raise cls(f"collection: {collection!r} is in use by the aliases {users}; move them first")


class EncoderMismatch(CacheError):
    """The collection was written by another encoder identity; the message names both sides."""


class ManifestError(CacheError):
    """A manifest that cannot be read or breaks a rule."""


class InvalidPageToken(CacheError):
    """Not where a page of this collection's ids begins, or no longer."""


class CodecError(CacheError):
    """An unknown factory string, a bad table, an untrained codec, or values a codec cannot hold."""


class InvalidName(CacheError):
    """A passage id, collection name or alias out of bounds."""


class InvalidPassage(CacheError):
    """One passage of a write that may not be stored; nothing of that write was stored."""

    def __init__(self, passage_id: str, reason: str) -> None:
        super().__init__(f"passage {passage_id!r}: {reason}")
        self.passage_id = passage_id
        self.reason = reason


class OutOfRange(CacheError):
    """Passages the codec was not trained for, `reasons` by id; nothing of that write was stored."""

    def __init__(self, reasons: dict[str, str]) -> None:
        passage_id, reason = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1:,} more passages)" if len(reasons) > 1 else ""
        super().__init__(f"passage {passage_id!r}: {reason}{more}")
        self.reasons = reasons


class RatioError(CacheError, ValueError):
    """A compression ratio that cannot be reached from the stored one."""


class DamagedRecord(CacheError):
    """Stored bytes that fail a check; the message is the reason. Stores turn it into a `Damaged` value."""
