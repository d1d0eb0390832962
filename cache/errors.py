# ruff: noqa: N818 - the names say what happened; `CacheError` already says that it is an error.
"""Every error the cache raises on purpose.

    CacheError
    ├── StoreUrlError            the store URL cannot be understood
    ├── StoreUnavailable         down, over its time budget, or the circuit breaker is open; try again later
    ├── StoreFull                no room left: disk, quota or Redis maxmemory
    ├── StoreAccessDenied        file permissions, or Redis refused the credentials
    ├── StoreLocked              another writer held the embedded store for too long
    ├── StoreDamaged             the catalogue itself cannot be read, or is of an unknown version
    ├── CollectionNotFound       no collection or alias of that name
    ├── CollectionExists         the name is taken
    ├── CollectionInUse          an alias still points at the collection
    ├── EncoderMismatch          states of another encoder; names both sides
    ├── ManifestError            a manifest that cannot be read or breaks a rule
    ├── CodecError               unknown factory string, bad table, untrained codec, values a codec cannot hold
    ├── InvalidName              a passage id, collection name or alias out of bounds
    ├── InvalidPassage           a passage that may not be stored; carries `.passage_id`
    ├── OutOfRange               passages the codec was not trained for; carries `.reasons`, by id
    ├── RatioError               a compression ratio that cannot be reached (also a ValueError)
    └── DamagedRecord            stored bytes that fail a check; stores turn it into a `Damaged` value

Low-level errors (OSError, sqlite3.Error, redis.RedisError) never leave the package: they are translated with `from`.
"""


class CacheError(Exception):
    """Base of everything below."""


class StoreUrlError(CacheError):
    """The store URL cannot be understood."""


class StoreUnavailable(CacheError):
    """The store did not answer in time or at all; the same call may succeed later."""


class StoreFull(CacheError):
    """Nothing more fits: disk, quota or Redis maxmemory."""


class StoreAccessDenied(CacheError):
    """The store may not be read or written with these permissions or credentials."""


class StoreLocked(CacheError):
    """Another process kept writing to the embedded store for longer than this one would wait."""


class StoreDamaged(CacheError):
    """The catalogue of a store cannot be read, or is of an unknown version."""


class CollectionNotFound(CacheError):
    """No collection or alias of that name."""


class CollectionExists(CacheError):
    """The name is taken by a collection or an alias."""


class CollectionInUse(CacheError):
    """An alias still points at the collection."""


class EncoderMismatch(CacheError):
    """The collection was written by another encoder identity; the message names both sides."""


class ManifestError(CacheError):
    """A manifest that cannot be read or breaks a rule."""


class CodecError(CacheError):
    """A codec that does not exist, is not trained, or cannot hold the values."""


class InvalidName(CacheError):
    """A passage id, collection name or alias out of bounds."""


class InvalidPassage(CacheError):
    """One passage of a write that may not be stored; nothing of that write was stored."""

    def __init__(self, passage_id: str, reason: str) -> None:
        super().__init__(f"passage {passage_id!r}: {reason}")
        self.passage_id = passage_id
        self.reason = reason


class OutOfRange(CacheError):
    """Passages of a write whose numbers the codec was not trained for; nothing of that write was stored."""

    def __init__(self, reasons: dict[str, str]) -> None:
        passage_id, reason = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1:,} more passages)" if len(reasons) > 1 else ""
        super().__init__(f"passage {passage_id!r}: {reason}{more}")
        self.reasons = reasons


class RatioError(CacheError, ValueError):
    """A compression ratio that cannot be reached from the stored one."""


class DamagedRecord(CacheError):
    """Stored bytes that fail a check; the message is the reason."""
