"""RedisStore: the shared store, `redis://`, `rediss://` and `redis+cluster://`: many services, one set of passages.

    preread:manifests      hash    collection -> manifest JSON, codec table inside
    preread:aliases        hash    alias -> COLLECTION:CHECKSUM
    preread:generations    hash    storage name -> NUMBER:CHECKSUM, a random one after every write; survives a drop
    preread:p:STORAGE_NAME:PASSAGE_ID    string    one packed record (record.py), with the store's TTL if it has one
    preread:texts, preread:t:STORAGE_NAME:DIGEST    passages by their text (texts.py)
    preread:w:COLLECTION   writers that hold it (leases.py)

`preread` is the prefix (`?prefix=` in the URL), a checksum xxh3_64 of FIELD:VALUE in hex. Earlier versions wrote none;
collections of version 1 still have a number alone, which their writers count on from. No counters and no index of ids:
they would drift as passages expire; counting and listing scan the keys. A rename is a new manifest, then aliases, then
the end of the old manifest: in a cluster these keys lie apart, and after each step every name leads to the passages, so
one that was cut off is run again. Replies are not trusted, and keys and fields that cannot be Preread's are skipped:
the database may be shared. A multi-get is not atomic, each passage is.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import xxhash

from cache import errors
from cache.manifest import Manifest, storage_name_of
from cache.record import HEADER_BYTES, Damaged, Header, Record, check_name, check_storage_name, passage_id_bytes
from cache.redis.connection import Address
from cache.redis.leases import Leases
from cache.redis.link import IsValid, Link
from cache.redis.replies import (
    alias_of,
    check_finds_texts,
    check_generation,
    checksum_of,
    is_count,
    is_list,
    is_page,
    is_page_or_info,
    is_pairs,
    is_true,
    is_value,
    name_of,
    passage_id_of,
    scan_place,
    written_name,
)
from cache.redis.texts import TextSets
from cache.store import MAX_IDS_OF_TEXT, Audit, OnProgress, Store, StoreStats, aliases_of_renamed

_T = TypeVar("_T")
_Read = Record | Damaged | None

log = logging.getLogger(__name__)

_READ_CHUNK, _HEADER_CHUNK, _SCAN_COUNT = 64, 1000, 512
# A pipeline's size bounds what the server buffers for one client, and how long it is busy for it.
_CHUNK_BYTES = 8 << 20
# Counting a collection answers people and scrapes: longer than an online read, shorter than a write may take.
_COUNT_SECONDS = 2.0


class RedisStore(Store):
    """Packed records in Redis; connects on first use. Durable as far as the server is configured to be."""

    def __init__(
        self, url: str, read_seconds: float, write_seconds: float, ttl_seconds: int | None, tls_ca_file: str | None
    ) -> None:
        if ttl_seconds is not None and ttl_seconds < 1:
            raise ValueError(f"ttl_seconds: {ttl_seconds}, expected at least 1")
        self._address = address = Address.parse(url)
        # A breaker each: reads that are too large for their budget must not stop an indexing run.
        budgets = read_seconds, write_seconds, min(write_seconds, max(read_seconds, _COUNT_SECONDS))
        links = (Link(address, budget_seconds=seconds, tls_ca_file=tls_ca_file) for seconds in budgets)
        self._online, self._bulk, self._counting = links
        self._ttl_seconds = ttl_seconds
        self._text_sets = TextSets(ttl_seconds)
        self._leases = Leases(self._counting, address.prefix)
        self._renamed: dict[str, str] = {}  # where the name differs: storage name -> name when it was last looked up
        self._told: set[tuple[bytes, bytes]] = set()  # damaged aliases that the log has
        keys = (f"{address.prefix}:{name}" for name in ("manifests", "aliases", "generations", "texts"))
        self._manifests, self._aliases, self._generations, self._texts = keys

    def put_many(self, storage_name: str, records: Mapping[str, Record]) -> None:
        start = self._key_start(storage_name)
        encoded_ids = list(map(passage_id_bytes, records))
        self._require_stored(storage_name)
        digests = {passage_id: record.header.text_digest for passage_id, record in records.items()}
        before = self._digests(storage_name, list(records))
        self._text_sets.add(self._bulk, self._text_start(storage_name), digests.items())
        expiry = () if self._ttl_seconds is None else ("EX", self._ttl_seconds)
        commands: list[tuple[Any, ...]] = []
        num_bytes = 0
        for encoded_id, record in zip(encoded_ids, records.values(), strict=True):
            commands.append(("SET", start + encoded_id, record.pack(encoded_id), *expiry))
            num_bytes += record.header.total_bytes
            if num_bytes >= _CHUNK_BYTES:
                self._bulk.run(commands, is_true, len(commands))
                commands, num_bytes = [], 0
        self._bulk.run(commands, is_true, len(commands))
        if encoded_ids:
            replaced = ((one, digest) for one, digest in before.items() if digest != digests[one])
            self._text_sets.remove(self._bulk, self._text_start(storage_name), replaced)
            # After the values: a read cache that saw the old number looks again once they are there. A writer that dies
            # in between has not acknowledged, and repeats the write.
            self._bump(storage_name)

    def get_many(self, storage_name: str, passage_ids: Sequence[str], link: Link | None = None) -> list[_Read]:
        link = link or self._online
        found = self._get_once(link, storage_name, passage_ids)
        # A record knows whose it is. One that does not fit may be another key's, on a connection that mixes replies up,
        # and then a nil may stand in a record's place: all but the records are read once more, on another one.
        if any(isinstance(record, Damaged) for record in found):
            doubted = [i for i, record in enumerate(found) if not isinstance(record, Record)]
            link.forget(link.client)
            again = self._get_once(link, storage_name, [passage_ids[i] for i in doubted])
            for i, record in zip(doubted, again, strict=True):
                found[i] = record
        return found

    def _get_once(self, link: Link, storage_name: str, passage_ids: Sequence[str]) -> list[_Read]:
        commands = [("GET", self._key(storage_name, passage_id)) for passage_id in passage_ids]
        values = link.run(commands, is_value, _READ_CHUNK, chunk_bytes=_CHUNK_BYTES)
        wrong = "the key holds another type of value"
        return [
            Damaged(one, wrong) if isinstance(value, Exception) else Record.checked(one, value)
            for one, value in zip(passage_ids, values, strict=True)
        ]

    def delete_many(self, storage_name: str, passage_ids: Sequence[str]) -> int:
        before = self._digests(storage_name, list(dict.fromkeys(passage_ids)))
        num_deleted = self._unlink([self._key(storage_name, passage_id) for passage_id in dict.fromkeys(passage_ids)])
        self._text_sets.remove(self._bulk, self._text_start(storage_name), before.items())
        if passage_ids:
            self._bump(storage_name)  # also where none was there: a repeated UNLINK finds what the first one removed
        return num_deleted

    def headers_many(
        self, storage_name: str, passage_ids: Sequence[str], *, bulk: bool = False, link: Link | None = None
    ) -> list[Header | None]:
        link = link or (self._bulk if bulk else self._online)
        keys = [self._key(storage_name, passage_id) for passage_id in passage_ids]
        values = link.run([("GETRANGE", key, 0, HEADER_BYTES - 1) for key in keys], is_value, _HEADER_CHUNK)
        there = (None if isinstance(value, Exception) else value for value in values)
        return list(map(Header.checked, passage_ids, there))

    def scan(self, storage_name: str) -> Iterator[tuple[str, Record | Damaged]]:
        for batch in _batches(self._scan_ids(self._bulk, storage_name), _READ_CHUNK):
            for passage_id, record in zip(batch, self.get_many(storage_name, batch, self._bulk), strict=True):
                if record is not None:
                    yield passage_id, record

    def list_ids(self, storage_name: str, limit: int, after: bytes = b"") -> tuple[list[str], bytes]:
        """A page ends with a reply of SCAN, or after COUNT_SECONDS. Pages may repeat ids, while Redis rehashes.

        SCAN's cursors mean something to one process alone, in a cluster to one among the present primaries: a restart,
        failover or new node ends a listing. Passages that a cluster moves to another node meanwhile may be missed.
        """
        start, link = self._key_start(storage_name), self._counting
        nodes = sorted(link.primaries(), key=lambda node: node.name if node else "")
        servers = xxhash.xxh3_64_hexdigest(",".join(node.name if node else "" for node in nodes).encode())
        index, cursor, process = scan_place(after, servers, len(nodes))
        ids: dict[str, None] = {}
        end = time.monotonic() + _COUNT_SECONDS
        while index < len(nodes) and len(ids) < limit and time.monotonic() < end:
            count = min(_SCAN_COUNT, max(limit - len(ids), _READ_CHUNK))
            scan, came_from = ("SCAN", cursor, "MATCH", start + b"*", "COUNT", count), cursor
            is_reply = partial(is_page_or_info, start=start)
            (cursor, keys), info = link.run([scan, ("INFO", "server")], is_reply, 2, node=nodes[index])
            if came_from and (info.get("run_id") != process or cursor == came_from):
                raise errors.InvalidPageToken("the Redis server has restarted since the page before")
            process = info.get("run_id")
            ids |= dict.fromkeys(one for key in keys if (one := passage_id_of(key, start)) is not None)
            index += not cursor
        return list(ids), f"{servers} {index} {cursor} {process}".encode() if index < len(nodes) else b""

    def ids_of_texts(
        self, storage_name: str, digests: Sequence[bytes], limit: int = MAX_IDS_OF_TEXT
    ) -> list[list[str]]:
        return self._text_sets.ids(self._online, self._text_start(storage_name), digests, limit)

    def finds_texts(self, storage_name: str) -> bool:
        value = self._ask(self._online, is_value, "HGET", self._texts, storage_name)
        return value is not None and value == checksum_of("texts", storage_name).encode()

    def index_texts(self, storage_name: str, on_progress: OnProgress | None = None) -> None:
        self._require_stored(storage_name)
        num_done, num_all = 0, self.stats(storage_name).num_passages if on_progress else 0
        for entries in self._entries(storage_name):
            self._text_sets.add(self._bulk, self._text_start(storage_name), entries)
            num_done += len(entries)
            if on_progress is not None:
                on_progress(num_done, max(num_done, num_all))
        self._set_finds_texts(storage_name)

    def one_read(self) -> AbstractContextManager[object]:
        return self._online.one_budget()

    def stats(self, storage_name: str) -> StoreStats:
        """Counted by a scan over headers: about a second per million passages on a local server."""
        link = self._counting
        batches = _batches(self._scan_ids(link, storage_name), _HEADER_CHUNK)
        return StoreStats.of(one for batch in batches for one in self.headers_many(storage_name, batch, link=link))

    def audit(self, collection: str) -> Audit:
        """Fields of every collection, because one hash holds them all, and keys of this one."""
        problems = [problem for _, _, problem in self._flaws()]
        storage_name = self._storage_names().get(collection, collection)
        if num_stray := len(self._stray_keys(storage_name)):
            problems.append(f"{num_stray} keys under {self._key_start(storage_name).decode()} that no passage can have")
        if self.finds_texts(storage_name):
            start = self._text_start(storage_name)
            missing = (self._text_sets.num_missing(self._bulk, start, one) for one in self._entries(storage_name))
            if num_missing := sum(missing):
                mend = f"`preread collection reindex {collection}` mends it"
                problems.append(f"{num_missing} passages cannot be found by their text; {mend}")
        return Audit(tuple(problems))

    def mend(self) -> list[str]:
        left_behind = []
        for key, field, problem in list(self._flaws()):
            name = name_of(field, stored=key in (self._generations, self._texts))
            if key == self._manifests and name is not None:
                left_behind.append(f"{problem}; drop {name!r} and index it again")
                continue
            self._ask(self._bulk, is_count, "HDEL", key, field)
            if key == self._generations and name is not None:  # also of a renamed collection
                self._bump(name)
            else:
                left_behind.append(f"{problem}; removed")
        for collection, storage_name in sorted(self._storage_names().items()):
            if keys := self._stray_keys(storage_name):
                self._unlink(keys)
                left_behind.append(f"{len(keys)} keys of {collection!r} that no passage can have; removed")
        return left_behind

    def generation(self, storage_name: str) -> int:
        value = self._ask(self._online, is_value, "HGET", self._generations, storage_name)
        # Whatever the value, as long as another one is another number: where it is damaged, `audit` says so.
        return 0 if value is None else xxhash.xxh3_64_intdigest(value)

    def read_manifest(self, collection: str, link: Link | None = None) -> Manifest | None:
        value = self._ask(link or self._online, is_value, "HGET", self._manifests, collection)
        try:
            return None if value is None else Manifest.from_json(value, collection)
        except errors.ManifestError as exc:
            raise errors.StoreDamaged(f"collection {collection!r} cannot be read: {exc}; see `preread verify`") from exc

    def lease(self, collection: str, *, shared: bool = False) -> AbstractContextManager[Callable[[], None]]:
        return self._leases.held(check_name("collection", collection), shared=shared)

    def write_manifest(self, manifest: Manifest) -> Manifest:
        name = manifest.collection
        manifest = manifest.stored({stored for one, stored in self._storage_names().items() if one != name})
        if name in self.aliases(self._bulk) or not self._add_manifest(manifest):
            raise errors.CollectionExists(f"collection: {name!r} already exists in this store")
        self._set_finds_texts(manifest.storage_name)  # it is empty
        self._bump(manifest.storage_name, is_plain=manifest.version == 1)
        return manifest

    def list_collections(self) -> list[str]:
        found = self._ask(self._online, is_list, "HKEYS", self._manifests)
        return sorted(name for field in found if (name := name_of(field)) is not None)

    def drop_collection(self, collection: str) -> None:
        self._require(collection)
        errors.CollectionInUse.check(collection, self.aliases(self._bulk))
        names = self._storage_names()
        storage_name = names.pop(collection, collection)
        # The manifest first: nothing can be written then. Records that a crash leaves are bound to the old manifest, so
        # a new collection of this name does not take them for its own.
        self._ask(self._bulk, is_count, "HDEL", self._manifests, collection)
        if storage_name in names.values():  # of a rename that was cut off: the other name has them
            return
        self._ask(self._bulk, is_count, "HDEL", self._texts, storage_name)
        self._bump(storage_name)
        starts = self._key_start(storage_name), self._text_start(storage_name)
        for batch in _batches((key for start in starts for key in self._scan_keys(self._bulk, start)), _HEADER_CHUNK):
            self._unlink(batch)

    def rename_collection(self, collection: str, name: str, alias: str | None = None) -> list[str]:
        with ExitStack() as held:
            for one in {collection, name}:
                held.enter_context(self.lease(one))
            return self._rename(collection, name, alias)

    def _rename(self, collection: str, name: str, alias: str | None) -> list[str]:
        names, manifest = self._storage_names(), self.read_manifest(collection, self._bulk)
        if manifest is not None and name != collection and names.get(name) == manifest.storage_name:
            del names[name]  # of a rename that was cut off
        aliases = aliases_of_renamed(collection, name, alias, names, self.aliases(self._bulk))
        if manifest is None:
            raise errors.CollectionNotFound(f"collection: {collection!r} does not exist any longer")
        is_there = not self._add_manifest(replace(manifest, collection=name))
        if is_there and self._storage_names().get(name) != manifest.storage_name:
            raise errors.CollectionExists(f"collection: {name!r} already exists in this store")
        self._point(aliases, name)
        self._ask(self._bulk, is_count, "HDEL", self._manifests, collection)
        late = [one for one, target in self.aliases(self._bulk).items() if target == collection]
        self._point(late, name)
        return sorted({*aliases, *late})

    def aliases(self, link: Link | None = None) -> dict[str, str]:
        """Damaged and foreign fields are no aliases: opening one is an error, and the others stay."""
        aliases = {}
        for alias, value in self._ask(link or self._online, is_pairs, "HGETALL", self._aliases).items():
            try:
                name, collection = alias_of(alias, value)
                aliases[name] = collection
            except errors.DamagedRecord as exc:
                if (alias, value) not in self._told:
                    self._told.add((alias, value))
                    log.warning("alias %r: %s", alias.decode(errors="backslashreplace"), exc)
        return aliases

    def set_alias(self, alias: str, collection: str, *, shadowing: bool = False) -> None:
        check_name("alias", alias)
        if not shadowing and self._ask(self._bulk, is_count, "HEXISTS", self._manifests, alias):
            raise errors.CollectionExists(f"alias: {alias!r} is the name of a collection")
        self._require(collection)
        self._point([alias], collection)

    def remove_alias(self, alias: str) -> bool:
        return bool(self._ask(self._bulk, is_count, "HDEL", self._aliases, alias))

    def close(self) -> None:
        for link in (self._online, self._bulk, self._counting):
            link.close()

    def _point(self, aliases: Sequence[str], collection: str) -> None:
        """All of them in one step."""
        if aliases:
            pairs = [(one, f"{collection}:{checksum_of(one, collection)}") for one in aliases]
            self._ask(self._bulk, is_count, "HSET", self._aliases, *chain.from_iterable(pairs))

    def _add_manifest(self, manifest: Manifest) -> bool:
        """Whether there was none of that name."""
        fields = self._manifests, manifest.collection, manifest.to_json()
        return bool(self._ask(self._bulk, is_count, "HSETNX", *fields))

    def _storage_names(self) -> dict[str, str]:
        """Storage names by collection, of damaged manifests too."""
        found = self._ask(self._bulk, is_pairs, "HGETALL", self._manifests)
        return {name: storage_name_of(value, name) for field, value in found.items() if (name := name_of(field))}

    def _unlink(self, keys: Sequence[bytes]) -> int:
        return sum(self._bulk.run([("UNLINK", key) for key in keys], is_count, _HEADER_CHUNK))

    def _ask(self, link: Link, is_valid: IsValid, *command: Any) -> Any:
        (reply,) = link.run([command], is_valid)
        if isinstance(reply, Exception):
            expected = "another type of value, expected the hash Preread keeps there"
            raise errors.StoreDamaged(f"Redis key {command[1]}: {expected}")
        return reply

    def _flaws(self) -> Iterator[tuple[str, bytes, str]]:
        """Fields of the store's hashes that it did not write: key, field and problem."""
        parsers: dict[str, Callable[[bytes, bytes], object]] = {
            self._manifests: lambda field, value: Manifest.from_json(value, written_name("collection", field)),
            self._aliases: alias_of,
            self._generations: check_generation,
            self._texts: check_finds_texts,
        }
        for key, parse in parsers.items():
            for field, value in sorted(self._ask(self._bulk, is_pairs, "HGETALL", key).items()):
                try:
                    parse(field, value)
                except (errors.DamagedRecord, errors.ManifestError) as exc:
                    yield key, field, f"{key} {field.decode(errors='backslashreplace')!r}: {exc}"

    def _stray_keys(self, storage_name: str) -> list[bytes]:
        start = self._key_start(storage_name)
        return [key for key in self._scan_keys(self._bulk, start) if passage_id_of(key, start) is None]

    def _scan_ids(self, link: Link, storage_name: str) -> Iterator[str]:
        start = self._key_start(storage_name)
        return (one for key in self._scan_keys(link, start) if (one := passage_id_of(key, start)) is not None)

    def _entries(self, storage_name: str) -> Iterator[list[tuple[str, bytes]]]:
        """All passages with the digests of their texts, many at a time; damaged ones have none."""
        ids = self._scan_ids(self._bulk, storage_name)
        return (list(self._digests(storage_name, batch).items()) for batch in _batches(ids, _HEADER_CHUNK))

    def _digests(self, storage_name: str, passage_ids: Sequence[str]) -> dict[str, bytes]:
        headers = self.headers_many(storage_name, passage_ids, bulk=True)
        there = zip(passage_ids, headers, strict=True)
        return {passage_id: header.text_digest for passage_id, header in there if header is not None}

    def _scan_keys(self, link: Link, start: bytes) -> Iterator[bytes]:
        """Every key that starts so once, where SCAN may repeat some."""
        seen: set[int] = set()
        is_own = partial(is_page, start=start)
        for node in link.primaries():
            cursor, cursors = 0, {0}
            while True:
                command = ("SCAN", cursor, "MATCH", start + b"*", "COUNT", _SCAN_COUNT)
                ((cursor, keys),) = link.run([command], is_own, node=node)
                for key in keys:
                    digest = xxhash.xxh3_64_intdigest(key)
                    if digest not in seen:
                        seen.add(digest)
                        yield key
                if not cursor:
                    break
                if cursor in cursors:  # no server repeats one, so this scan would not end
                    raise errors.StoreUnavailable(f"{self._address}: SCAN repeats its cursor {cursor}")
                cursors.add(cursor)

    def _key(self, storage_name: str, passage_id: str) -> bytes:
        return self._key_start(storage_name) + passage_id_bytes(passage_id)

    def _key_start(self, storage_name: str) -> bytes:
        # A checked name holds no ':' and no glob character, so no collection's keys match another's pattern.
        return f"{self._address.prefix}:p:{check_storage_name(storage_name)}:".encode()

    def _text_start(self, storage_name: str) -> bytes:
        return f"{self._address.prefix}:t:{check_storage_name(storage_name)}:".encode()

    def _set_finds_texts(self, storage_name: str) -> None:
        self._ask(self._bulk, is_count, "HSET", self._texts, storage_name, checksum_of("texts", storage_name))

    def _require(self, collection: str) -> None:
        if not self._ask(self._bulk, is_count, "HEXISTS", self._manifests, collection):
            raise errors.CollectionNotFound(f"collection: {collection!r} does not exist in this store")

    def _require_stored(self, storage_name: str) -> None:
        name = self._renamed.get(storage_name, storage_name)
        if self._ask(self._bulk, is_count, "HEXISTS", self._manifests, name):
            return
        for name, stored in self._storage_names().items():
            if stored == storage_name:
                self._renamed[storage_name] = name
                return
        raise errors.CollectionNotFound(f"collection: {storage_name!r} does not exist in this store")

    def _bump(self, storage_name: str, *, is_plain: bool | None = None) -> None:
        """Change the generation; a plain number for collections of version 1, whose writers count on."""
        if is_plain is None:
            known = self._ask(self._bulk, is_value, "HGET", self._generations, storage_name)
            is_plain = known is not None and known.isdigit()
        number = str(secrets.randbits(62))  # a count would repeat after a restart without data, or on a stale replica
        value = number if is_plain else f"{number}:{checksum_of(storage_name, number)}"
        self._ask(self._bulk, is_count, "HSET", self._generations, storage_name, value)


def _batches(values: Iterator[_T], size: int) -> Iterator[list[_T]]:
    return iter(lambda: list(islice(values, size)), [])
