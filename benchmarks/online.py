"""Latency of one client of `preread serve` over gRPC on loopback, by what is kept of its candidates.

    python -m benchmarks.online [--candidates 1,10,100] [--quick]

    health    no candidates: a health check, the least that a call costs
    scores    candidates by id; the same request was scored before
    prefix    another request; every other cache holds what it needs
    keys      the same without the prefix cache
    states    no cache but the read cache
    store     no cache at all: every request reads the embedded store
    texts     inline texts seen for the first time: encoded on demand, then scored

Nano-shaped random weights; server and client are separate processes on the same cores. Passages have
344 tokens, read at r = 4, their states are random: what is timed does not depend on their values.
benchmarks.clients has many clients at a time.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from benchmarks.common import median_seconds, nano_checkpoint, report, start, tiny_checkpoint
from benchmarks.servers import QUERY, TIERS, fill, serving, texts_of, time_requests
from checkpoint import Checkpoint
from preread import Client

PASSAGE_TOKENS, RATIO = 344, 4
COLLECTION = f"t{PASSAGE_TOKENS}"
MAX_TEXTS = 10  # of a request; encoding more is what benchmarks.indexing measures
NO_PREFIX, NO_KEYS = ["--prefix-cache-bytes", "0"], ["--keys-cache-bytes", "0"]
SERVERS = {
    "scores": ["--no-encoder", "--score-cache-bytes", str(1 << 20)],
    "prefix": ["--no-encoder", *TIERS],
    "keys": ["--no-encoder", *TIERS, *NO_PREFIX],
    "states": ["--no-encoder", *NO_KEYS, *NO_PREFIX],
    "store": ["--no-encoder", *NO_KEYS, *NO_PREFIX, "--cache-bytes", "0"],
    "texts": [*NO_KEYS, *NO_PREFIX],  # new once each
}
COLUMNS = ["kept", "candidates", "ms per request", "of it in the model", "ms beside it", "ms per candidate"]


def health_ms(address: str) -> float:
    with grpc.insecure_channel(address) as channel:
        check = HealthStub(channel).Check
        return 1e3 * median_seconds(lambda: check(HealthCheckRequest()), repeats=100, warm_up=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", default="1,10,100")
    parser.add_argument("--dtype", help="default: the server's own choice")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the command")
    args = parser.parse_args()
    start()
    model = tiny_checkpoint() if args.quick else nano_checkpoint()
    checkpoint = Checkpoint.open(model)
    counts = [int(count) for count in args.candidates.split(",")]
    dtype = ["--dtype", args.dtype] if args.dtype else []
    text = texts_of(lambda one: len(checkpoint.text.passages([one])[0].ids))
    rows: list[list[object]] = []

    with tempfile.TemporaryDirectory() as folder:
        store = f"faiss:{folder}/store"
        fill(store, checkpoint, [PASSAGE_TOKENS], max(counts), RATIO)
        for kept, flags in SERVERS.items():
            with serving(model, store, *dtype, *flags) as address, Client(address) as client:
                everyone = [f"p{i}" for i in range(max(counts))]
                if kept in ("prefix", "keys"):
                    client.warm(everyone, collection=COLLECTION, timeout=600)
                elif kept in ("states", "scores"):  # what is read, or scored, stays
                    client.rerank(QUERY, everyone, collection=COLLECTION, timeout=600)
                if kept == "scores":
                    rows.append(["health", 0, health_ms(address), 0.0, 0.0, 0.0])
                client.rerank(QUERY, ["p0"], collection=COLLECTION, timeout=600)
                for count in [one for one in counts if kept != "texts" or one <= MAX_TEXTS]:
                    stored = {"candidates": everyone[:count], "collection": COLLECTION}
                    fresh = {"candidates": [text(PASSAGE_TOKENS) for _ in range(count)]}
                    request: dict[str, Any] = fresh if kept == "texts" else stored
                    repeats = 1 if kept == "texts" else 100 if kept == "scores" else 9 if count <= 10 else 2
                    total, compute = (1e3 * seconds for seconds in time_requests(client, repeats, **request))
                    rows.append([kept, count, total, compute, total - compute, total / count])
                    print(*rows[-1][:2], f"{total:.0f} ms", flush=True)
    report("online", COLUMNS, rows, quick=args.quick, passage_tokens=PASSAGE_TOKENS, ratio=RATIO)


if __name__ == "__main__":
    main()
