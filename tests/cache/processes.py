"""What the embedded store's tests run in processes of their own: writers to be killed, and readers beside a writer.

    processes.py writers PATH LOG     forks a writer for every line on standard input, "SEED PATH", and prints its pid
    processes.py limited PATH BYTES   writes a passage where no file may grow beyond that; prints the error
    processes.py unprivileged PATH 0  writes a passage as a user who owns nothing, where it can; prints the error
    processes.py reader PATH VERSION  reads until it has seen that version, prints a JSON report
    processes.py asked PATH USER      reads or writes for every line on standard input, where it can write nothing

Must stay light: it imports what a writer needs, and no more.
"""

import json
import os
import random
import resource
import sys
import time
from contextlib import suppress
from functools import partial

import numpy as np

from cache.collection import Manifest
from cache.embedded.store import EmbeddedStore
from cache.errors import CacheError, CollectionExists
from cache.record import Record

DIM = 8
COLLECTION = "passages"
say = partial(print, flush=True, file=sys.stdout)  # the test reads it
PASSAGE_IDS = [f"p{i}" for i in range(40)]
GROUP = [f"g{i}" for i in range(8)]


def manifest() -> Manifest:
    return Manifest(
        collection=COLLECTION,
        fingerprint="f" * 64,
        checkpoint="test",
        dim=DIM,
        max_passage_tokens=1024,
        passage_template="{text}",
        pooling_version=1,
        compression_ratio=1,
        created_at="2026-01-01T00:00:00+00:00",
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
    return int.from_bytes(found.text_digest, "little")


def write_until_killed(path: str, log: str, seed: int) -> None:
    """Random writes; each is logged before it begins ("begin") and once it was acknowledged ("done")."""
    rng = random.Random(seed)
    store = EmbeddedStore(path, max_small_segments=5)
    with suppress(CollectionExists):
        store.write_manifest(manifest())
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(**line: object) -> None:
        os.write(descriptor, json.dumps(line).encode() + b"\n")

    while True:
        choice = rng.random()
        passage_ids = rng.sample(PASSAGE_IDS, rng.randint(1, 6))
        if choice < 0.75:
            seeds = {passage_id: rng.getrandbits(60) for passage_id in passage_ids}
            note(begin="put", seeds=seeds)
            store.put_many(COLLECTION, {passage_id: record(value) for passage_id, value in seeds.items()})
        elif choice < 0.9:
            note(begin="delete", passage_ids=passage_ids)
            store.delete_many(COLLECTION, passage_ids)
        else:
            note(begin="compact")
            store.compact(COLLECTION)
        note(done=True)


def serve_writers(log: str) -> None:
    """Fork writers on request: a process that starts in a millisecond can be killed often."""
    say("torch" in sys.modules)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            seed, path = line.split(maxsplit=1)
            write_until_killed(path.strip(), log, int(seed))
        say(pid)
        os.waitpid(pid, 0)
        say("reaped")


def read_until(path: str, last_version: int) -> None:
    """Read the whole group over and over: never damaged, never missing, never a mixture, never going back."""
    store = EmbeddedStore(path)
    version, num_reads, problems = 0, 0, []
    deadline = time.monotonic() + 60
    while version < last_version and not problems and time.monotonic() < deadline:
        found = store.get_many(COLLECTION, GROUP)
        seeds = {seed_of(entry) if isinstance(entry, Record) else entry for entry in found}
        if len(seeds) != 1 or not isinstance(next(iter(seeds)), int):
            problems.append(f"not one version: {seeds}")
        elif (seen := next(iter(seeds))) < version:
            problems.append(f"version {seen} after {version}")
        elif any(entry.checksum != record(seen).checksum for entry in found):
            problems.append(f"version {seen} holds something else")
        else:
            version = seen
        num_reads += 1
    say(json.dumps({"version": version, "num_reads": num_reads, "problems": problems}))


def write_large(path: str) -> None:
    """One write of half a megabyte."""
    codes = np.zeros((500_000 // (2 * DIM), 2 * DIM), dtype=np.uint8)
    values = {"compression_ratio": 1, "truncated": False, "text_digest": bytes(32), "binding": 0}
    large = Record.build(codes, window_tokens=(len(codes),), **values)
    try:
        EmbeddedStore(path).put_many(COLLECTION, {"large": large})
        say("written")
    except CacheError as exc:
        say(type(exc).__name__, exc)


def answer_lines(path: str, user: str) -> None:
    """ "read": ids and what they hold; "write": a passage. Errors are told by their class and message."""
    new = record(1)  # now: another user may not find what it imports
    if os.getuid() == 0 and user == "unprivileged":
        os.setuid(65534)
    store = EmbeddedStore(path, lock_timeout_seconds=1)
    for line in sys.stdin:
        try:
            if line.strip() == "write":
                store.put_many(COLLECTION, {"new": new})
            found = store.get_many(COLLECTION, PASSAGE_IDS[:4])
            said = [seed_of(entry) if isinstance(entry, Record) else repr(entry) for entry in found]
        except CacheError as exc:
            said = f"{type(exc).__name__} {exc}"
        say(json.dumps(said))


if __name__ == "__main__":
    command, path, argument = sys.argv[1:]
    if command == "writers":
        serve_writers(argument)
    elif command == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(argument), int(argument)))
        write_large(path)
    elif command == "unprivileged":
        if os.getuid() == 0:
            os.setuid(65534)  # root may write anywhere
        write_large(path)
    elif command == "asked":
        answer_lines(path, argument)
    else:
        read_until(path, int(argument))
