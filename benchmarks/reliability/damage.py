"""Single-byte damage anywhere in a store, and whether an answer ever differs without being said.

    python -m benchmarks.reliability damage [--count 5000] [--seed 0]

A store with two collections, an alias, replaced and deleted passages is copied, one byte of one of its files is changed
(the kind of file first, so that small ones get their share), and everything that can be read of it is compared with the
undamaged store. Silent is a difference that neither the read nor `preread verify` tells of.

    flips          bytes changed
    unused         every answer is the same
    read           the reads told: CORRUPT for that passage, or one of the cache's errors
    verify         only `verify` told
    silent         nothing did
    crashed        another error, a dead process, or no answer in 60 s

Each flip is tried in a forked process, in a process of this module that imports neither torch nor gRPC.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cache.collection import Collection, StoredPassage
from cache.errors import CacheError
from cache.faiss.store import FaissStore
from cache.manifest import Manifest
from cache.record import Damaged, Record
from cache.states import EncodedPassage, PassageStates, text_digest
from cache.store import Store

DIM, NUM_PASSAGES, SECONDS = 8, 60, 60
NAMES = ("docs", "faq")
# Ids that reads ask for: stored, deleted, and never stored ones.
IDS = [f"passage {i}" for i in range(NUM_PASSAGES)] + ["nothing", "passage"]
Answers = dict[str, str]
SAID = "said: "


class Target(ABC):
    """A kind of store that can be damaged: whole to begin with, one byte at a time."""

    @abstractmethod
    def parts(self) -> dict[str, int]:
        """Number of bytes by the name of what holds them."""

    @abstractmethod
    def flip(self, part: str, offset: int, mask: int) -> None:
        """Change one byte of the store that `open` then opens."""

    @abstractmethod
    def open(self) -> Store: ...

    @abstractmethod
    def restore(self) -> None:
        """Make it whole again."""


class Directory(Target):
    """A `faiss:` store, copied from a template for every flip."""

    def __init__(self, template: Path, path: Path) -> None:
        self._template, self._path = template, path
        self.restore()

    def parts(self) -> dict[str, int]:
        files = (path for path in sorted(self._template.rglob("*")) if path.is_file())
        return {str(path.relative_to(self._template)): size for path in files if (size := path.stat().st_size)}

    def flip(self, part: str, offset: int, mask: int) -> None:
        with (self._path / part).open("r+b") as file:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ mask]))

    def open(self) -> Store:
        return FaissStore(self._path)

    def restore(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        shutil.copytree(self._template, self._path)


def run(count: int, seed: int) -> list[dict[str, object]]:
    """Counts by what was damaged, for `count` flips."""
    command = [sys.executable, "-m", __name__, str(count), str(seed)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows: list[dict[str, object]] = json.loads(answer.stdout)
    return rows


def fill(store: Store) -> None:
    """Two collections with replaced and deleted passages, and an alias."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        manifest = Manifest(
            collection=name, fingerprint="f" * 64, checkpoint="benchmark", dim=DIM, max_passage_tokens=64,
            passage_template="{passage}", pooling_version=1, compression_ratio=4, identity=f"{number:032x}",
            created_at="2026-01-01",
        )  # fmt: skip
        collection = Collection.create(store, manifest)
        passages = []
        for passage_id in IDS[:NUM_PASSAGES]:
            tokens = int(rng.integers(1, 40))
            states = rng.standard_normal((-(-tokens // 4), DIM)).astype(np.float32)
            text = f"{name}: the text of {passage_id}"
            value = PassageStates(states, (tokens,), 4, tokens > 30, text_digest(text))
            passages.append(StoredPassage(passage_id, value, text))
        for first in range(0, NUM_PASSAGES, 20):
            collection.put_many(passages[first : first + 20])
        collection.put_many(passages[5:8])
        collection.delete_many(IDS[10:13])
    store.set_alias("live", "docs")


def answers(store: Store) -> Answers:
    """Everything a store says, by what was asked; errors and damage begin with SAID."""
    said: Answers = {}

    def ask(question: str, call: Callable[[], object]) -> None:
        try:
            said[question] = str(call())
        except CacheError as exc:
            said[question] = SAID + type(exc).__name__

    ask("collections", store.list_collections)
    ask("aliases", lambda: sorted(store.aliases().items()))
    for name in NAMES:
        for question in (store.read_manifest, store.stats, store.generation):
            ask(f"{name}: {question.__name__}", lambda: question(name))  # noqa: B023 - called before it changes
        try:
            collection = Collection.open(store, name)
            found = collection.get_encoded_many(IDS)
            texts, digests = collection.get_texts(IDS), collection.digests(IDS)
            by_text = collection.find_texts([text_digest(f"{name}: the text of {passage_id}") for passage_id in IDS])
        except CacheError as exc:
            said[f"{name}: passages"] = SAID + type(exc).__name__
            continue
        for passage_id, passage, *others in zip(IDS, found, texts, digests, map(_found, by_text), strict=True):
            states = SAID if isinstance(passage, Damaged) else ""
            if passage is not None and not isinstance(passage, Damaged):
                states = passage.states.rows.tobytes().hex() + str(passage.window_tokens) + str(passage.truncated)
            said[f"{name}: {passage_id}"] = states
            # None has a word for damage: it is told by the states of the same passage.
            said[f"{name}: text of {passage_id}"] = SAID if states == SAID else str(others)
        ask(f"{name}: finds texts", lambda: store.finds_texts(name))  # noqa: B023
        ask(f"{name}: scan", lambda: sorted(map(_scanned, store.scan(name))))  # noqa: B023
        if SAID in said[f"{name}: scan"]:
            said[f"{name}: scan"] = SAID
    return said


def verify(store: Store) -> list[str]:
    """Findings of `preread verify` on each collection."""
    told = []
    for name in NAMES:
        try:
            told.extend(store.audit(name).problems)
            told.extend(damage for *_, damage in Collection.open(store, name).verify() if damage)
        except CacheError as exc:
            told.append(str(exc))
    return told


def outcome(target: Target, expected: Answers) -> str:
    """Read a damaged store and judge what it says."""
    store = target.open()
    found = answers(store)
    changed = {question for question in expected.keys() | found.keys() if expected.get(question) != found.get(question)}
    unsaid = {question for question in changed if not found.get(question, SAID).startswith(SAID)}
    if unsaid and not verify(store):
        return "silent"
    store.close()
    return "verify" if unsaid else "read" if changed else "unused"


def _found(one: tuple[str, EncodedPassage] | None) -> str:
    return "" if one is None else one[0] + one[1].states.rows.tobytes().hex()


def _scanned(entry: tuple[str, Record | Damaged]) -> str:
    passage_id, record = entry
    return f"{passage_id} {record.codes.tobytes().hex() if isinstance(record, Record) else SAID}"


@contextmanager
def directories() -> Iterator[dict[str, Target]]:
    """A store that was closed, and one whose writer was killed: its last writes are in the log alone."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = FaissStore(root / "closed")
        fill(store)
        store.close()
        writer = FaissStore(root / "killed")
        fill(writer)
        shutil.copytree(root / "killed", root / "log")
        writer.close()
        yield {
            "closed": Directory(root / "closed", root / "damaged"),
            "log": Directory(root / "log", root / "damaged"),
        }


def damage(targets: dict[str, Target], count: int, seed: int) -> list[dict[str, object]]:
    """Try `count` flips, spread evenly over the kinds of files of all targets, each in a process that may die of it."""
    rng = random.Random(seed)
    counts: dict[str, Counter[str]] = {}
    parts: dict[tuple[str, str], list[str]] = {}  # by target and kind
    for name, target in targets.items():
        for part in target.parts():
            parts.setdefault((name, part.rpartition("/")[0] or part), []).append(part)
    expected = {}
    for name, target in targets.items():
        target.restore()
        expected[name] = answers(store := target.open())
        store.close()
    for i in range(count):
        name, kind = list(parts)[i % len(parts)]
        target, part = targets[name], rng.choice(parts[name, kind])
        target.restore()
        offset, mask = rng.randrange(target.parts()[part]), rng.randrange(1, 256)
        target.flip(part, offset, mask)
        found = _forked(lambda: outcome(target, expected[name]))  # noqa: B023 - called before they change
        if found in ("silent", "crashed"):
            print(f"{found}: {name} {part} byte {offset} ^ {mask}", file=sys.stderr, flush=True)
        counts.setdefault(f"{name}: {kind}", Counter())[found] += 1
    outcomes = ("unused", "read", "verify", "silent", "crashed")
    rows: list[dict[str, object]] = [
        {"damaged": kind, "flips": counted.total()} | {one: counted[one] for one in outcomes}
        for kind, counted in counts.items()
    ]
    total = sum(counts.values(), Counter())
    return [*rows, {"damaged": "all", "flips": total.total()} | {one: total[one] for one in outcomes}]


def _forked(call: Callable[[], str]) -> str:
    """Result of a call in a forked process; "crashed" where that dies, raises or does not end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, call().encode())
        except BaseException as exc:
            print(f"{type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
        os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], SECONDS)
        said = os.read(reading, 100).decode() if ready else ""
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return said or "crashed"


if __name__ == "__main__":
    with directories() as made:
        print(json.dumps(damage(made, int(sys.argv[1]), int(sys.argv[2]))))
