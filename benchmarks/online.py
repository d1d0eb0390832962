"""Latency and throughput of `preread serve` over gRPC on loopback, Nano-shaped random weights.

    python -m benchmarks.online [--candidates 1,10,100,1000] [--ratios 1,4,32]

    warm    candidates by id, states in the tier in front of the store
    store   candidates by id, no tier: every request reads the embedded store
    cold    inline texts seen for the first time: encoded on demand, then scored

Server and client are separate processes on the same cores. Passages have 344 tokens. The thousand
stored passages share the states of 20 encoded ones: what is timed does not depend on their values.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import nano_checkpoint, report, start
from cache.collection import Collection, Manifest, StoredPassage
from cache.states import PassageStates, text_digest
from cache.store import open_store
from checkpoint import Checkpoint
from encoder_worker.encoder import Encoder
from preread import Client

QUERY = "which passages does the decoder attend over"
PASSAGE_TOKENS = 344
MAX_CANDIDATES = 1000
fresh = itertools.count()


def passage_text(num_tokens: int, checkpoint: Checkpoint) -> str:
    """A text of about so many tokens that no other call returned."""
    text = f"{next(fresh)} "
    sentence = "The pooled states of its tokens are kept, and the decoder attends over them. "
    each = len(checkpoint.text.passages([sentence * 11])[0].ids) - len(checkpoint.text.passages([sentence * 10])[0].ids)
    return text + sentence * (num_tokens // each)


def index(store_url: str, checkpoint: Checkpoint, dtype: str | None) -> None:
    """One collection per ratio 1 and 4; r = 32 is read from 4, as a request may."""
    encoder = Encoder.load(checkpoint, dtype=dtype)
    tokens = [np.random.default_rng(i).integers(300, 500, PASSAGE_TOKENS).tolist() for i in range(20)]
    identity = checkpoint.identity()
    store = open_store(store_url)
    for ratio in (1, 4):
        states = [s for i in range(0, 20, 5) for s in encoder.encode(tokens[i : i + 5], ratio)]
        manifest = Manifest.of(
            identity,
            collection=f"r{ratio}",
            compression_ratio=ratio,
            stores_text=False,
        )
        collection = Collection.create(store, manifest)
        for first in range(0, MAX_CANDIDATES, 250):
            collection.put_many(
                [
                    StoredPassage(
                        f"p{i}", PassageStates(states[i % 20], (PASSAGE_TOKENS,), ratio, False, text_digest(str(i)))
                    )
                    for i in range(first, first + 250)
                ]
            )
    store.close()


@contextmanager
def serving(model: Path | str, store: str, *flags: str) -> Iterator[str]:
    """A real `preread serve` on a free port."""
    command = [sys.executable, "-m", "preread", "serve", "--model", str(model), "--store", store]
    command += ["--port", "0", "--encoder-port", "0", "--log-level", "warning", "--no-check", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        seen = []
        address = None
        for line in process.stdout:
            seen.append(line)
            if match := re.match(r"listening +(\S+:\d+)", line):
                address = match[1]
            if line.startswith("ready"):
                break
        if address is None:
            raise RuntimeError("the server did not start:\n" + "".join(seen))
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield address
    finally:
        process.terminate()
        process.wait(60)


def time_requests(client: Client, repeats: int, **request: Any) -> tuple[float, float]:
    """Median seconds of a request, and of what the server spent in the model."""
    total, compute = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        answer = client.rerank(QUERY, timeout=600, **request)
        total.append(time.perf_counter() - begin)
        compute.append(answer.summary.timings.compute_seconds)
        assert answer.summary.num_scored == len(request["candidates"])
    return statistics.median(total), statistics.median(compute)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", default="1,10,100,1000")
    parser.add_argument("--ratios", default="1,4,32")
    parser.add_argument("--dtype", help="default: the server's own choice")
    args = parser.parse_args()
    start()
    model = nano_checkpoint()
    checkpoint = Checkpoint.open(model)
    counts = [int(count) for count in args.candidates.split(",")]
    dtype = ["--dtype", args.dtype] if args.dtype else []
    rows: list[list[object]] = []

    def measure(client: Client, state: str, ratio: int, count: int, repeats: int) -> None:
        if state == "cold":
            request: dict[str, Any] = {"candidates": [passage_text(PASSAGE_TOKENS, checkpoint) for _ in range(count)]}
        else:
            request = stored_request(ratio, count)
        total, compute = time_requests(client, repeats, compression_ratio=ratio, **request)
        rows.append([state, ratio, count, total * 1e3, compute * 1e3, total / count * 1e3, count / total])

    with tempfile.TemporaryDirectory() as folder:
        store = f"faiss:{folder}/store"
        index(store, checkpoint, args.dtype)
        for state, flags in (
            ("warm", ["--no-encoder"]),
            ("store", ["--no-encoder", "--cache-bytes", "0"]),
            ("cold", []),
        ):
            with serving(model, store, *dtype, *flags) as address, Client(address) as client:
                client.rerank(QUERY, ["p0"], collection="r4", timeout=600)
                for ratio in map(int, args.ratios.split(",")):
                    if state != "warm" and ratio != 4:
                        continue
                    for count in counts:
                        if state == "cold" and count > 100:
                            continue  # minutes of encoding that benchmarks.index already measures
                        if state == "warm":  # fill the tier
                            client.rerank(QUERY, timeout=600, **stored_request(ratio, count))
                        repeats = 1 if state == "cold" or count >= 1000 else (7 if count < 100 else 3)
                        measure(client, state, ratio, count, repeats)
    columns = ["states", "r", "candidates", "ms a request", "of it in the model", "ms a candidate", "candidates/s"]
    report("online", columns, rows, passage_tokens=PASSAGE_TOKENS)


def stored_request(ratio: int, count: int) -> dict[str, Any]:
    return {"candidates": [f"p{i}" for i in range(count)], "collection": "r1" if ratio < 4 else "r4"}


if __name__ == "__main__":
    main()
