"""What a collection's size does to reading it: 100 random passages of 10^3 to 10^6, from both stores.

    python -m benchmarks.collection_size [--seconds 180] [--folder /tmp] [--quick]
    python -m benchmarks.collection_size --plot docs/collection-size.png

Passages of 128 tokens at r = 32 for the shipped model: four states of 384 numbers in SQfp16, written
through the store's own calls. Warm is the same ids again. Cold is ids and a store just opened, after
the kernel was asked to give back the pages of the store's files (posix_fadvise); what caches lie below
the machine cannot be emptied from within. Redis keeps all in memory, so it has no cold. The model's
time for the same 100 stands beside them: it knows nothing of the collection. Stops before a size that
would take a store's writing over --seconds, and removes what it made. 10^6 take 4 GB of disk or memory.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks.charts import line, panels, ticks
from benchmarks.common import median_seconds, read_result, report, start
from benchmarks.redis_server import redis_url
from benchmarks.servers import QUERY
from cache.collection import Collection, StoredPassage
from cache.manifest import Manifest
from cache.open import open_store
from cache.states import PassageStates, text_digest
from checkpoint import Checkpoint
from decoder_server.models.fbnl.backend import FbnlBackend

MODEL = Path(__file__).parent.parent / "preread/models/preread-mini"
SIZES = (1_000, 10_000, 100_000, 1_000_000)
TOKENS, RATIO, NUM_READ, WRITE = 128, 32, 100, 5_000
COLUMNS = ["store", "passages", "read 100 cold, ms", "read 100, ms", "open, ms", "bytes a passage", "write, passages/s"]


def grow(url: str, stored_bytes: Callable[[], int], evict: Callable[[], None] | None, args: argparse.Namespace) -> Any:
    """A row for each size; the collection grows from one to the next."""
    model = Checkpoint.open(args.model)
    states = np.random.default_rng(0).standard_normal((64, TOKENS // RATIO, model.dim), dtype=np.float32)
    store = open_store(url)
    manifest = Manifest.of(model.identity, collection="c", compression_ratio=RATIO, codec="SQfp16", stores_text=False)
    collection = Collection.create(store, manifest)
    num, writing = 0, 0.0
    for size in SIZES[:2] if args.quick else SIZES:
        if num and writing / num * size > args.seconds:
            print(f"{url.partition(':')[0]}: {size:,} passages would take over {args.seconds:g} s to write")
            break
        begin = time.perf_counter()
        for first in range(num, size, WRITE):
            some = range(first, min(first + WRITE, size))
            collection.put_many([passage(i, states[i % len(states)]) for i in some])
        writing += time.perf_counter() - begin
        num = size
        cold, warm, opening = read(url, size, evict)
        cold_ms = cold * 1e3 if evict is not None else ""
        yield [url.partition(":")[0], size, cold_ms, warm * 1e3, opening * 1e3, stored_bytes() / size, size / writing]
        print(f"{url.partition(':')[0]} {size:,}", flush=True)
    store.close()


def passage(number: int, states: np.ndarray) -> StoredPassage:
    return StoredPassage(str(number), PassageStates(states, (TOKENS,), RATIO, False, text_digest(str(number))))


def read(url: str, size: int, evict: Callable[[], None] | None) -> tuple[float, float, float]:
    """Median seconds of a first read of random passages, of the same again, and of opening."""
    cold, warm, opening = [], [], []
    for seed in range(5):
        if evict is not None:
            evict()
        ids = [str(i) for i in random.Random(seed).sample(range(size), NUM_READ)]
        begin = time.perf_counter()
        store = open_store(url, read_budget_seconds=10)
        collection = Collection.open(store, "c")
        opened = time.perf_counter()
        assert all(isinstance(entry, PassageStates) for entry in collection.get_many(ids))
        cold.append(time.perf_counter() - opened)
        opening.append(opened - begin)
        warm.append(median_seconds(lambda: collection.get_many(ids)))  # noqa: B023 - called here and now
        store.close()
    return statistics.median(cold), statistics.median(warm), statistics.median(opening)


def evict_files(folder: Path) -> None:
    """Asks the kernel to forget the files' pages, which are written before."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def model_seconds(model: Path) -> float:
    """Of scoring that many candidates of that size."""
    backend = FbnlBackend(Checkpoint.open(model))
    states = np.ones((TOKENS // RATIO, backend.checkpoint.dim), dtype=np.float32)
    entry = PassageStates(states, (TOKENS,), RATIO, False, text_digest(""))
    pairs = [pair for _ in range(NUM_READ) for pair in backend.pairs(backend.prompt(QUERY), [entry])[0]]
    return median_seconds(lambda: backend.score(pairs))


def plot(target: Path, quick: bool) -> None:
    result = read_result("collection_size", quick=quick)
    rows = result["rows"]
    sizes = sorted({row["passages"] for row in rows})
    with panels(target, 2) as (left, right):
        for place, (store, column) in enumerate(
            (("faiss", "read 100 cold, ms"), ("faiss", "read 100, ms"), ("redis", "read 100, ms"))
        ):
            name = {"faiss": "embedded", "redis": "Redis"}[store] + (", cold" if "cold" in column else "")
            own = [row for row in rows if row["store"] == store]
            line(left, [(row["passages"], row[column]) for row in own], name, place)
            if "cold" not in column:
                line(
                    right,
                    [(row["passages"], row["bytes a passage"] * row["passages"] / 2**20) for row in own],
                    name,
                    place,
                )
        left.plot(sizes, [result["model_ms"]] * len(sizes), color="black", ls=":", label="the model, 100 candidates")
        left.set(xscale="log", yscale="log", xlabel="passages in the collection", ylabel="ms to read 100 of them")
        right.set(xscale="log", yscale="log", xlabel="passages in the collection", ylabel="MiB stored")
        for axes in (left, right):
            ticks(axes, sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--seconds", type=float, default=180.0, help="to write one store at most")
    parser.add_argument("--folder", type=Path, help="where the embedded store lies meanwhile; default: the system's")
    parser.add_argument("--quick", action="store_true", help="the two smallest sizes, to try the command")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what was measured")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot, args.quick)
        return
    start()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        rows = list(grow(f"faiss:{name}/store", lambda: folder_bytes(folder), lambda: evict_files(folder), args))
    with redis_url() as url:
        info = redis.Redis.from_url(url)
        empty = int(info.info("memory")["used_memory"])
        rows += grow(url, lambda: int(info.info("memory")["used_memory"]) - empty, None, args)
        info.close()
    report(
        "collection_size", COLUMNS, rows, quick=args.quick, model_ms=model_seconds(args.model) * 1e3,
        passage_tokens=TOKENS, ratio=RATIO, codec="SQfp16",
    )  # fmt: skip


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
