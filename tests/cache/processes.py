"""What the embedded store's tests run in separate processes: readers beside a writer, and writers with less than all.

    processes.py limited PATH BYTES   writes a passage where no file may grow beyond that; prints the error
    processes.py unprivileged PATH 0  writes a passage as a user who owns nothing, where it can; prints the error
    processes.py reader PATH VERSION  reads until it has seen that version, prints a JSON report
    processes.py asked PATH USER      reads or writes for every line on standard input, where it can write nothing

Must stay light: it imports what a writer needs, and no more.
"""

import json
import os
import resource
import sys
import time
from functools import partial

import numpy as np

from benchmarks.reliability.kills import COLLECTION, DIM, PASSAGE_IDS, manifest, record, seed_of
from cache.errors import CacheError
from cache.faiss.store import FaissStore
from cache.record import Record

__all__ = ["PASSAGE_IDS", "manifest", "record", "seed_of"]

say = partial(print, flush=True, file=sys.stdout)  # the test reads it
GROUP = [f"g{i}" for i in range(8)]


def read_until(path: str, last_version: int) -> None:
    """Read the whole group over and over: never damaged, never missing, never a mixture, never going back."""
    store = FaissStore(path)
    version, num_reads, problems = 0, 0, []
    deadline = time.monotonic() + 60
    while version < last_version and not problems and time.monotonic() < deadline:
        found = store.get_many(COLLECTION, GROUP)
        seeds = {seed_of(entry) if isinstance(entry, Record) else entry for entry in found}
        if len(seeds) != 1 or not isinstance(next(iter(seeds)), int):
            problems.append(f"not one version: {seeds}")
        elif (seen := next(iter(seeds))) < version:
            problems.append(f"version {seen} after {version}")
        elif any(entry.header.checksum != record(seen).header.checksum for entry in found):
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
        FaissStore(path).put_many(COLLECTION, {"large": large})
        say("written")
    except CacheError as exc:
        say(type(exc).__name__, exc)


def answer_lines(path: str, user: str) -> None:
    """ "read": ids and what they hold; "write": a passage; another method by its name. Errors by class and message."""
    new = record(1)  # now: another user may not find what it imports
    if os.getuid() == 0 and user == "unprivileged":
        os.setuid(65534)
    store = FaissStore(path, lock_timeout_seconds=1)
    for line in sys.stdin:
        try:
            if line.strip() == "write":
                store.put_many(COLLECTION, {"new": new})
            elif line.strip() != "read":
                getattr(store, line.strip())(*([] if line.strip() == "mend" else [COLLECTION]))
            found = store.get_many(COLLECTION, PASSAGE_IDS[:4])
            said = [seed_of(entry) if isinstance(entry, Record) else repr(entry) for entry in found]
        except CacheError as exc:
            said = f"{type(exc).__name__} {exc}"
        say(json.dumps(said))


if __name__ == "__main__":
    command, path, argument = sys.argv[1:]
    if command == "limited":
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
