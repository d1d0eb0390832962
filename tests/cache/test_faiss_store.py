"""The embedded store alone: files as FAISS reads them, compaction beside readers, damage, full disks."""

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pytest

from cache.codecs import Codec
from cache.collection import Collection, StoredPassage
from cache.errors import (
    CacheError,
    CodecError,
    CollectionGone,
    CollectionNotFound,
    StoreDamaged,
    StoreLocked,
    StoreUnavailable,
)
from cache.faiss import maintenance
from cache.faiss.segments import SegmentFiles
from cache.faiss.store import FaissStore
from cache.record import Damaged, Record
from cache.states import PassageStates


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path, make_manifest):
    store = FaissStore(path)
    store.write_manifest(make_manifest())
    yield store
    store.close()


def segments(path: Path) -> list[Path]:
    return sorted((path / "segments").iterdir())


def test_nothing_is_made_before_the_first_write(path, make_manifest):
    store = FaissStore(path)
    assert store.list_collections() == []
    assert store.get_many("passages", ["a"]) == [None]
    assert store.delete_many("passages", ["a"]) == 0
    assert not path.exists()
    store.write_manifest(make_manifest())
    assert store.list_collections() == ["passages"]
    store.close()


def test_a_segment_is_a_faiss_index_and_what_is_read_of_it_is_memory(store, path, make_record, same):
    records = {f"p{i}": make_record(i, num_states=5) for i in range(10)}
    store.put_many("passages", records)
    (segment,) = segments(path)
    index = faiss.read_index(str(segment), faiss.IO_FLAG_MMAP_IFC)
    expected = Codec("SQfp16", 8).decode(np.concatenate([record.codes for record in records.values()]))
    assert np.array_equal(index.reconstruct_n(0, index.ntotal), expected)
    held = store.get_many("passages", list(records))
    assert np.shares_memory(held[3].codes.base, held[4].codes.base)  # neighbours come in one read
    os.truncate(segment, 0)
    assert all(map(same, held, records.values()))  # and none of it lies in the file, whatever becomes of that


@pytest.mark.parametrize("factory", ["Flat", "SQbf16", "SQ8", "SQ6", "SQ4", "B4,SQ8", "Z,B8,SQ4", "PQ4x4", "RQ2x4"])
def test_segments_of_every_codec_are_faiss_indexes(path, make_manifest, make_record, factory):
    codec = Codec(factory, 8)
    states = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    codec.train(states)
    store = FaissStore(path)
    store.write_manifest(make_manifest(codec=factory, codec_table=codec.table()))
    codes = codec.encode(states)
    values = {"compression_ratio": 4, "truncated": False, "text_digest": bytes(32), "binding": 0}
    store.put_many("passages", {"p": Record.build(codes, window_tokens=(256,), **values)})
    (found,) = store.get_many("passages", ["p"])
    assert np.array_equal(found.codes, codes)
    written = Codec.from_table(factory, 8, codec.table()).new_index()
    written.add_sa_codes(codes)
    assert segments(path)[0].read_bytes() == faiss.serialize_index(written).tobytes()
    index = faiss.read_index(str(segments(path)[0]), faiss.IO_FLAG_MMAP_IFC)
    # FAISS does not know our scalings: it reads their codes as plain bytes.
    expected = codes if "B" in factory else codec.decode(codes)
    assert np.array_equal(index.reconstruct_n(0, 64), expected)
    store.close()


def test_codes_of_another_codec_are_refused(store, make_manifest, make_record):
    store.write_manifest(make_manifest("flat", codec="Flat"))
    with pytest.raises(CodecError, match="'p': 16 bytes per state, collection 'flat' has 32"):
        store.put_many("flat", {"p": make_record()})


def test_compaction_drops_what_nobody_points_at(store, path, make_record, same):
    records = {f"p{i}": make_record(i) for i in range(30)}
    for passage_id, record in records.items():
        store.put_many("passages", {passage_id: record})
    store.put_many("passages", {"p1": records["p2"]})
    store.delete_many("passages", [f"p{i}" for i in range(10, 30)])
    seen = store.generation("passages")
    report = store.compact("passages")
    # 31 segments of 3 states of 16 bytes; 20 deleted passages and one replaced
    assert report == maintenance.Compaction(31, 1, 21 * 3 * 16)
    assert len(segments(path)) == 1
    assert store.generation("passages") == seen  # nothing a reader could tell
    expected = [records["p0"], records["p2"], *(records[f"p{i}"] for i in range(2, 10))]
    assert all(map(same, store.get_many("passages", [f"p{i}" for i in range(10)]), expected))
    assert store.compact("passages") == maintenance.Compaction(1, 1, 0)
    store.delete_many("passages", [f"p{i}" for i in range(10)])
    assert store.compact("passages").num_segments_after == 0
    assert segments(path) == []


def test_a_write_without_waiting_raises_where_another_writer_is(store, path, make_record):
    other = FaissStore(path)
    with other._catalogue.lock.held():
        for write in (
            lambda: store.put_many("passages", {"a": make_record(1)}),
            lambda: store.compact("passages"),
        ):
            start = time.monotonic()
            with store.without_waiting(), pytest.raises(StoreLocked, match="for more than 0 s"):
                write()
            assert time.monotonic() - start < 1  # it waits for 30 seconds otherwise
    store.put_many("passages", {"a": make_record(1)})
    other.close()


def test_readers_keep_what_they_hold_over_a_compaction(store, path, make_record, same):
    reader = FaissStore(path)
    records = {f"p{i}": make_record(i) for i in range(4)}
    for passage_id, record in records.items():
        store.put_many("passages", {passage_id: record})
    held = reader.get_many("passages", list(records))
    scan = reader.scan("passages")  # its catalogue rows are read, its segments not yet opened
    first_id, first = next(scan)
    store.compact("passages")
    assert all(map(same, held, records.values()))  # what was read outlives its file
    rest = {first_id: first} | dict(scan)
    assert rest.keys() == records.keys()
    assert all(same(rest[passage_id], record) for passage_id, record in records.items())
    reader.get_many("passages", ["p0"])
    assert len(reader._files._files) == 1  # removed files are closed, and their disk space comes back
    reader.close()


def test_small_segments_are_merged_by_themselves(path, make_manifest, make_record, same):
    store = FaissStore(path, max_small_segments=8)
    store.write_manifest(make_manifest())
    records = {f"p{i}": make_record(i) for i in range(50)}
    for passage_id, record in records.items():
        store.put_many("passages", {passage_id: record})
        assert len(segments(path)) < 8
    assert all(map(same, store.get_many("passages", list(records)), records.values()))
    store.close()


def test_compaction_works_in_bounded_pieces(path, make_manifest, make_record, same, monkeypatch):
    monkeypatch.setattr(maintenance, "TARGET_SEGMENT_BYTES", 480)  # ten passages of 48 bytes
    store = FaissStore(path)
    store.write_manifest(make_manifest())
    records = {f"p{i}": make_record(i) for i in range(35)}
    for passage_id, record in records.items():
        store.put_many("passages", {passage_id: record})
    assert store.compact("passages") == maintenance.Compaction(35, 4, 0)
    assert all(map(same, store.get_many("passages", list(records)), records.values()))
    store.close()


def test_a_missing_segment_costs_its_passages_alone(store, path, make_record, same):
    records = {f"p{i}": make_record(i) for i in range(4)}
    for passage_id, record in records.items():
        store.put_many("passages", {passage_id: record})
    connection = sqlite3.connect(path / "catalogue.sqlite")
    query = "SELECT file_name FROM segments JOIN passages USING (segment_id) WHERE passage_id = ?"
    (file_name,) = connection.execute(query, (b"p2",)).fetchone()
    connection.close()
    (path / "segments" / file_name).unlink()
    for _ in range(2):
        reader = FaissStore(path)
        found = reader.get_many("passages", list(records))
        assert found[2] == Damaged("p2", f"segment {file_name} is missing")
        assert all(same(found[i], records[f"p{i}"]) for i in (0, 1, 3))
        reader.close()
        store.compact("passages")  # which neither fails nor forgets it


def test_a_segment_cut_short_under_an_open_file_does_not_kill_the_reader(store, path, make_record, same):
    records = {f"p{i}": make_record(i, num_states=400) for i in range(4)}
    store.put_many("passages", records)
    assert same(store.get_many("passages", ["p3"])[0], records["p3"])
    (segment,) = segments(path)
    os.truncate(segment, segment.stat().st_size - 400 * 16 * 2)
    found = store.get_many("passages", list(records))
    assert same(found[0], records["p0"])
    assert same(found[1], records["p1"])
    assert all(isinstance(entry, Damaged) and "too short" in entry.reason for entry in found[2:])
    os.truncate(segment, 0)
    assert isinstance(store.get_many("passages", ["p0"])[0], Damaged)


def test_memory_is_given_out_again_only_when_nothing_refers_to_it(path):
    memory = SegmentFiles(path, max_kept_bytes=400, block_bytes=100).memory
    held = [memory.take(30) for _ in range(12)]  # four blocks, all that is kept
    for i, one in enumerate(held):
        one[:] = i
    assert all((one == i).all() for i, one in enumerate(held))
    view = memoryview(held[0])[:5]  # keeps the first block, and nothing else does any longer
    addresses = {one.ctypes.data for one in held[3:]}
    expected = bytes(view)
    del held, one
    again = [memory.take(30) for _ in range(9)]
    assert {one.ctypes.data for one in again} == addresses
    large = memory.take(1000)  # more than a block, and more than is kept
    for one in (*again, large):
        one[:] = 255
    assert bytes(view) == expected
    assert memory._num_bytes == 400


def test_a_damaged_faiss_header_harms_nobody(store, path, make_record, same):
    store.put_many("passages", {"p": make_record(1)})
    (segment,) = segments(path)
    with segment.open("r+b") as file:
        file.write(b"\xff" * 24)
    reader = FaissStore(path)
    assert same(reader.get_many("passages", ["p"])[0], make_record(1))
    reader.close()


def test_another_catalogue_version_is_refused(store, path):
    connection = sqlite3.connect(path / "catalogue.sqlite")
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(StoreDamaged, match="version 9 is unknown, expected 1"):
        FaissStore(path).list_collections()


def test_a_catalogue_that_is_none_is_refused(path):
    path.mkdir()
    (path / "catalogue.sqlite").write_bytes(b"not a database at all" * 400)
    with pytest.raises(StoreDamaged, match="is not a catalogue"):
        FaissStore(path).list_collections()


def test_the_text_of_an_exception_stays_inside(path, make_manifest):
    store = FaissStore(path)
    store.write_manifest(make_manifest())
    store.close()
    content = (path / "catalogue.sqlite").read_bytes()
    for damaged in (b"\xff" * len(content), content[:4096] + b"\xff" * (len(content) - 4096), content[:5000]):
        (path / "catalogue.sqlite").write_bytes(damaged)
        with pytest.raises(CacheError) as raised:
            FaissStore(path).list_collections()
        causes = []
        cause = raised.value.__cause__
        while cause is not None:
            causes, cause = [*causes, cause], cause.__cause__
        foreign = [str(cause) for cause in causes if not isinstance(cause, CacheError)]
        assert not [text for text in foreign if text in str(raised.value)]


def test_a_path_that_is_a_file_is_refused(path, make_manifest):
    path.write_text("a file")
    with pytest.raises(CacheError, match=str(path)):
        FaissStore(path).write_manifest(make_manifest())


def in_process(*arguments: object) -> str:
    """What processes.py says about a write in a process with fewer rights or less room."""
    command = [sys.executable, str(Path(__file__).with_name("processes.py")), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_full_disk_is_told_and_leaves_what_was_there(store, path, make_record, same):
    store.put_many("passages", {"before": make_record(1)})
    seen = segments(path)
    assert in_process("limited", path, 100_000).startswith("StoreFull store ")
    assert segments(path) == seen
    assert same(store.get_many("passages", ["before"])[0], make_record(1))
    assert store.stats("passages").num_passages == 1
    store.put_many("passages", {"after": make_record(2)})


def test_missing_permissions_are_told(store, path, make_record):
    store.put_many("passages", {"a": make_record(1)})
    for directory in (path, path / "segments"):
        directory.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert in_process("unprivileged", path, 0).startswith("StoreAccessDenied store ")
    finally:
        for directory in (path, path / "segments"):
            directory.chmod(stat.S_IRWXU)


def test_a_store_that_was_removed_is_not_made_again_for_its_collection(store, path, make_manifest, make_record):
    collection = Collection(store, store.read_manifest("passages"))
    store.put_many("passages", {"a": make_record(1)})
    shutil.rmtree(path)
    passage = StoredPassage("p", PassageStates(np.ones((1, 8), np.float32), (4,), 4, False, bytes(32)))
    with pytest.raises(CollectionGone, match="'passages' is gone"):
        collection.put_many([passage])
    for change in (store.compact, store.drop_collection, partial(store.set_alias, "live")):
        with pytest.raises(CollectionNotFound):
            change("passages")
    assert not path.exists()
    store.write_manifest(make_manifest())
    collection.put_many([passage])


def test_a_store_that_is_removed_while_it_is_written_acknowledges_nothing(store, path, make_record, monkeypatch):
    write = SegmentFiles.write

    def removed_after(files, codec, codes):
        written = write(files, codec, codes)
        shutil.rmtree(path)
        return written

    monkeypatch.setattr(SegmentFiles, "write", removed_after)
    with pytest.raises(StoreUnavailable, match="was removed"):
        store.put_many("passages", {"a": make_record(1)})
