"""What each cache does under a stream of requests as search has it: few queries and passages come often, most seldom.

    python -m benchmarks.trace [--requests 1000] [--quick]

1,000 requests of four callers at a time, over gRPC, to a real `preread serve` of the shipped model. The query is drawn
by Zipf's law (exponent 1) from 400. A query's 30 passages, the same whenever it comes, are drawn by the same law from
2,000 of 344 tokens; they are sent as texts, and four in five are stored (r = 4, the default codec). Caches have their
default budgets; rows leave out one of them, or all. Each row starts a new server, and replays the same requests.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.collection_size import MODEL
from benchmarks.common import report, start, tiny_checkpoint
from benchmarks.servers import indexed, metrics, started, texts_of
from checkpoint import Checkpoint
from preread import Client

NUM_QUERIES, NUM_PASSAGES, NUM_CANDIDATES, PASSAGE_TOKENS = 400, 2000, 30, 344
STORED_SHARE, CALLERS = 0.8, 4
CACHES = {  # by the tier that metrics call it
    "store": "--cache-bytes",
    "inline": "--inline-cache-bytes",
    "keys": "--keys-cache-bytes",
    "prefixes": "--prefix-cache-bytes",
    "scores": "--score-cache-bytes",
}
COLUMNS = ["caches", "requests/s", "p50, ms", "p99, ms", *(f"{tier} hits, %" for tier in CACHES), "in the model, s"]


def zipf(rng: np.random.Generator, num_kinds: int, size: int, *, distinct: bool = False) -> list[int]:
    """Draws of 0..num_kinds - 1, the i-th as often as 1 / (i + 1)."""
    weights = 1 / np.arange(1, num_kinds + 1)
    drawn: list[int] = rng.choice(num_kinds, size, replace=not distinct, p=weights / weights.sum()).tolist()
    return drawn


def replay(address: str, requests: list[tuple[str, list[str]]]) -> tuple[float, list[float]]:
    """Seconds of all requests, and of each."""

    def ask(request: tuple[str, list[str]]) -> float:
        begin = time.perf_counter()
        assert client.rerank(*request, timeout=600).summary.num_scored == len(request[1])
        return time.perf_counter() - begin

    with Client(address) as client, ThreadPoolExecutor(CALLERS) as pool:
        begin = time.perf_counter()
        each = list(pool.map(ask, requests))
        return time.perf_counter() - begin, each


def row(name: str, address: str, url: str, requests: list[tuple[str, list[str]]]) -> list[Any]:
    seconds, each = replay(address, requests)
    seen = metrics(url)
    shares: list[Any] = []
    for tier in CACHES:
        hits, misses = (seen.get(f'preread_cache_{kind}_total{{tier="{tier}"}}', 0.0) for kind in ("hits", "misses"))
        shares.append(100 * hits / (hits + misses) if hits else 0.0)
    p99 = statistics.quantiles(each, n=100)[98]
    times = [len(requests) / seconds, statistics.median(each) * 1e3, p99 * 1e3]
    return [name, *times, *shares, seen["preread_forward_seconds_sum"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="of each row")
    parser.add_argument("--quick", action="store_true", help="a tiny model and 60 requests, to try the command")
    args = parser.parse_args()
    start()
    model = tiny_checkpoint() if args.quick else MODEL
    num_requests = 60 if args.quick else args.requests
    checkpoint, rng = Checkpoint.open(model), np.random.default_rng(0)
    make = texts_of(lambda text: len(checkpoint.text.passages([text])[0].ids))
    texts = [make(PASSAGE_TOKENS // (8 if args.quick else 1)) for _ in range(NUM_PASSAGES)]
    # A passage is as frequent whether it is stored or not.
    stored = {f"p{i}": text for i, text in enumerate(texts) if rng.random() < STORED_SHARE}
    candidates = [
        [texts[i] for i in zipf(rng, NUM_PASSAGES, NUM_CANDIDATES, distinct=True)] for _ in range(NUM_QUERIES)
    ]
    drawn = zipf(rng, NUM_QUERIES, num_requests)
    requests = [(f"which passages does the decoder attend over, question {i}", candidates[i]) for i in drawn]
    without = {"all": [], "none": [*CACHES], **{f"all but {tier}": [tier] for tier in CACHES}}
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = indexed(stored, model, Path(folder))
        for name, left_out in without.items():
            flags = [word for tier in left_out for word in (CACHES[tier], "0")]
            scores = [] if "scores" in left_out else ["--score-cache-bytes", str(16 << 20)]  # `started` disables it
            with started(model, store, "--http-port", "0", *flags, *scores) as said:
                address, url = said["listening"].split()[0], said["http"].split()[0]
                rows.append(row(name, address, url, requests))
            print(" ".join(f"{cell:.4g}" if isinstance(cell, float) else cell for cell in rows[-1]), flush=True)
    report(
        "trace", COLUMNS, rows, quick=args.quick, requests=num_requests, distinct_queries=len({*drawn}),
        stored_share=STORED_SHARE, passages=NUM_PASSAGES, candidates=NUM_CANDIDATES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
