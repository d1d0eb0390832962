"""Damage of an embedded store beside its codes: told, bounded to what it hits, and mended; and stores of version 1."""

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reliability import damage
from cache.collection import Collection, Manifest
from cache.errors import StoreDamaged
from cache.faiss.segments import SegmentFiles
from cache.faiss.store import FaissStore
from cache.record import Damaged, Header, Record
from cache.store import Audit


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path, make_manifest, make_record):
    store = FaissStore(path)
    store.write_manifest(make_manifest())
    store.put_many("passages", {f"p{i:03}": make_record(i, text=f"text {i}" * 9) for i in range(200)})
    store.put_many("passages", {f"q{i}": make_record(300 + i) for i in range(5)})
    store.set_alias("live", "passages")
    yield store
    store.close()


def change(path: Path, statement: str, *values: object) -> None:
    """Change the catalogue behind the store's back; its log is folded in first, and again."""
    with closing(sqlite3.connect(path / "catalogue.sqlite", isolation_level=None)) as connection:
        assert connection.execute(statement, values).rowcount > 0
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def verified(path: Path) -> tuple[Audit, set[str]]:
    """What a store opened afresh finds: its audit, and the ids of damaged passages."""
    with closing(FaissStore(path)) as store:
        whole = Collection.open(store, "passages")
        return store.audit("passages"), {passage_id for passage_id, one in store.scan(whole.name) if damaged(one)}


def damaged(one: object) -> bool:
    return isinstance(one, Damaged)


def test_no_flipped_byte_is_silent():
    *rows, total = damage.run(160, 5)
    assert total["flips"] == 160
    assert (total["silent"], total["crashed"]) == (0, 0), rows
    assert min(row["flips"] for row in rows) >= 10  # every kind of file had its share
    assert total["read"] > 20
    assert total["verify"] > 10


def test_a_whole_store_has_no_problems(store, path):
    assert store.audit("passages") == Audit()
    assert verified(path) == (Audit(), set())


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE passages SET first_row = -1 WHERE passage_id = CAST('p007' AS BLOB)",
        "UPDATE passages SET first_row = 1 << 62 WHERE passage_id = CAST('p007' AS BLOB)",
        "UPDATE passages SET first_row = first_row + 1 WHERE passage_id = CAST('p007' AS BLOB)",
        "UPDATE passages SET first_row = 'x' WHERE passage_id = CAST('p007' AS BLOB)",
        "UPDATE passages SET header = NULL || 'x', text = 3.5 WHERE passage_id = CAST('p007' AS BLOB)",
        "UPDATE passages SET segment_id = segment_id + 1 WHERE passage_id = CAST('p007' AS BLOB)",
        "UPDATE passages SET segment_id = 99 WHERE passage_id = CAST('p007' AS BLOB)",
        "UPDATE passages SET num_states = num_states + 1 WHERE passage_id = CAST('p007' AS BLOB)",
        "UPDATE passages SET num_clipped = 1 WHERE passage_id = CAST('p007' AS BLOB)",
        "UPDATE passages SET text = CAST('another text' AS BLOB) WHERE passage_id = CAST('p007' AS BLOB)",
    ],
)
def test_a_damaged_row_costs_its_passage_alone(store, path, make_record, same, statement):
    if "NULL" in statement:
        statement = "UPDATE passages SET text = 3.5 WHERE passage_id = CAST('p007' AS BLOB)"
    change(path, statement)
    found = store.get_many("passages", ["p006", "p007", "p008"])
    assert [damaged(one) for one in found] == [False, True, False]
    assert same(found[0], make_record(6, text="text 6" * 9))
    assert verified(path)[1] == {"p007"}
    store.delete_many("passages", ["p007"])  # as `verify --remove-damaged` does
    assert verified(path)[1] == set()
    assert store.stats("passages").num_passages == 204


def test_rows_that_changed_their_ids_are_not_taken_for_each_other(store, path):
    for old, new in (("p001", "other"), ("p002", "p001"), ("other", "p002")):
        change(path, "UPDATE passages SET passage_id = ? WHERE passage_id = ?", new.encode(), old.encode())
    found = store.get_many("passages", ["p000", "p001", "p002", "p003"])
    assert [damaged(one) for one in found] == [False, True, True, False]
    assert "another passage's" in found[1].reason
    assert store.headers_many("passages", ["p001"]) == [None]
    assert verified(path)[1] == {"p001", "p002"}


@pytest.mark.parametrize(
    ("statement", "read"),
    [
        ("UPDATE aliases SET name = 'passagez'", lambda store: store.aliases()),
        ("UPDATE aliases SET alias = 'lives'", lambda store: store.aliases()),
        ("UPDATE aliases SET name = X'ff'", lambda store: store.aliases()),
        ("UPDATE generations SET generation = generation + 1", lambda store: store.generation("passages")),
        ("UPDATE generations SET generation = 'many'", lambda store: store.generation("passages")),
        ("UPDATE collections SET collection_id = 7", lambda store: store.get_many("passages", ["p001"])),
        ("UPDATE collections SET name = 'passagez'", lambda store: store.list_collections()),
        ("UPDATE collections SET manifest = replace(manifest, 'SQfp16', 'SQbf16')",
         lambda store: store.read_manifest("passages")),
        ("UPDATE collections SET manifest = NULL || 1", None),
        ("UPDATE store SET num_commits = 'x'", None),
        ("DELETE FROM generations", None),
        ("UPDATE passages SET passage_id = 'p007' WHERE passage_id = CAST('p007' AS BLOB)", None),
        ("UPDATE passages SET passage_id = 7 WHERE passage_id = CAST('p007' AS BLOB)", None),
        ("UPDATE passages SET passage_id = x'' WHERE passage_id = CAST('p007' AS BLOB)", None),
    ],
)  # fmt: skip
def test_a_damaged_row_without_a_record_is_one_clear_error(store, path, statement, read):
    if "NULL" in statement:
        statement, read = "UPDATE collections SET manifest = 7", lambda store: store.read_manifest("passages")
    change(path, statement)
    if read is not None:
        with pytest.raises(StoreDamaged, match=r"store .*preread verify"):
            read(store)
    assert store.audit("passages").problems


def test_counts_are_compared_with_the_rows(store, path):
    change(path, "UPDATE collections SET num_passages = num_passages - 1, num_tokens = num_tokens + 5")
    there = sum(record.header.num_tokens for _, record in store.scan("passages"))
    assert store.audit("passages").problems == (
        "num_passages of collection 'passages' is 204, its rows have 205",
        f"num_tokens of collection 'passages' is {there + 5}, its rows have {there}",
    )
    assert store.mend() == []
    assert store.audit("passages") == Audit()
    assert store.stats("passages").num_passages == 205


def pages(path: Path, name: str) -> list[int]:
    """Numbers of the leaf pages of a table or index that hold its first and last entries."""
    with closing(sqlite3.connect(path / "catalogue.sqlite")) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content = (path / "catalogue.sqlite").read_bytes()
    page = content[(root - 1) * size : root * size]
    assert page[0] in (2, 5), "the tree has one page only"
    count = int.from_bytes(page[3:5], "big")
    cells = [int.from_bytes(page[12 + 2 * i : 14 + 2 * i], "big") for i in range(count)]
    return [int.from_bytes(page[cell : cell + 4], "big") for cell in cells]


@pytest.mark.parametrize("name", ["passages", "sqlite_autoindex_passages_1"])
def test_a_damaged_page_is_told_and_the_rest_is_kept(store, path, make_record, same, name):
    store.put_many("passages", {f"r{i}" + "-" * 100: make_record(i) for i in range(100)})  # an index of several pages
    expected = dict(store.scan("passages"))
    store.close()
    page = pages(path, name)[1]
    with (path / "catalogue.sqlite").open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    with closing(FaissStore(path)) as reader:
        assert any("catalogue" in problem for problem in reader.audit("passages").problems)
        with pytest.raises(StoreDamaged):
            list(reader.scan("passages"))
        left = reader.mend()
        assert bool(left) == (name == "passages")
        kept = dict(reader.scan("passages"))
        assert len(kept) == reader.stats("passages").num_passages
        assert len(kept) == 305 if name != "passages" else 200 < len(kept) < 305
        assert all(same(record, expected[passage_id]) for passage_id, record in kept.items())
        assert reader.audit("passages") == Audit()
        assert reader.aliases() == {"live": "passages"}
        reader.put_many("passages", {"after": make_record(1)})
    assert verified(path) == (Audit(), set())


def test_an_index_that_runs_in_a_circle_ends(store, path, make_record):
    store.put_many("passages", {f"r{i}" + "-" * 100: make_record(i) for i in range(100)})
    store.close()
    leaf, other = pages(path, "sqlite_autoindex_passages_1")[:2]
    content = bytearray((path / "catalogue.sqlite").read_bytes())
    content[(other - 1) * 4096 : other * 4096] = content[(leaf - 1) * 4096 : leaf * 4096]
    (path / "catalogue.sqlite").write_bytes(content)
    with closing(FaissStore(path)) as reader:
        with pytest.raises(StoreDamaged, match="out of order"):
            list(reader.scan("passages"))
        assert reader.audit("passages").problems


def test_commits_that_a_damaged_log_lost_are_missed(store, path, tmp_path, make_record):
    store.put_many("passages", {"last": make_record(1)})
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)  # as a writer that was killed leaves it
    assert verified(copy) == (Audit(), set())
    shutil.rmtree(copy)
    shutil.copytree(path, copy)
    log = copy / "catalogue.sqlite-wal"
    content = bytearray(log.read_bytes())
    content[-100] ^= 1  # in the last commit
    log.write_bytes(content)
    audit, _ = verified(copy)
    assert audit.problems == (f"the last 1 of {5} commits are lost",)
    with closing(FaissStore(copy)) as again:
        with pytest.raises(StoreDamaged, match="commits are lost"):
            again.put_many("passages", {"more": make_record(2)})  # which would cover the loss, and remove its codes
        assert again.mend() == []
        again.put_many("passages", {"more": make_record(2)})
    assert verified(copy) == (Audit(), set())


def test_a_store_without_its_catalogue_is_not_taken_for_a_new_one(store, path, make_manifest):
    store.close()
    segments = sorted((path / "segments").iterdir())
    (path / "catalogue.sqlite").unlink()
    for again in (FaissStore(path), store):
        with pytest.raises(StoreDamaged, match="is missing"):
            again.get_many("passages", ["p001"])
        with pytest.raises(StoreDamaged, match="is missing"):
            again.write_manifest(make_manifest())
    assert sorted((path / "segments").iterdir()) == segments
    (path / "catalogue.sqlite").touch()
    with pytest.raises(StoreDamaged, match="version 0 is unknown"):
        FaissStore(path).list_collections()


def test_swapped_and_copied_segments_are_not_taken_for_each_other(store, path):
    first, second = sorted((path / "segments").iterdir(), key=lambda one: one.stat().st_size)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    _, found = verified(path)
    assert len(found) == 205
    (path / "segments" / "copy.faiss").write_bytes(content)
    assert verified(path)[0].orphans == ("copy.faiss",)


def test_a_replaced_catalogue_is_noticed(store, path, tmp_path, make_manifest, make_record, same):
    with closing(FaissStore(path)) as reader, closing(FaissStore(tmp_path / "other")) as other:
        seen = reader.generation("passages")
        other.write_manifest(make_manifest())
        other.put_many("passages", {"p001": make_record(77)})
        other.put_many("passages", {"p002": make_record(78)})
        assert other.generation("passages") == seen  # by other writes
        assert reader.get_many("passages", ["p001"]) != [None]
        for writer in (store, other):
            writer.close()
        shutil.copytree(tmp_path / "other" / "segments", path / "segments", dirs_exist_ok=True)
        os.rename(tmp_path / "other" / "catalogue.sqlite", path / "catalogue.sqlite")
        assert same(reader.get_many("passages", ["p001"])[0], make_record(77))
        assert reader.generation("passages") != seen


def test_a_catalogue_that_is_overwritten_in_place_is_noticed(store, path, tmp_path, make_manifest, make_record, same):
    with closing(FaissStore(path)) as reader, closing(FaissStore(tmp_path / "other")) as other:
        other.write_manifest(make_manifest())
        other.put_many("passages", {f"p{i:03}": make_record(500 + i) for i in range(200)})
        assert reader.get_many("passages", ["p001", "q1"]) != [None, None]
        for writer in (store, other):
            writer.close()
        for name in (
            "catalogue.sqlite",
            *(f"segments/{one.name}" for one in (tmp_path / "other" / "segments").iterdir()),
        ):
            shutil.copyfile(tmp_path / "other" / name, path / name)  # as cp does
        found = reader.get_many("passages", [f"p{i:03}" for i in range(200)])
        assert all(same(one, make_record(500 + i)) for i, one in enumerate(found))
        assert reader.get_many("passages", ["q1"]) == [None]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path), Path.touch])
def test_what_is_no_segment_in_a_segments_place_is_damage_until_mended(store, path, make):
    segment = max((path / "segments").iterdir(), key=lambda one: one.stat().st_size)
    segment.unlink()
    make(segment)
    with closing(FaissStore(path)) as reader:
        found = reader.get_many("passages", ["p001", "q1"])
        assert [damaged(one) for one in found] == [True, False]
        gone = [passage_id for passage_id, one in reader.scan("passages") if damaged(one)]
        assert reader.delete_many("passages", gone) == 200
    assert verified(path) == (Audit(), set())


@pytest.mark.parametrize("statement", ["DROP TRIGGER passages_added", "DROP INDEX passages_by_segment"])
def test_a_catalogue_of_another_schema_is_refused_and_mended(store, path, statement):
    store.close()
    with closing(sqlite3.connect(path / "catalogue.sqlite")) as connection:
        connection.execute(statement)
    with closing(FaissStore(path)) as reader:
        with pytest.raises(StoreDamaged, match="schema"):
            reader.get_many("passages", ["p001"])
        assert reader.mend() == []
    assert verified(path) == (Audit(), set())


@pytest.mark.parametrize("statement", ["UPDATE collections SET collection_id = 7", "DELETE FROM collections"])
def test_mending_keeps_the_codes_where_no_collection_can_be_read(store, path, statement):
    segments = set((path / "segments").iterdir())
    change(path, statement)
    with closing(FaissStore(path)) as mender, pytest.raises(StoreDamaged, match="nothing was changed"):
        mender.mend()
    assert set((path / "segments").iterdir()) == segments


# Version 1: what the software before wrote.

_SCHEMA_1 = """
CREATE TABLE collections (
    collection_id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    manifest BLOB NOT NULL,
    num_passages INTEGER NOT NULL DEFAULT 0,
    num_states INTEGER NOT NULL DEFAULT 0,
    num_tokens INTEGER NOT NULL DEFAULT 0,
    num_truncated INTEGER NOT NULL DEFAULT 0,
    size_bytes INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE aliases (alias TEXT PRIMARY KEY, name TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE generations (name TEXT PRIMARY KEY, generation INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE removals (num_removed INTEGER NOT NULL);
INSERT INTO removals VALUES (0);
CREATE TABLE segments (
    segment_id INTEGER PRIMARY KEY AUTOINCREMENT,
    collection_id INTEGER NOT NULL,
    file_name TEXT NOT NULL UNIQUE,
    num_rows INTEGER NOT NULL,
    code_size INTEGER NOT NULL,
    codes_offset INTEGER NOT NULL
);
CREATE INDEX segments_by_collection ON segments (collection_id);
CREATE TABLE passages (
    row_key INTEGER PRIMARY KEY,
    collection_id INTEGER NOT NULL,
    passage_id BLOB NOT NULL,
    segment_id INTEGER NOT NULL,
    first_row INTEGER NOT NULL,
    num_states INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    truncated INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    header BLOB NOT NULL,
    windows BLOB NOT NULL,
    text BLOB NOT NULL,
    UNIQUE (collection_id, passage_id)
);
CREATE INDEX passages_by_segment ON passages (segment_id);
CREATE TRIGGER passages_added AFTER INSERT ON passages BEGIN
    UPDATE collections SET num_passages = num_passages + 1, num_states = num_states + NEW.num_states,
        num_tokens = num_tokens + NEW.num_tokens, num_truncated = num_truncated + NEW.truncated,
        size_bytes = size_bytes + NEW.size_bytes WHERE collection_id = NEW.collection_id;
END;
CREATE TRIGGER passages_removed AFTER DELETE ON passages BEGIN
    UPDATE collections SET num_passages = num_passages - 1, num_states = num_states - OLD.num_states,
        num_tokens = num_tokens - OLD.num_tokens, num_truncated = num_truncated - OLD.truncated,
        size_bytes = size_bytes - OLD.size_bytes WHERE collection_id = OLD.collection_id;
END;
CREATE TRIGGER passages_replaced AFTER UPDATE OF num_states, num_tokens, truncated, size_bytes ON passages BEGIN
    UPDATE collections SET num_states = num_states + NEW.num_states - OLD.num_states,
        num_tokens = num_tokens + NEW.num_tokens - OLD.num_tokens,
        num_truncated = num_truncated + NEW.truncated - OLD.truncated,
        size_bytes = size_bytes + NEW.size_bytes - OLD.size_bytes WHERE collection_id = NEW.collection_id;
END;
"""


def make_version_1(path: Path, manifest: Manifest, records: dict[str, Record]) -> None:
    (path / "segments").mkdir(parents=True)
    codes = np.concatenate([record.codes for record in records.values()])
    file_name, offset = SegmentFiles(path / "segments").write(manifest.make_codec(), [codes])
    with closing(sqlite3.connect(path / "catalogue.sqlite", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA_1 + "PRAGMA user_version = 1;")
        query = "INSERT INTO collections (name, manifest) VALUES (?, ?)"
        connection.execute(query, (manifest.collection, manifest.to_json()))
        connection.execute("INSERT INTO aliases VALUES ('live', ?)", (manifest.collection,))
        connection.execute("INSERT INTO generations VALUES (?, 5)", (manifest.collection,))
        columns = (1, file_name, codes.shape[0], codes.shape[1], offset)
        connection.execute(
            "INSERT INTO segments (collection_id, file_name, num_rows, code_size, codes_offset) VALUES (?, ?, ?, ?, ?)",
            columns,
        )
        first_row = 0
        for passage_id, record in records.items():
            header = record.header
            assert header.version == 1
            connection.execute(
                "INSERT INTO passages (collection_id, passage_id, segment_id, first_row, num_states, num_tokens, "
                "truncated, size_bytes, header, windows, text) VALUES (1, ?, 1, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    passage_id.encode(), first_row, header.num_states, header.num_tokens, header.truncated,
                    header.total_bytes, header.pack(passage_id), record.payload[0],
                    (record.text or "").encode(),
                ),
            )  # fmt: skip
            first_row += header.num_states


@pytest.fixture
def old(path, make_manifest):
    """A store of version 1 with two passages; returns their records."""
    manifest = make_manifest(version=1)
    rng = np.random.default_rng(3)
    records = {
        passage_id: Record.build(
            rng.integers(0, 256, (2, 16), dtype=np.uint8), window_tokens=(7,), compression_ratio=4, truncated=True,
            text_digest=bytes(32), binding=manifest.binding, text=passage_id, version=1,
        )
        for passage_id in ("a", "b")
    }  # fmt: skip
    make_version_1(path, manifest, records)
    return records


def swap_ids(path: Path) -> None:
    for old, new in ((b"a", b"c"), (b"b", b"a"), (b"c", b"b")):
        change(path, "UPDATE passages SET passage_id = ? WHERE passage_id = ?", new, old)


def test_version_1_is_read_as_it_lies_and_brought_up_by_the_first_write(path, old, make_record, same):
    with closing(FaissStore(path)) as reader, closing(FaissStore(path)) as writer:
        before = (path / "catalogue.sqlite").read_bytes()
        assert all(map(same, reader.get_many("passages", ["a", "b"]), old.values()))
        assert reader.stats("passages").num_passages == 2
        assert (reader.aliases(), reader.generation("passages")) == ({"live": "passages"}, 5)
        assert reader.audit("passages") == Audit()
        assert (path / "catalogue.sqlite").read_bytes() == before
        writer.put_many("passages", {"c": make_record(1)})
        assert all(map(same, reader.get_many("passages", ["a", "b"]), old.values()))
        assert reader.get_many("passages", ["c"])[0].header.version == 2
        assert reader.stats("passages").num_passages == 3
        assert verified(path) == (Audit(), set())


def test_a_collection_of_version_1_is_renamed_by_the_first_write(path, old):
    with closing(FaissStore(path)) as reader, closing(FaissStore(path)) as writer:
        opened = Collection.open(reader, "live")
        assert opened.get_texts(["a", "b"]) == ["a", "b"]
        assert writer.rename_collection("passages", "renamed", "passages") == ["live", "passages"]
        for collection in (opened, Collection.open(reader, "passages"), Collection.open(writer, "live")):
            assert collection.digests(["a", "b"]) == [bytes(32)] * 2
            assert not [damage for _, _, damage in collection.verify() if damage]
        assert writer.generation(opened.storage_name) == 5
        assert writer.audit("renamed") == Audit()


def test_compaction_writes_records_of_version_1_again(path, old):
    with closing(FaissStore(path)) as store:
        store.compact("passages")
        for passage_id, found in zip(old, store.get_many("passages", list(old)), strict=True):
            assert found.header == old[passage_id].header.latest()
            assert np.array_equal(found.codes, old[passage_id].codes)
        stats = store.stats("passages")
        assert stats.size_bytes == sum(record.header.latest().total_bytes for record in old.values())
        assert verified(path) == (Audit(), set())
        swap_ids(path)
        assert all(map(damaged, store.get_many("passages", ["a", "b"])))


def test_an_id_of_version_1_that_is_no_text_is_damage(path, old):
    change(path, "UPDATE passages SET passage_id = X'61ff' WHERE passage_id = X'61'")
    assert verified(path)[1] == {"a\ufffd"}


def test_what_version_1_cannot_tell(path, old):
    swap_ids(path)  # which is why it is rewritten
    with closing(FaissStore(path)) as store:
        assert not any(map(damaged, store.get_many("passages", ["a", "b"])))
        assert Header.parse(old["a"].header.pack("a"), "b").version == 1
