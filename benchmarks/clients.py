"""One to 64 concurrent clients over gRPC: latency, what of it is not the model, and throughput beside the model's own.

    python -m benchmarks.clients [--model nano|mini] [--candidates 4] [--requests 128] [--quick]
    python -m benchmarks.clients --plot docs/clients.png

A real `preread serve` and its clients, two processes on the same cores. Each client is one connection
that asks again as soon as it is answered, for stored candidates of 344 tokens at r = 4 that the server
holds in every cache. `overhead` is what of a request's time was neither in the model nor waiting for its
turn there. The model-bound rate is that of the model alone, before the server starts: its score() over
such pairs, caches warm, at the best of several batch sizes. nano has random weights in the shape of
KaLM-Reranker-V1-Nano; mini is the shipped model, whose passes are so short that what is beside them shows.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.charts import line, panels, ticks
from benchmarks.collection_size import MODEL
from benchmarks.common import median_seconds, nano_checkpoint, read_result, report, result_path, start, tiny_checkpoint
from benchmarks.servers import QUERY, TIER_BYTES, TIERS, fill, serving
from cache.states import PassageStates, text_digest
from checkpoint import Checkpoint
from decoder_server.config import KvCacheConfig
from decoder_server.models.fbnl.backend import FbnlBackend
from preread import AsyncClient, Client

CLIENTS = (1, 4, 16, 32, 64)
PASSAGE_TOKENS, RATIO, NUM_STORED = 344, 4, 32
COLLECTION = f"t{PASSAGE_TOKENS}"
COLUMNS = ["clients", "requests", "p50, ms", "p99, ms", "in the model, p50", "overhead, p50 ms", "overhead, p99 ms",
           "candidates/s", "share of the model-bound rate"]  # fmt: skip


def rates_alone(checkpoint: Checkpoint, dtype: str | None) -> dict[int, float]:
    """Candidates a second of the model alone, by how many are in a batch."""
    backend = FbnlBackend(checkpoint, dtype=dtype, budgets=KvCacheConfig(TIER_BYTES, TIER_BYTES))
    states = np.random.default_rng(0).standard_normal((PASSAGE_TOKENS // RATIO, checkpoint.dim), dtype=np.float32)
    prompt = backend.prompt(QUERY)
    passages = [
        PassageStates(states, (PASSAGE_TOKENS,), RATIO, False, text_digest(""), key=str(i).encode())
        for i in range(NUM_STORED)
    ]
    pairs = [pair for passage in passages for pair in backend.pairs(prompt, [passage])[0]]
    backend.fill(pairs)
    return {size: size / median_seconds(partial(backend.score, pairs[:size])) for size in (1, 2, 4, 8, 16, 32)}


async def drive(address: str, num_clients: int, num_requests: int, candidates: int) -> tuple[float, list[list[float]]]:
    """Seconds in all; per request its latency, the model's part, and the wait for it."""
    samples: list[list[float]] = []
    left = iter(range(num_requests))

    async def ask(client: AsyncClient) -> None:
        for number in left:
            ids = [f"p{(number * candidates + i) % NUM_STORED}" for i in range(candidates)]
            begin = time.perf_counter()
            answer = await client.rerank(QUERY, ids, collection=COLLECTION, timeout=600)
            timings = answer.summary.timings
            samples.append([time.perf_counter() - begin, timings.compute_seconds, timings.queue_seconds])

    clients = [AsyncClient(address) for _ in range(num_clients)]
    try:
        await asyncio.gather(*(client.rerank(QUERY, ["p0"], collection=COLLECTION) for client in clients))
        begin = time.perf_counter()
        await asyncio.gather(*map(ask, clients))
        return time.perf_counter() - begin, samples
    finally:
        await asyncio.gather(*(client.close() for client in clients))


def row(clients: int, seconds: float, samples: list[list[float]], candidates: int, bound: float) -> list[Any]:
    total, model, waiting = np.array(samples).T * 1e3
    overhead = total - model - waiting
    rate = len(samples) * candidates / seconds
    spread = [*np.percentile(total, [50, 99]), np.median(model), *np.percentile(overhead, [50, 99])]
    return [clients, len(samples), *map(float, spread), rate, rate / bound]


def plot(target: Path, names: list[str], quick: bool) -> None:
    results = [read_result(name, quick=quick) for name in names if result_path(name, quick=quick).exists()]
    with panels(target, 2, legend_rows=2) as (left, right):
        for place, result in enumerate(results):
            rows, name = result["rows"], result["model"]
            for column, style in (("p50, ms", "-"), ("p99, ms", "--")):
                label = f"{name}, {column.removesuffix(', ms')}"
                line(left, [(row["clients"], row[column]) for row in rows], label, place, ls=style)
            shares = [(row["clients"], 100 * row["share of the model-bound rate"]) for row in rows]
            line(right, shares, f"{name}, throughput", place, ls=":")
        left.set(xscale="log", yscale="log", xlabel="concurrent clients", ylabel="ms a request")
        right.set(xscale="log", xlabel="concurrent clients", ylabel="% of the model-bound rate")
        right.set_ylim(0, 110)
        for axes in (left, right):
            ticks(axes, CLIENTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("nano", "mini"), default="nano")
    parser.add_argument("--candidates", type=int, default=4, help="of a request")
    parser.add_argument("--requests", type=int, default=128, help="at each number of clients; at least two a client")
    parser.add_argument("--dtype", help="default: the server's own choice")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the command")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what was measured of both models")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot, ["clients-nano", "clients-mini"], args.quick)
        return
    start()
    model = tiny_checkpoint() if args.quick else nano_checkpoint() if args.model == "nano" else MODEL
    checkpoint = Checkpoint.open(model)
    alone = rates_alone(checkpoint, args.dtype)
    bound = max(alone.values())
    dtype = ["--dtype", args.dtype] if args.dtype else []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = f"faiss:{folder}/store"
        fill(store, checkpoint, [PASSAGE_TOKENS], NUM_STORED, RATIO)
        with serving(model, store, "--no-encoder", *TIERS, *dtype) as address:
            with Client(address) as client:
                client.warm([f"p{i}" for i in range(NUM_STORED)], collection=COLLECTION, timeout=600)
            asyncio.run(drive(address, 4, NUM_STORED, args.candidates))
            for clients in CLIENTS:
                num_requests = max(args.requests, 2 * clients)
                seconds, samples = asyncio.run(drive(address, clients, num_requests, args.candidates))
                rows.append(row(clients, seconds, samples, args.candidates, bound))
                print(f"{clients} clients: {seconds:.1f} s", flush=True)
    report(
        f"clients-{args.model}", COLUMNS, rows, quick=args.quick, model=args.model, candidates=args.candidates,
        passage_tokens=PASSAGE_TOKENS, ratio=RATIO, alone=alone,
    )  # fmt: skip


if __name__ == "__main__":
    main()
