"""Milliseconds a candidate: transformers per call, a joint cross-encoder, and cached states, side by side.

    python -m benchmarks.side_by_side [--candidates 100] [--slow-candidates 10] [--passage-tokens 344] [--repeats 3]

All of benchmarks/variants.py on the same Nano-shaped random weights, in one run, in turns (a round measures
every variant once, so that a noisy neighbour hits all alike). transformers' variants, the one that encodes and
the accesses that fill a cache score the first few candidates only: what is told is the cost of one.
Operations are counted from the shapes (benchmarks/operations.py), and each variant is held against the
machine's own matrix-product rate, measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from benchmarks.common import matmul_peak, nano_checkpoint, report, start, tiny_checkpoint
from benchmarks.operations import PREFIX_TOKENS, PROMPT_TOKENS
from benchmarks.variants import BATCH, VARIANTS, Candidates, Models
from checkpoint.compute import DTYPES

COLUMNS = ["dtype", "variant", "ms per candidate", "speedup", "Gop per candidate", "share of peak"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--slow-candidates", type=int, default=10, help="of them, what slow variants score")
    parser.add_argument("--passage-tokens", type=int, default=344)
    parser.add_argument("--ratio", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the command")
    args = parser.parse_args()
    start()
    rows: list[list[object]] = []
    for dtype in args.dtypes.split(","):
        rows += measure(tiny_checkpoint() if args.quick else nano_checkpoint(), dtype, args)
    report(
        "side_by_side", COLUMNS, rows, quick=args.quick, candidates=args.candidates, passage_tokens=args.passage_tokens,
        ratio=args.ratio, prompt_tokens=PROMPT_TOKENS, prefix_tokens=PREFIX_TOKENS, batch=BATCH,
    )  # fmt: skip


def measure(directory: Path, dtype: str, args: argparse.Namespace) -> list[list[object]]:
    """A row for each variant."""
    models = Models(directory, dtype)
    candidates = Candidates(models, args.passage_tokens, args.ratio)
    counts = {name: args.slow_candidates if variant.slow else args.candidates for name, variant in VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    peaks: list[float] = []
    for _ in range(args.repeats + 1):  # the first round warms up
        peaks.append(matmul_peak(DTYPES[dtype]))
        for name, variant in VARIANTS.items():
            variant.prepare(candidates, counts[name])
            begin = time.perf_counter()
            variant.score(candidates, counts[name])
            times[name].append((time.perf_counter() - begin) / counts[name])
    peak = statistics.median(peaks[1:])
    each = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    rows: list[list[object]] = []
    for name, seconds in each.items():
        work = models.operations(name, args.passage_tokens, args.ratio)
        faster = each["transformers"] / seconds
        rows.append([dtype, name, seconds * 1e3, faster, work / 1e9, work / seconds / peak])
    return [*rows, [dtype, "matrix-product peak, Gop/s", "", "", peak / 1e9, 1.0]]


if __name__ == "__main__":
    main()
