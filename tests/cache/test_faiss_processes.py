"""The embedded store under several processes: writers killed at random moments, readers beside a writer."""

import importlib.util
import json
import os
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.reliability import kills
from cache.errors import StoreLocked
from cache.faiss.store import FaissStore
from cache.store import Audit

SCRIPT = Path(__file__).with_name("processes.py")
spec = importlib.util.spec_from_file_location("cache_test_processes", SCRIPT)
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)

NUM_KILLS = 120


def run(*arguments: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def committed_files(path: Path) -> set[str]:
    connection = sqlite3.connect(path / "catalogue.sqlite")
    names = {name for (name,) in connection.execute("SELECT file_name FROM segments")}
    connection.close()
    return names


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_loses_nothing_it_acknowledged():
    (counts,) = kills.run(NUM_KILLS, 7)
    assert (counts["kills"], counts["lost"], counts["half"], counts["damaged"]) == (NUM_KILLS, 0, 0, 0)
    # Most kills must have hit a write, or the test has shown nothing.
    assert counts["unfinished"] > NUM_KILLS // 4
    assert counts["orphans"] > 0


def test_orphans_of_a_killed_writer_are_removed_by_the_next(tmp_path):
    path = tmp_path / "store"
    with closing(FaissStore(path)) as store:
        store.write_manifest(processes.manifest())
        store.put_many("passages", {"a": processes.record(1)})
        for name in ("orphan.faiss", "half.faiss.tmp"):
            (path / "segments" / name).write_bytes(b"codes of a write that was cut off")
        assert store.audit("passages") == Audit(orphans=("half.faiss.tmp", "orphan.faiss"))
    with closing(FaissStore(path)) as fresh:
        fresh.put_many("passages", {"b": processes.record(2)})
        assert {file.name for file in (path / "segments").iterdir()} == committed_files(path)
        assert fresh.audit("passages") == Audit()


@pytest.mark.slow
def test_a_writer_killed_while_it_makes_the_store_leaves_one_that_can_be_used(tmp_path):
    rng = random.Random(3)
    num_made = 0
    writers = kills.Writers(tmp_path / "log")
    for attempt in range(30):
        writers.kill_one(attempt, tmp_path / f"store{attempt}", after_seconds=rng.uniform(0.0, 0.02))
    writers.close()
    for attempt in range(30):
        path = tmp_path / f"store{attempt}"
        store = FaissStore(path)
        collections = store.list_collections()
        num_made += bool(collections)
        assert collections in ([], ["passages"])
        if not collections:
            store.write_manifest(processes.manifest())
        store.put_many("passages", {"after": processes.record(1)})
        assert store.get_many("passages", ["after"])[0].header.checksum == processes.record(1).header.checksum
        assert {file.name for file in (path / "segments").iterdir()} == committed_files(path)
        assert {"catalogue.sqlite", "segments", "writer.lock"} <= {file.name for file in path.iterdir()}
        assert not list(path.glob("*.tmp*"))
        store.close()
    assert num_made < 30, "no kill came before the store was made"


@pytest.mark.slow
def test_readers_beside_a_writer_see_whole_versions_and_every_new_one(tmp_path):
    path = tmp_path / "store"
    last_version = 300
    store = FaissStore(path, max_small_segments=4)  # so that segments vanish under the readers all the time
    store.write_manifest(processes.manifest())
    store.put_many("passages", dict.fromkeys(processes.GROUP, processes.record(0)))
    readers = [run("reader", path, last_version) for _ in range(3)]
    for version in range(1, last_version + 1):
        store.put_many("passages", dict.fromkeys(processes.GROUP, processes.record(version)))
        if version % 7 == 0:
            store.put_many("passages", {"other": processes.record(version)})
            store.delete_many("passages", ["other"])
        if version % 20 == 0:
            store.compact("passages")
    for reader in readers:
        output, _ = reader.communicate(timeout=60)
        report = json.loads(output)
        assert report["problems"] == []
        assert report["version"] == last_version
    store.close()


def test_two_writers_take_turns(tmp_path):
    first, second = FaissStore(tmp_path / "store"), FaissStore(tmp_path / "store")
    first.write_manifest(processes.manifest())
    for seed in range(5):
        first.put_many("passages", {f"a{seed}": processes.record(seed)})
        second.put_many("passages", {f"b{seed}": processes.record(seed)})
    assert first.stats("passages").num_passages == second.stats("passages").num_passages == 10
    first.close()
    second.close()


def test_a_writer_that_waited_too_long_names_the_holder(tmp_path):
    first = FaissStore(tmp_path / "store")
    second = FaissStore(tmp_path / "store", lock_timeout_seconds=0.1)
    first.write_manifest(processes.manifest())
    with first._writing(), pytest.raises(StoreLocked, match=rf"process {os.getpid()} .* 0.1 s"):
        second.put_many("passages", {"a": processes.record(1)})
    second.put_many("passages", {"a": processes.record(1)})
    first.close()
    second.close()
