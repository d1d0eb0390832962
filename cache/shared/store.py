"""RedisStore: records as values of a shared Redis server or cluster. The package docstring has the key layout.

What is read is not trusted: every value goes through `record.unpack` or `Manifest.from_json`. A multi-get is pipelined
and not atomic, each passage is.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import xxhash

from cache.errors import CollectionExists, CollectionInUse, CollectionNotFound, DamagedRecord
from cache.manifest import Manifest
from cache.names import check_name, passage_id_bytes
from cache.record import HEADER_BYTES, Damaged, Header, Record, pack, unpack
from cache.shared.address import Address
from cache.shared.link import Client, Deadline, Link
from cache.shared.pipeline import run, take_bytes
from cache.store import StoreStats, sum_headers

_READ_CHUNK, _HEADER_CHUNK, _SCAN_COUNT = 64, 1000, 512
# A pipeline's size bounds what the server buffers for one client, and how long it is busy for it.
_CHUNK_BYTES = 8 << 20


class RedisStore:
    """Packed records in Redis; see `Store` for the contract. Durable as far as the server is configured to be.

    Raises StoreUrlError. Connects on first use.
    """

    def __init__(
        self,
        url: str,
        *,
        read_budget_seconds: float = 0.1,
        write_budget_seconds: float = 30.0,
        ttl_seconds: int | None = None,
        tls_ca_file: str | None = None,
    ) -> None:
        if ttl_seconds is not None and ttl_seconds < 1:
            raise ValueError(f"ttl_seconds: {ttl_seconds}, expected at least 1")
        address = Address.parse(url)
        # A breaker each: reads that are too large for their budget must not stop an indexing run.
        self._online = Link(address, budget_seconds=read_budget_seconds, tls_ca_file=tls_ca_file)
        self._bulk = Link(address, budget_seconds=write_budget_seconds, tls_ca_file=tls_ca_file)
        self._ttl_seconds = ttl_seconds
        self._is_cluster = address.is_cluster
        self._prefix = address.prefix
        self._manifests, self._aliases, self._generations = (
            f"{address.prefix}:{name}" for name in ("manifests", "aliases", "generations")
        )

    def put_many(self, collection: str, records: Mapping[str, Record]) -> None:
        start = self._key_start(collection)
        encoded_ids = [passage_id_bytes(passage_id) for passage_id in records]
        self._require(collection)
        pairs = zip(encoded_ids, records.values(), strict=True)
        while chunk := take_bytes(pairs, _CHUNK_BYTES):
            expiry = () if self._ttl_seconds is None else ("EX", self._ttl_seconds)
            commands = [("SET", start + encoded_id, pack(record, encoded_id), *expiry) for encoded_id, record in chunk]
            run(self._bulk, commands, len(chunk))
        if encoded_ids:
            # After the values: a tier that saw the old number looks again once they are there. A writer that dies in
            # between has not acknowledged, and will come back.
            self._bump(collection)

    def get_many(self, collection: str, passage_ids: Sequence[str]) -> list[Record | Damaged | None]:
        return self._get(self._online, collection, passage_ids)

    def delete_many(self, collection: str, passage_ids: Sequence[str]) -> int:
        keys = [self._key(collection, passage_id) for passage_id in dict.fromkeys(passage_ids)]
        num_deleted: int = sum(run(self._bulk, [("UNLINK", key) for key in keys], _HEADER_CHUNK))
        if num_deleted:
            self._bump(collection)
        return num_deleted

    def headers_many(self, collection: str, passage_ids: Sequence[str]) -> list[Header | None]:
        return self._headers(self._online, collection, passage_ids)

    def contains_many(self, collection: str, passage_ids: Sequence[str]) -> list[bytes | None]:
        # An indexing call over many ids: the longer budget.
        headers = self._headers(self._bulk, collection, passage_ids)
        return [None if header is None else header.text_digest for header in headers]

    def scan(self, collection: str) -> Iterator[tuple[str, Record | Damaged]]:
        passage_ids = self._scan_ids(collection)
        while batch := list(islice(passage_ids, _READ_CHUNK)):
            for passage_id, record in zip(batch, self._get(self._bulk, collection, batch), strict=True):
                if record is not None:
                    yield passage_id, record

    def stats(self, collection: str) -> StoreStats:
        """Counted by a scan over headers: about a second per million passages on a local server."""

        def headers() -> Iterator[Header | None]:
            passage_ids = self._scan_ids(collection)
            while batch := list(islice(passage_ids, _HEADER_CHUNK)):
                yield from self._headers(self._bulk, collection, batch)

        return sum_headers(headers())

    def generation(self, collection: str) -> int:
        value = self._online.call(lambda client, _: client.hget(self._generations, collection))
        return int(value or 0)

    def read_manifest(self, collection: str) -> Manifest | None:
        value = self._bulk.call(lambda client, _: client.hget(self._manifests, collection))
        return None if value is None else Manifest.from_json(value, collection)

    def write_manifest(self, manifest: Manifest) -> None:
        name, value = manifest.collection, manifest.to_json()
        is_alias = name in self.aliases()
        if is_alias or not self._bulk.call(lambda client, _: client.hsetnx(self._manifests, name, value)):
            raise CollectionExists(f"collection: {name!r} already exists in this store")
        self._bump(name)

    def list_collections(self) -> list[str]:
        return sorted(name.decode() for name in self._bulk.call(lambda client, _: client.hkeys(self._manifests)))

    def drop_collection(self, collection: str) -> None:
        self._require(collection)
        if users := sorted(alias for alias, name in self.aliases().items() if name == collection):
            raise CollectionInUse(f"collection: {collection!r} is in use by the aliases {users}; move them first")
        # The manifest first: nothing can be written then. What a crash leaves behind is bound to the old manifest, so a
        # new collection of this name does not take it for its own.
        self._bulk.call(lambda client, _: client.hdel(self._manifests, collection))
        self._bump(collection)
        passage_ids = self._scan_ids(collection)
        while batch := list(islice(passage_ids, _HEADER_CHUNK)):
            commands = [("UNLINK", self._key(collection, passage_id)) for passage_id in batch]
            run(self._bulk, commands, _HEADER_CHUNK)

    def aliases(self) -> dict[str, str]:
        found = self._bulk.call(lambda client, _: client.hgetall(self._aliases))
        return {alias.decode(): name.decode() for alias, name in found.items()}

    def set_alias(self, alias: str, collection: str) -> None:
        check_name("alias", alias)
        if self._bulk.call(lambda client, _: client.hexists(self._manifests, alias)):
            raise CollectionExists(f"alias: {alias!r} is the name of a collection")
        self._require(collection)
        self._bulk.call(lambda client, _: client.hset(self._aliases, alias, collection))

    def remove_alias(self, alias: str) -> bool:
        return bool(self._bulk.call(lambda client, _: client.hdel(self._aliases, alias)))

    def close(self) -> None:
        self._online.close()
        self._bulk.close()

    def _get(self, link: Link, collection: str, passage_ids: Sequence[str]) -> list[Record | Damaged | None]:
        commands = [("GET", self._key(collection, passage_id)) for passage_id in passage_ids]
        values = run(link, commands, _READ_CHUNK, chunk_bytes=_CHUNK_BYTES)
        return [_checked(*pair) for pair in zip(passage_ids, values, strict=True)]

    def _headers(self, link: Link, collection: str, passage_ids: Sequence[str]) -> list[Header | None]:
        keys = [self._key(collection, passage_id) for passage_id in passage_ids]
        commands = [("GETRANGE", key, 0, HEADER_BYTES - 1) for key in keys]
        values = run(link, commands, _HEADER_CHUNK)
        return [_header(*pair) for pair in zip(passage_ids, values, strict=True)]

    def _scan_ids(self, collection: str) -> Iterator[str]:
        """Ids of a collection, each once; SCAN itself may repeat some."""
        start = self._key_start(collection)
        seen: set[int] = set()
        nodes = self._bulk.call(lambda client, _: client.get_primaries() if self._is_cluster else [None])
        for node in nodes:
            cursor = 0
            while True:
                cursor, keys = self._bulk.call(partial(_scan_step, node=node, cursor=cursor, start=start))
                for key in keys:
                    digest = xxhash.xxh3_64_intdigest(key)
                    if digest not in seen:
                        seen.add(digest)
                        yield key[len(start) :].decode(errors="replace")
                if not cursor:
                    break

    def _key(self, collection: str, passage_id: str) -> bytes:
        return self._key_start(collection) + passage_id_bytes(passage_id)

    def _key_start(self, collection: str) -> bytes:
        # A checked name holds no ':' and no glob character, so no collection's keys match another's pattern.
        return f"{self._prefix}:p:{check_name('collection', collection)}:".encode()

    def _require(self, collection: str) -> None:
        if not self._bulk.call(lambda client, _: client.hexists(self._manifests, collection)):
            raise CollectionNotFound(f"collection: {collection!r} does not exist in this store")

    def _bump(self, collection: str) -> None:
        self._bulk.call(lambda client, _: client.hincrby(self._generations, collection, 1))


def _scan_step(client: Client, _: Deadline, *, node: Any, cursor: int, start: bytes) -> tuple[int, list[bytes]]:
    if node is not None:
        client = client.get_redis_connection(node)
    cursor, keys = client.scan(cursor, match=start + b"*", count=_SCAN_COUNT)
    return cursor, keys


def _checked(passage_id: str, value: bytes | Exception | None) -> Record | Damaged | None:
    if value is None:
        return None
    try:
        if isinstance(value, Exception):
            raise DamagedRecord(f"not a value: {value}")
        return unpack(value, passage_id)
    except DamagedRecord as exc:
        return Damaged(passage_id, str(exc))


def _header(passage_id: str, value: bytes | Exception) -> Header | None:
    if isinstance(value, Exception) or not value:
        return None
    try:
        return Header.parse(value, passage_id)
    except DamagedRecord:
        return None
