"""The embedded store under several processes: writers killed at random moments, readers beside a writer."""

import importlib.util
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache.embedded.store import EmbeddedStore
from cache.errors import StoreLocked
from cache.record import Record

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


def write_and_be_killed(writers: subprocess.Popen, seed: int, path: Path, *, after_seconds: float) -> None:
    """Let one more writer start, and kill -9 it."""
    writers.stdin.write(f"{seed} {path}\n")
    writers.stdin.flush()
    pid = int(writers.stdout.readline())
    time.sleep(after_seconds)
    os.kill(pid, signal.SIGKILL)
    assert writers.stdout.readline().strip() == "reaped"


def expected_states(lines: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Seeds by passage id that the log promises: what was acknowledged, and that with the unfinished write applied."""
    acknowledged: dict[str, int] = {}
    pending = acknowledged
    for line in map(json.loads, lines):
        if "done" in line:
            acknowledged = pending
            continue
        pending = dict(acknowledged)  # whatever began before and was not done has been settled by the caller
        pending.update(line.get("seeds", {}))
        for passage_id in line.get("passage_ids", ()):
            pending.pop(passage_id, None)
    return acknowledged, pending


def committed_files(path: Path) -> set[str]:
    connection = sqlite3.connect(path / "catalogue.sqlite")
    names = {name for (name,) in connection.execute("SELECT file_name FROM segments")}
    connection.close()
    return names


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_loses_nothing_it_acknowledged(tmp_path):
    path, log = tmp_path / "store", tmp_path / "log"
    store = EmbeddedStore(path)
    store.write_manifest(processes.manifest())
    reader = EmbeddedStore(path)  # open all the time, beside every writer
    log.touch()
    rng = random.Random(7)
    num_unfinished = num_orphans = 0
    with run("writers", path, log) as writers:
        assert writers.stdout.readline().strip() == "False", "the writer must not import torch"
        for kill in range(NUM_KILLS):
            write_and_be_killed(writers, kill, path, after_seconds=rng.uniform(0.0, 0.1))

            lines = log.read_text().splitlines()
            acknowledged, pending = expected_states(lines)
            found = dict(zip(processes.PASSAGE_IDS, reader.get_many("passages", processes.PASSAGE_IDS), strict=True))
            assert all(entry is None or isinstance(entry, Record) for entry in found.values()), found
            seeds = {passage_id: processes.seed_of(entry) for passage_id, entry in found.items() if entry is not None}
            assert seeds in (acknowledged, pending), f"after kill {kill}: half of a write is visible, or one was lost"
            for passage_id, seed in seeds.items():
                assert found[passage_id].checksum == processes.record(seed).checksum
            assert reader.stats("passages").num_passages == len(seeds)
            assert len(list(reader.scan("passages"))) == len(seeds)

            # Settle the log: the write that was cut off either happened or did not, and from here on that stands.
            num_unfinished += acknowledged != pending
            settled = {"begin": "put", "seeds": seeds}
            log.write_text(json.dumps(settled) + "\n" + json.dumps({"done": True}) + "\n")
            on_disk = {file.name for file in (path / "segments").iterdir()}
            assert committed_files(path) <= on_disk
            num_orphans += len(on_disk - committed_files(path))
        writers.stdin.close()
    # Most kills must have hit a write, or the test has shown nothing.
    assert num_unfinished > NUM_KILLS // 4, num_unfinished
    assert num_orphans > 0
    store.put_many("passages", {"last": processes.record(1)})
    fresh = EmbeddedStore(path)
    fresh.put_many("passages", {"after": processes.record(2)})
    assert {file.name for file in (path / "segments").iterdir()} == committed_files(path), "orphans were not removed"
    for opened in (store, reader, fresh):
        opened.close()


@pytest.mark.slow
def test_a_writer_killed_while_it_makes_the_store_leaves_one_that_can_be_used(tmp_path):
    rng = random.Random(3)
    num_made = 0
    with run("writers", tmp_path, tmp_path / "log") as writers:
        writers.stdout.readline()
        for attempt in range(30):
            write_and_be_killed(writers, attempt, tmp_path / f"store{attempt}", after_seconds=rng.uniform(0.0, 0.02))
        writers.stdin.close()
    for attempt in range(30):
        path = tmp_path / f"store{attempt}"
        store = EmbeddedStore(path)
        collections = store.list_collections()
        num_made += bool(collections)
        assert collections in ([], ["passages"])
        if not collections:
            store.write_manifest(processes.manifest())
        store.put_many("passages", {"after": processes.record(1)})
        assert store.get_many("passages", ["after"])[0].checksum == processes.record(1).checksum
        assert {file.name for file in (path / "segments").iterdir()} == committed_files(path)
        assert {"catalogue.sqlite", "segments", "writer.lock"} <= {file.name for file in path.iterdir()}
        assert not list(path.glob("*.tmp*"))
        store.close()
    assert num_made < 30, "no kill came before the store was made"


@pytest.mark.slow
def test_readers_beside_a_writer_see_whole_versions_and_every_new_one(tmp_path):
    path = tmp_path / "store"
    last_version = 300
    store = EmbeddedStore(path, max_small_segments=4)  # so that segments vanish under the readers all the time
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
    first, second = EmbeddedStore(tmp_path / "store"), EmbeddedStore(tmp_path / "store")
    first.write_manifest(processes.manifest())
    for seed in range(5):
        first.put_many("passages", {f"a{seed}": processes.record(seed)})
        second.put_many("passages", {f"b{seed}": processes.record(seed)})
    assert first.stats("passages").num_passages == second.stats("passages").num_passages == 10
    first.close()
    second.close()


def test_a_writer_that_waited_too_long_names_the_holder(tmp_path):
    first = EmbeddedStore(tmp_path / "store")
    second = EmbeddedStore(tmp_path / "store", lock_timeout_seconds=0.1)
    first.write_manifest(processes.manifest())
    with first._writing(), pytest.raises(StoreLocked, match=rf"process {os.getpid()} .* 0.1 s"):
        second.put_many("passages", {"a": processes.record(1)})
    second.put_many("passages", {"a": processes.record(1)})
    first.close()
    second.close()
