"""Writers of an embedded store killed at random moments, and what of their acknowledged writes is lost.

    python -m benchmarks.reliability kills [--count 1000] [--seed 0]

A process writes, deletes, moves an alias and compacts, and logs each step before it begins and once it was
acknowledged. It is killed (SIGKILL) within a tenth of a second, and its store is read by a process that has it open all
the time, and by one that opens it then. The next writer goes on with the same store.

    kills        processes killed
    unfinished   of those, within a step: it is there whole or not at all
    orphans      of those, with a segment left that no row names
    lost         acknowledged steps that are not there
    half         unfinished steps of which a part is there
    damaged      passages that cannot be read, or problems that `preread verify` would tell of
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import CollectionExists
from cache.faiss.store import FaissStore
from cache.manifest import Manifest
from cache.record import Record

DIM = 8
COLLECTION, ALIASED = "passages", ("passages", "other")
PASSAGE_IDS = [f"p{i}" for i in range(40)]


def manifest(name: str = COLLECTION) -> Manifest:
    return Manifest(
        collection=name,
        fingerprint="f" * 64,
        checkpoint="test",
        dim=DIM,
        max_passage_tokens=1024,
        passage_template="{text}",
        pooling_version=1,
        compression_ratio=1,
        created_at="2026-01-01T00:00:00+00:00",
        identity="0" * 32,
    )


def record(seed: int) -> Record:
    """Contents that follow from the seed, and tell it: it is the digest's first bytes."""
    rng = np.random.default_rng(seed)
    num_states = int(rng.integers(1, 200))
    codes = rng.integers(0, 256, (num_states, 2 * DIM), dtype=np.uint8)
    return Record.build(
        codes,
        window_tokens=(num_states,),
        compression_ratio=1,
        truncated=False,
        text_digest=seed.to_bytes(32, "little"),
        binding=0,
        text=f"text {seed}",
    )


def seed_of(found: Record) -> int:
    return int.from_bytes(found.header.text_digest, "little")


@dataclass(frozen=True)
class Contents:
    """Contents of a store: seeds by passage id, and where the alias points."""

    seeds: dict[str, int] = field(default_factory=dict)
    alias: str = ""

    def after(self, step: dict[str, Any]) -> Contents:
        """The contents once a logged step is done."""
        seeds = self.seeds | step.get("put", {})
        for passage_id in step.get("delete", ()):
            seeds.pop(passage_id, None)
        return replace(self, seeds=seeds, alias=str(step.get("alias", self.alias)))

    @classmethod
    def of(cls, store: FaissStore) -> Contents:
        """Raises AssertionError for a passage that is damaged, or is not what its seed makes."""
        seeds = {}
        for passage_id, found in zip(PASSAGE_IDS, store.get_many(COLLECTION, PASSAGE_IDS), strict=True):
            if found is not None:
                assert isinstance(found, Record), found
                seeds[passage_id] = seed_of(found)
                assert found.header.checksum == record(seeds[passage_id]).header.checksum, passage_id
        return cls(seeds, store.aliases().get("live", ""))


def run(count: int, seed: int) -> list[dict[str, object]]:
    """Counts over `count` kills."""
    counted: Counter[str] = Counter()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "store", Path(folder) / "log"
        with closing(FaissStore(path)) as store, closing(FaissStore(path)) as reader:
            for name in ALIASED:
                store.write_manifest(manifest(name))
            before = Contents()
            writers = Writers(log)
            try:
                for kill in range(count):
                    log.write_bytes(b"")
                    writers.kill_one(rng.getrandbits(32), path, after_seconds=rng.uniform(0.0, 0.1))
                    before = _judge(before, log, path, reader, counted)
                    counted["kills"] += 1
                    if kill % 10 == 0:
                        with closing(FaissStore(path)) as fresh:
                            counted["lost"] += Contents.of(fresh) != before
            finally:
                writers.close()
    names = ("kills", "unfinished", "orphans", "lost", "half", "damaged")
    return [{name: counted[name] for name in names}]


def _judge(before: Contents, log: Path, path: Path, reader: FaissStore, counted: Counter[str]) -> Contents:
    """Compare what is there with what the log of one writer promises; returns what is there."""
    acknowledged = pending = before
    for line in map(json.loads, log.read_text().splitlines()):
        if "done" in line:
            acknowledged = pending
        else:
            pending = acknowledged.after(line)
    counted["unfinished"] += acknowledged != pending
    audit = reader.audit(COLLECTION)
    counted["damaged"] += len(audit.problems)
    counted["orphans"] += bool(audit.orphans)
    try:
        there = Contents.of(reader)
    except AssertionError as exc:
        print(f"damaged: {exc}", file=sys.stderr)
        counted["damaged"] += 1
        return pending
    if there not in (acknowledged, pending):
        is_half = all(
            there.seeds.get(one) in (acknowledged.seeds.get(one), pending.seeds.get(one)) for one in PASSAGE_IDS
        )
        counted["half" if is_half else "lost"] += 1
    num_passages = reader.stats(COLLECTION).num_passages
    if num_passages != len(there.seeds) or len(list(reader.scan(COLLECTION))) != num_passages:
        counted["damaged"] += 1
    return there


class Writers:
    """A process that forks a writer on request: one that starts in a millisecond can be killed often."""

    def __init__(self, log: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", __name__, str(log)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._read() == "False", "a writer must not import torch"

    def kill_one(self, seed: int, path: Path, *, after_seconds: float) -> None:
        """Let one more writer start, and kill it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seed} {path}\n")
        self._process.stdin.flush()
        pid = int(self._read())
        time.sleep(after_seconds)
        os.kill(pid, signal.SIGKILL)
        assert self._read() == "reaped"

    def close(self) -> None:
        self._process.communicate(timeout=30)

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def write_until_killed(path: str, log: str, seed: int) -> None:
    """Random steps; each is logged before it begins, and once it was acknowledged."""
    rng = random.Random(seed)
    store = FaissStore(path, max_small_segments=5)
    with suppress(CollectionExists):
        store.write_manifest(manifest())
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(**line: object) -> None:
        os.write(descriptor, json.dumps(line).encode() + b"\n")

    while True:
        choice = rng.random()
        passage_ids = rng.sample(PASSAGE_IDS, rng.randint(1, 6))
        if choice < 0.7:
            seeds = {passage_id: rng.getrandbits(60) for passage_id in passage_ids}
            note(put=seeds)
            store.put_many(COLLECTION, {passage_id: record(value) for passage_id, value in seeds.items()})
        elif choice < 0.85:
            note(delete=passage_ids)
            store.delete_many(COLLECTION, passage_ids)
        elif choice < 0.9 and "other" in store.list_collections():
            name = rng.choice(ALIASED)
            note(alias=name)
            store.set_alias("live", name)
        else:
            note(compact=True)
            store.compact(COLLECTION)
        note(done=True)


def serve_writers(log: str) -> None:
    """Fork a writer for every line on standard input, "SEED PATH", and print its pid."""
    print("torch" in sys.modules, flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            seed, path = line.split(maxsplit=1)
            write_until_killed(path.strip(), log, int(seed))
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("reaped", flush=True)


if __name__ == "__main__":
    serve_writers(sys.argv[1])
