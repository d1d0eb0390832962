"""One call of many queries against as many calls of one, over the same passages of `preread serve`.

    python -m benchmarks.many [--model nano|mini] [--queries 32] [--candidates 100] [--rounds 3] [--quick]

    off    neither KV nor prefix cache
    hot    both hold every passage, and the prefix over it

Passages have 344 tokens, read by id at r = 4; their states are random. Both ways take turns in one run, each round with
new queries, a few single calls in flight; a row has the medians. Server and client are separate processes on the same
cores. nano has random weights in the shape of KaLM-Reranker-V1-Nano; mini is the shipped model.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.collection_size import MODEL
from benchmarks.common import nano_checkpoint, report, start, tiny_checkpoint
from benchmarks.servers import TIERS, fill, serving
from checkpoint import Checkpoint
from preread import Client, Reranking

PASSAGE_TOKENS, RATIO = 344, 4
COLLECTION = f"t{PASSAGE_TOKENS}"
QUERY = "what is read once"  # and a number: with nano's tokenizer a prompt of about KaLM's 72 tokens
IN_FLIGHT = 4  # of single calls
SERVERS = {"off": ["--keys-cache-bytes", "0", "--prefix-cache-bytes", "0"], "hot": TIERS}
COLUMNS = ["caches", "ms, single calls", "ms, one call", "one call to single calls", "ms per pair, one call"]


def median_ms(ways: list[Callable[[], list[Reranking]]], num_pairs: int, rounds: int) -> list[float]:
    """Of each way, which take turns; every pair has to be scored."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for seconds, way in zip(times, ways, strict=True):
            begin = time.perf_counter()
            answers = way()
            seconds.append(1e3 * (time.perf_counter() - begin))
            assert sum(answer.summary.num_scored for answer in answers) == num_pairs
    return [statistics.median(seconds) for seconds in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("nano", "mini"), default="nano")
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the command")
    args = parser.parse_args()
    start()
    name = "tiny" if args.quick else args.model
    model = tiny_checkpoint() if args.quick else nano_checkpoint() if args.model == "nano" else MODEL
    ids, numbers = [f"p{i}" for i in range(args.candidates)], itertools.count(1000)
    rows: list[list[object]] = []

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(IN_FLIGHT) as pool:
        store = f"faiss:{folder}/store"
        checkpoint = Checkpoint.open(model)
        fill(store, checkpoint, [PASSAGE_TOKENS], args.candidates, RATIO)
        for caches, flags in SERVERS.items():
            with serving(model, store, "--no-encoder", *flags) as address, Client(address) as client:

                def queries() -> list[str]:
                    return [f"{QUERY} {next(numbers)}" for _ in range(args.queries)]

                def single(query: str, client: Client = client) -> Reranking:
                    return client.rerank(query, ids, collection=COLLECTION, timeout=1800)

                def one_call(client: Client = client) -> list[Reranking]:
                    return client.rerank_many(queries(), ids, collection=COLLECTION, timeout=1800)

                def single_calls() -> list[Reranking]:
                    return list(pool.map(single, queries()))

                if caches == "hot":
                    client.warm(ids, collection=COLLECTION, timeout=1800)
                for query in queries()[:2]:  # compiles, measures the rate, and reads what the read cache keeps
                    single(query)
                num_pairs = args.queries * args.candidates
                apart, together = median_ms([single_calls, one_call], num_pairs, args.rounds)
                rows.append([caches, apart, together, together / apart, together / num_pairs])
                print(caches, f"{apart:.0f} ms, {together:.0f} ms", flush=True)
    prompt = checkpoint.text.prompt(f"{QUERY} {next(numbers)}")
    report(
        f"many-{args.model}", COLUMNS, rows, quick=args.quick, model=name, queries=args.queries,
        candidates=args.candidates, passage_tokens=PASSAGE_TOKENS, ratio=RATIO, in_flight=IN_FLIGHT, rounds=args.rounds,
        prompt_tokens=len(prompt.ids), prefix_tokens=prompt.prefix_length,
    )  # fmt: skip


if __name__ == "__main__":
    main()
