"""Passages of the tests of renaming, and what they run in separate processes.

renaming.py read URL     reads docs-0, docs-1, ... by all of their names until a line comes; prints a JSON report
renaming.py rename URL   renames docs to docs-1, or docs-N to the next, once
"""

import json
import sys
import threading
from contextlib import closing, suppress
from functools import partial

import numpy as np

from cache.collection import Collection, StoredPassage
from cache.errors import CacheError, CollectionNotFound
from cache.open import open_store
from cache.states import PassageStates, text_digest

say = partial(print, flush=True, file=sys.stdout)  # the test reads it
FIELDS = {
    "collection", "fingerprint", "checkpoint", "dim", "max_passage_tokens", "passage_template", "pooling_version",
    "compression_ratio", "codec", "codec_table", "stores_text", "created_at", "version", "identity", "checksum",
}  # fmt: skip


def passages(text: str, number: int, dim: int = 8) -> list[StoredPassage]:
    """`p0`, `p1`, ... of different texts, two states each."""
    found = []
    for i in range(number):
        states = np.full((2, dim), i + 0.5, dtype=np.float32)
        digest = text_digest(f"{text} {i}")
        found.append(StoredPassage(f"p{i}", PassageStates(states, (8,), 4, False, digest), f"{text} {i}"))
    return found


def read(url: str) -> None:
    """The passages under every name that was once seen, and through the collection that was opened first."""
    enough = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), enough.set()), daemon=True).start()
    expected = [one.states.text_digest for one in passages("old", 5)]
    number, num_reads, problems = 0, 0, []
    with closing(open_store(url, read_budget_seconds=20)) as store:
        first = Collection.open(store, "docs-0")
        say("reading")
        while not problems:
            is_last = enough.is_set()
            for name in ("docs-0", "live", f"docs-{number}", None):
                try:
                    found = first if name is None else Collection.open(store, name)
                    read = [getattr(one, "text_digest", one) for one in found.get_many([f"p{i}" for i in range(5)])]
                    if read != expected:
                        problems.append(f"{name}: {read}")
                except CacheError as exc:
                    problems.append(f"{name}: {exc}")
            num_reads += 1
            with suppress(CollectionNotFound):
                Collection.open(store, f"docs-{number + 1}")
                number += 1
                continue
            if is_last:
                break
    say(json.dumps({"number": number, "num_reads": num_reads, "problems": problems}))


def rename(url: str) -> None:
    with closing(open_store(url)) as store:
        (name,) = store.list_collections()
        say("renaming")
        store.rename_collection(name, f"docs-{int(name.partition('-')[2] or 0) + 1}", None if "-" in name else "docs")


if __name__ == "__main__":
    {"read": read, "rename": rename}[sys.argv[1]](sys.argv[2])
