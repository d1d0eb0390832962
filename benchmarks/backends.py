"""What a rerank costs by backend: cached states, states made on demand, a cross-encoder of like size; one server.

    python -m benchmarks.backends [--candidates 1,10,100] [--lengths 64,344,1024,4096]

warm    fbnl, candidates by id: their states are cached
cold    fbnl, texts never seen before: encoded on demand, then scored
cross   a cross-encoder (the Qwen3 architecture, layers and widths of the fbnl decoder), texts

Random weights in the shape of KaLM-Reranker-V1-Nano's halves. One `preread serve` with two models answers over gRPC;
each variant's texts have as many tokens under its own tokenizer. Writes results/backends.json and docs/backends.png.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.common import CACHE, nano_checkpoint, report, start
from benchmarks.servers import fill, serving, texts_of, time_requests
from benchmarks.synthetic import Size, make_cross_encoder
from checkpoint import Checkpoint
from preread import Client

# The decoder half of Nano: 18 layers, width 640, 4 heads of 256 with one kv head, MLP 2,048.
LIKE_NANO = Size(hidden=640, intermediate=2048, layers=18, heads=4, kv_heads=1, vocab=700, positions=16_384)
RATIO = 4
PROFILE = "sigridjineth/ctxl-rerank-v2-1b-seq-cls"  # its template and readout
PLOT = Path(__file__).parents[1] / "docs" / "backends.png"
VARIANTS = {
    "warm": "fbnl, states cached",
    "cold": "fbnl, states made on demand",
    "cross": "cross-encoder of like size",
}


def cross_encoder() -> Path:
    """Random weights, made once and kept."""
    directory = CACHE / "cross-like-nano"
    if not (directory / "model.safetensors").exists():
        config = {"head_dim": 256}
        make_cross_encoder(directory, "Qwen3ForSequenceClassification", LIKE_NANO, config=config, dtype=torch.bfloat16)
    return directory


def plot(rows: list[list[Any]], base_count: int, base_length: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for variant, label in VARIANTS.items():
        by_count = [(count, ms) for w, count, length, ms, *_ in rows if w == variant and length == base_length]
        by_length = [(length, ms / count) for w, count, length, ms, *_ in rows if w == variant and count == base_count]
        left.plot(*zip(*sorted(by_count), strict=True), marker="o", label=label)
        right.plot(*zip(*sorted(by_length), strict=True), marker="o", label=label)
    for axes, x, y in (
        (left, f"candidates of {base_length} tokens", "ms per request"),
        (right, f"tokens of a passage, {base_count} candidates", "ms per candidate"),
    ):
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", default="1,10,100")
    parser.add_argument("--lengths", default="64,344,1024,4096", help="the second is used for the counts")
    parser.add_argument("--length-candidates", type=int, default=2, help="candidates at the other lengths")
    args = parser.parse_args()
    counts = [int(one) for one in args.candidates.split(",")]
    lengths = [int(one) for one in args.lengths.split(",")]
    base_length, few = lengths[min(1, len(lengths) - 1)], args.length_candidates
    start()
    limit = max(1024, 2 * max(lengths))
    nano, cross = nano_checkpoint(), cross_encoder()
    checkpoint = Checkpoint.open(nano, max_passage_tokens=limit)
    tokenizer = Tokenizer.from_file(str(cross / "tokenizer.json"))
    text = {
        "cold": texts_of(lambda one: len(checkpoint.text.passages([one])[0].ids)),
        "cross": texts_of(lambda one: len(tokenizer.encode(one).ids)),
    }
    rows: list[list[Any]] = []

    def measure(client: Client, variant: str, count: int, length: int) -> None:
        request: dict[str, Any] = {"model": "cross" if variant == "cross" else "nano"}
        if variant == "warm":
            request |= {"candidates": [f"p{i}" for i in range(count)], "collection": f"t{length}"}
            client.rerank("fill the tier", timeout=600, **request)
        else:
            request["candidates"] = [text[variant](length) for _ in range(count)]
        # Texts are cold once only, and a minute of cross-encoding need not be had three times.
        repeats = 3 if variant == "warm" or (variant == "cross" and count * length < 4000) else 1
        total, compute = time_requests(client, repeats, **request)
        rows.append([variant, count, length, total * 1e3, compute * 1e3, total / count * 1e3])

    with tempfile.TemporaryDirectory() as folder:
        store = f"faiss:{folder}/store"
        fill(store, checkpoint, lengths, max(counts), RATIO)
        models = [f"nano={nano},max-passage-tokens={limit}", f"cross={cross},profile={PROFILE}"]
        with serving(models[0], store, "--model", models[1]) as address, Client(address) as client:
            grid = [(count, base_length) for count in counts]
            grid += [(few, length) for length in lengths if (few, length) not in grid]
            for count, length in grid:
                for variant in VARIANTS:  # in turn, so that a busy minute of the machine hits all alike
                    measure(client, variant, count, length)
    columns = ["variant", "candidates", "passage tokens", "ms per request", "of it in the model", "ms per candidate"]
    report("backends", columns, rows, compression_ratio=RATIO)
    plot(rows, few, base_length)


if __name__ == "__main__":
    main()
