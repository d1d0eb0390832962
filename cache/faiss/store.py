"""FaissStore: the embedded store, `faiss:PATH`: a directory on a local disk, no server.

    PATH/catalogue.sqlite    passage id -> segment and rows, header, text; manifests, aliases, counters (SQLite, WAL)
    PATH/segments/*.faiss    immutable FAISS index files holding codes; a passage is a contiguous range of rows
    PATH/writer.lock         held while writing, so that there is one writer at a time; number of acknowledged commits
    PATH/writers/*           held by runs of writes, a file each, by collection: which process, since when

A write makes its segment file durable, and only then commits the rows that point at it: after a crash a segment is
committed, or an orphan that the next writer removes. Readers take no lock, and where the directory cannot be written,
any number share it. Not for writing over NFS, where file locks and SQLite's WAL do not work.

A catalogue of version 1 (no checksums, num_clipped or number of commits) is read as it lies, and upgraded by the first
write, after which software of that version rejects it; a compaction rewrites its records' headers.
"""

import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from cache.codecs import Codec
from cache.errors import CacheError, CodecError, CollectionExists, CollectionInUse, CollectionNotFound
from cache.faiss.catalogue import SUMS, CatalogueFile, WriterLeases
from cache.faiss.maintenance import TARGET_SEGMENT_BYTES, Compaction, Compactor, audit, rebuild
from cache.faiss.rows import Connection, read_records, translated, typed
from cache.faiss.segments import SegmentFiles
from cache.faiss.texts import has_text_index, ids_of_text, make_text_index
from cache.manifest import Manifest
from cache.record import Damaged, Header, Record, check_name, is_passage_id, passage_id_bytes
from cache.store import MAX_IDS_OF_TEXT, Audit, OnProgress, Store, StoreStats, aliases_of_renamed

_SCAN_PAGE_PASSAGES, _RENEWED_PASSAGES = 256, 20_000

log = logging.getLogger(__name__)


class FaissStore(Store):
    """Records in a directory; see `Store` for the contract. Nothing is made on disk before the first write."""

    max_copy_bytes = TARGET_SEGMENT_BYTES

    def __init__(self, path: str | Path, *, lock_timeout_seconds: float = 30.0, max_small_segments: int = 64) -> None:
        self.path = Path(path).expanduser().absolute()
        self._files = SegmentFiles(self.path / "segments")
        self._catalogue = CatalogueFile(self.path / "catalogue.sqlite", lock_timeout_seconds=lock_timeout_seconds)
        self._max_small_segments = max_small_segments
        # By the catalogue file that was opened so many times, and collection.
        self._numbers: dict[tuple[int, str], int] = {}
        self._codecs: dict[tuple[int, int], Codec] = {}
        self._seen_removals = 0
        self._has_written = False
        # Another process may have died before this one came, and this one may fail half way.
        self._may_have_orphans = True

    def put_many(self, storage_name: str, records: Mapping[str, Record]) -> None:
        for passage_id in records:
            passage_id_bytes(passage_id)
        self._check_exists(storage_name)
        with self._writing():
            collection_id, codec = self._require(storage_name)
            if not records:
                return
            for passage_id, record in records.items():
                if (size := record.header.code_size) != (expected := codec.code_size_bytes):
                    has = f"collection {storage_name!r} has {expected}"
                    raise CodecError(f"passage {passage_id!r}: {size} bytes per state, {has}")
            file_name, offset = self._files.write(codec, [record.codes for record in records.values()])
            with self._catalogue.writing() as connection:
                connection.insert_passages(collection_id, file_name, offset, records)
                connection.bump(storage_name)
            try:  # single-passage writes pile up segments; this one stands, whatever happens now
                Compactor(self._catalogue, self._files).merge_small(collection_id, codec, self._max_small_segments)
            except (CacheError, OSError, sqlite3.Error) as exc:
                self._may_have_orphans = True
                log.warning("store %s: small segments were not merged: %s", self.path, exc)

    def get_many(self, storage_name: str, passage_ids: Sequence[str]) -> list[Record | Damaged | None]:
        found, gone = self._read(storage_name, passage_ids)
        while gone:
            # A compaction removed the segment after the catalogue was read; the catalogue now names the new one. Files
            # are unlinked after the catalogue forgot them, so one that it still names and that is not there is lost.
            again, still_gone = self._read(storage_name, list(gone))
            lost = gone.items() & still_gone.items()
            found |= again | {id_: Damaged(id_, f"segment {file_name} is missing") for id_, file_name in lost}
            gone = dict(still_gone.items() - lost)
        return [found.get(passage_id) for passage_id in passage_ids]

    def delete_many(self, storage_name: str, passage_ids: Sequence[str]) -> int:
        if not self._catalogue.exists:
            return 0
        num_deleted = 0
        with self._writing(), self._catalogue.writing() as connection:
            if (collection_id := self._find(connection, storage_name)) is not None:
                # The codes stay in their segments until a compaction.
                query = "DELETE FROM passages WHERE collection_id = ? AND passage_id = ?"
                keys = [(collection_id, passage_id_bytes(passage_id)) for passage_id in passage_ids]
                num_deleted = connection.executemany(query, keys).rowcount if keys else 0
            if num_deleted:
                connection.bump(storage_name)
        return num_deleted

    def headers_many(self, storage_name: str, passage_ids: Sequence[str], *, bulk: bool = False) -> list[Header | None]:
        with self._catalogue.reading() as connection:
            collection_id = self._find(connection, storage_name)
            found = {} if collection_id is None else connection.headers(collection_id, passage_ids)
        return [found.get(passage_id) for passage_id in passage_ids]

    def scan(self, storage_name: str) -> Iterator[tuple[str, Record | Damaged]]:
        after = b""
        while True:
            # Short reads instead of one long one, which would keep SQLite from folding its log into the file.
            with self._catalogue.reading() as connection:
                collection_id = self._find(connection, storage_name)
                if collection_id is None:
                    return
                page, after = connection.next_passages(collection_id, after, _SCAN_PAGE_PASSAGES)
            if not page:
                return
            with translated(self.path):
                read = list(read_records(page, self._files))
            for passage_id, record in read:
                found = self.get_many(storage_name, [passage_id])[0] if isinstance(record, str) else record
                if found is not None:
                    yield passage_id, found

    def list_ids(self, storage_name: str, limit: int, after: bytes = b"") -> tuple[list[str], bytes]:
        with self._catalogue.reading() as connection:
            collection_id = self._find(connection, storage_name)
            page = [] if collection_id is None else connection.next_ids(collection_id, after, limit + 1)
        ids = (one.decode(errors="surrogateescape") for one in page[:limit])  # `verify` reports those that are no ids
        return list(filter(is_passage_id, ids)), page[limit - 1] if len(page) > limit else b""

    def ids_of_texts(
        self, storage_name: str, digests: Sequence[bytes], limit: int = MAX_IDS_OF_TEXT
    ) -> list[list[str]]:
        with self._catalogue.reading() as connection:
            collection_id = self._find(connection, storage_name)
            if collection_id is None or not has_text_index(connection):
                return [[] for _ in digests]
            return [ids_of_text(connection, collection_id, digest, limit) for digest in digests]

    def finds_texts(self, storage_name: str) -> bool:
        with self._catalogue.reading() as connection:
            return has_text_index(connection)

    def index_texts(self, storage_name: str, on_progress: OnProgress | None = None) -> None:
        """Of every collection of the catalogue, in one transaction; writers wait for it, and readers do not."""
        self._check_exists(storage_name)
        with self._writing():
            self._require(storage_name)
            with self._catalogue.writing() as connection:
                if not has_text_index(connection):
                    make_text_index(connection)

    def stats(self, storage_name: str) -> StoreStats:
        # As the triggers keep count; `audit` compares them with the rows.
        query = f"SELECT num_passages, {', '.join(SUMS)} FROM collections WHERE collection_id = ?"
        with self._catalogue.reading() as connection:
            row = connection.execute(query, (self._find(connection, storage_name),)).fetchone() or ()
            return StoreStats(*(typed(int, one) for one in row))

    def dead_bytes(self, storage_name: str) -> int:
        with self._catalogue.reading() as connection:
            if (collection_id := self._find(connection, storage_name)) is None:
                return 0
            segments = list(connection.checked("segments", "WHERE collection_id = ?", collection_id))
            query = "SELECT num_states FROM collections WHERE collection_id = ?"
            (num_live,) = connection.execute(query, (collection_id,)).fetchone()
        code_size: int = max((size for *_, size, _ in segments), default=0)  # all have the collection's
        num_rows: int = sum(number for _, _, _, number, *_ in segments)
        return max(0, num_rows - typed(int, num_live)) * code_size

    def without_waiting(self) -> AbstractContextManager[None]:
        return self._catalogue.lock.without_waiting()

    def generation(self, storage_name: str) -> int:
        with self._catalogue.reading() as connection:
            # A replaced catalogue may have come to the same number by other writes.
            return connection.generation(storage_name) + (self._catalogue.num_reopened << 40)

    def read_manifest(self, collection: str) -> Manifest | None:
        with self._catalogue.reading() as connection:
            return connection.manifest(collection)

    @contextmanager
    def lease(self, collection: str, *, shared: bool = False) -> Iterator[Callable[[], None]]:
        with translated(self.path):
            held = WriterLeases(self.path / "writers").take(check_name("collection", collection), shared=shared)
        with held:
            yield lambda: None

    def write_manifest(self, manifest: Manifest) -> Manifest:
        name = manifest.collection
        with self._writing(), self._catalogue.writing() as connection:
            if connection.find_collection(name) is not None or name in dict(connection.checked("aliases")):
                raise CollectionExists(f"collection: {name!r} already exists in this store")
            manifest = manifest.stored(connection.storage_names())
            connection.put("collections", name=name, manifest=manifest.to_json())
            connection.bump(manifest.storage_name)
        return manifest

    def list_collections(self) -> list[str]:
        with self._catalogue.reading() as connection:
            return [name for _, name in connection.checked("collections", "ORDER BY name")]

    def drop_collection(self, collection: str) -> None:
        self._check_exists(collection)
        with self._writing():
            with self._catalogue.writing() as connection:
                collection_id = connection.require_collection(collection)
                CollectionInUse.check(collection, dict(connection.checked("aliases")))
                storage_name = connection.storage_name(collection)
                query = "SELECT file_name FROM segments WHERE collection_id = ?"
                file_names = [typed(str, name) for (name,) in connection.execute(query, (collection_id,))]
                for table in ("passages", "segments", "collections"):
                    connection.execute(f"DELETE FROM {table} WHERE collection_id = ?", (collection_id,))
                connection.execute("UPDATE store SET num_removed = num_removed + 1")
                connection.bump(storage_name)
            self._files.remove(file_names)

    def rename_collection(self, collection: str, name: str, alias: str | None = None) -> list[str]:
        names = self.list_collections()
        aliases_of_renamed(collection, name, alias, names, self.aliases())  # before anything is made
        with self.lease(collection), self.lease(name), self._writing(), self._catalogue.writing() as connection:
            names = [one for _, one in connection.checked("collections")]
            aliases = aliases_of_renamed(collection, name, alias, names, dict(connection.checked("aliases")))
            connection.rename_collection(collection, name)
            for one in aliases:
                connection.put("aliases", alias=one, name=name)
        return aliases

    def aliases(self) -> dict[str, str]:
        with self._catalogue.reading() as connection:
            return dict(connection.checked("aliases"))

    def set_alias(self, alias: str, collection: str, *, shadowing: bool = False) -> None:
        check_name("alias", alias)
        self._check_exists(collection)
        with self._writing(), self._catalogue.writing() as connection:
            connection.set_alias(alias, collection, shadowing=shadowing)

    def remove_alias(self, alias: str) -> bool:
        if not self._catalogue.exists:
            return False
        with self._writing(), self._catalogue.writing() as connection:
            return connection.execute("DELETE FROM aliases WHERE alias = ?", (alias,)).rowcount > 0

    def compact(self, storage_name: str) -> Compaction:
        """Merge small segments, drop unused codes, renew headers; readers go on, and between groups other writers."""
        self._check_exists(storage_name)
        after: int | None = 0
        while after is not None:
            with self._writing():
                collection_id, _ = self._require(storage_name)
                with self._catalogue.writing() as connection:
                    after = connection.renew_headers(collection_id, after, _RENEWED_PASSAGES)
        compactor, done = Compactor(self._catalogue, self._files), None
        while done is None:
            with self._writing():
                done = compactor.step(*self._require(storage_name))
        return done

    def audit(self, collection: str) -> Audit:
        return audit(self._catalogue, self._files, collection)

    def mend(self) -> list[str]:
        """Rebuild the catalogue from its intact rows while readers go on; StoreDamaged where there are none."""
        if not self._catalogue.exists:
            return []
        with translated(self.path), self._catalogue.lock.held():
            self._has_written = True
            return rebuild(self._catalogue, self._files)

    def close(self) -> None:
        if self._has_written:
            # So that what was written can be copied, or mounted where no log can be applied.
            with suppress(CacheError):
                self._catalogue.checkpoint()
        self._files.keep_only(set())
        self._catalogue.close()

    def _read(
        self, storage_name: str, passage_ids: Sequence[str]
    ) -> tuple[dict[str, Record | Damaged], dict[str, str]]:
        found: dict[str, Record | Damaged] = {}
        gone: dict[str, str] = {}  # ids whose segment has no file, with its name
        with self._catalogue.reading() as connection:
            collection_id = self._find(connection, storage_name)
            if collection_id is None:
                return found, gone
            located = connection.find_passages(collection_id, passage_ids)
            row = connection.execute("SELECT num_removed FROM store").fetchone() or (None,)
            if (num_removals := typed(int, row[0])) != self._seen_removals:
                self._seen_removals = num_removals
                self._files.keep_only({one for (one,) in connection.execute("SELECT segment_id FROM segments")})
        with translated(self.path):
            for passage_id, record in read_records(located, self._files):
                if isinstance(record, str):
                    gone[passage_id] = record
                else:
                    found[passage_id] = record
        return found, gone

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the writer lock, on a store that exists and has no orphans."""
        with translated(self.path):
            self._files.directory.mkdir(parents=True, exist_ok=True)
            with self._catalogue.lock.held():
                self._catalogue.create()
                if self._may_have_orphans:
                    self._files.remove(self._files.orphans(self._catalogue.committed_files()))
                    self._may_have_orphans = False
                try:
                    self._has_written = True
                    yield
                except BaseException:
                    # Not removed right here: a failed COMMIT may still be found complete after a crash.
                    self._may_have_orphans = True
                    raise

    def _check_exists(self, collection: str) -> None:
        """Where there is no store there is no collection, and none is made for it."""
        if not self._catalogue.exists:
            raise CollectionNotFound(f"collection: {collection!r} does not exist in this store")

    def _require(self, storage_name: str) -> tuple[int, Codec]:
        with self._catalogue.reading() as connection:
            if (collection_id := self._find(connection, storage_name)) is None:
                raise CollectionNotFound(f"collection: {storage_name!r} does not exist in this store")
            key = self._catalogue.num_reopened, collection_id
            if key not in self._codecs:
                ((_, name),) = connection.checked("collections", "WHERE collection_id = ?", collection_id)
                manifest = connection.manifest(name)
                assert manifest is not None
                self._codecs[key] = manifest.make_codec()
        return collection_id, self._codecs[key]

    def _find(self, connection: Connection, storage_name: str) -> int | None:
        """The collection's number in the catalogue; of a storage name it stays as long as the collection does."""
        key = self._catalogue.num_reopened, storage_name
        if (known := self._numbers.get(key)) is not None and connection.has_collection(known):
            return known
        if (found := connection.find_stored(storage_name)) is not None:
            self._numbers[key] = found
        return found
