"""Milliseconds a candidate against the number of candidates, the length of passages, and the ratio they are read at.

    python -m benchmarks.scaling [--seconds 1] [--quick]
    python -m benchmarks.scaling --plot docs/scaling.png

The variants of benchmarks/variants.py, with warm caches, on Nano-shaped random weights, one after another at each
point; a point is repeated for --seconds, or runs once if that takes longer. Slow variants score only enough candidates
to know the cost of one. Ratios are varied at 4,096 tokens; transformers and joint hardly depend on the ratio, so they
appear in the table of lengths only.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.charts import line, panels, ticks
from benchmarks.common import (
    matmul_peak,
    nano_checkpoint,
    pivot,
    read_result,
    report,
    seconds_each,
    start,
    tiny_checkpoint,
)
from benchmarks.operations import PREFIX_TOKENS, PROMPT_TOKENS
from benchmarks.variants import BATCH, NUM_DISTINCT, VARIANTS, Candidates, Models

COUNTS = (1, 10, 100, 1000)
LENGTHS = (64, 256, 1024, 4096, 8192)
RATIOS = (1, 2, 4, 8, 16, 32)
PASSAGE_TOKENS, LONG_TOKENS, RATIO = 344, 4096, 4
SHOWN = [name for name in VARIANTS if not name.endswith(("cold", "int8"))]
CACHED = "cached, full vocabulary"  # slow, but not so slow that it could not be varied with the ratio
LABELS = {  # what is varied: its column, and how that is called
    "candidates": ("candidates", "candidates of {passage_tokens} tokens, r = {ratio}"),
    "tokens": ("passage tokens", "tokens of a passage, r = {ratio}"),
    "ratio": ("r", "r, passages of {long_tokens:,} tokens"),
}
COLUMNS = [
    "varied",
    "variant",
    "candidates",
    "passage tokens",
    "r",
    "ms per candidate",
    "Gop per candidate",
    "share of peak",
]


@dataclass(frozen=True)
class Point:
    varied: str
    count: int
    passage_tokens: int = PASSAGE_TOKENS
    ratio: int = RATIO

    def counts(self) -> dict[str, int]:
        """How many candidates each variant scores."""
        counts = {}
        for name in SHOWN:
            slow = VARIANTS[name].slow and name != CACHED
            if self.varied == "candidates":
                if self.count <= (10 if slow else 100 if name == CACHED else 1000):
                    counts[name] = self.count
            elif self.varied == "tokens" or not slow:
                counts[name] = max(1, min(BATCH, 2048 // self.passage_tokens)) if slow else self.count
        return counts


def points(quick: bool) -> list[Point]:
    lengths, ratios = (LENGTHS[:3], RATIOS[::3]) if quick else (LENGTHS, RATIOS)
    long = lengths[-1] if quick else LONG_TOKENS

    def count(tokens: int, ratio: int) -> int:
        """So many that their states fit the memory a few times."""
        return max(2, min(BATCH, 16_384 * ratio // tokens))

    by_count = [Point("candidates", count) for count in (COUNTS[:3] if quick else COUNTS)]
    by_length = [Point("tokens", count(tokens, RATIO), tokens) for tokens in lengths]
    return by_count + by_length + [Point("ratio", count(long, ratio), long, ratio) for ratio in ratios]


def measure(models: Models, point: Point, budget_seconds: float) -> list[list[Any]]:
    """A row for each variant."""
    peak = matmul_peak(models.dtype)
    distinct = NUM_DISTINCT if point.varied == "candidates" else point.count
    candidates = Candidates(models, point.passage_tokens, point.ratio, distinct)
    rows: list[list[Any]] = []
    for variant, count in point.counts().items():
        VARIANTS[variant].prepare(candidates, count)
        seconds = (
            seconds_each(partial(VARIANTS[variant].score, candidates, count), budget_seconds=budget_seconds) / count
        )
        work = models.operations(variant, point.passage_tokens, point.ratio)
        row = [point.varied, variant, count, point.passage_tokens, point.ratio]
        rows.append([*row, seconds * 1e3, work / 1e9, work / seconds / peak])
        print(*rows[-1][:5], f"{seconds * 1e3:.1f} ms", flush=True)
    return rows


def tables(result: dict[str, Any]) -> str:
    """Milliseconds a candidate, a table for what is varied, and how much of the machine that is."""
    parts = []
    for varied, (column, label) in LABELS.items():
        own = [row for row in result["rows"] if row["varied"] == varied]
        for value in ("ms per candidate", "share of peak"):
            parts.append(f"{value}, by {label.format(**result)}:\n\n{pivot(own, 'variant', column, value)}")
    joint = same_length(result, "joint")
    faster = [row | {"faster": joint / row["ms per candidate"]} for row in own]
    parts.append(f"Times faster than joint, by {label.format(**result)}:\n\n{pivot(faster, 'variant', 'r', 'faster')}")
    return "\n\n".join(parts)


def same_length(result: dict[str, Any], variant: str) -> float:
    """What a candidate costs a variant whose ratio was not varied, at the length where others' was."""
    at = {"variant": variant, "varied": "tokens", "passage tokens": result["long_tokens"]}
    (found,) = [float(row["ms per candidate"]) for row in result["rows"] if at.items() <= row.items()]
    return found


def plot(target: Path, quick: bool) -> None:
    result = read_result("scaling", quick=quick)
    rows = result["rows"]
    with panels(target, len(LABELS), legend_rows=2, share_y=True) as axes:
        for one, (varied, (column, label)) in zip(axes, LABELS.items(), strict=True):
            own = [row for row in rows if row["varied"] == varied]
            for place, variant in enumerate(SHOWN):
                series = [(row[column], row["ms per candidate"]) for row in own if row["variant"] == variant]
                if not series:  # as in the panel before, whatever the ratio
                    series = [(row["r"], same_length(result, variant)) for row in own]
                line(one, series, variant, place, ls="-" if variant.startswith("preread") else "--")
            one.set(xscale="log", yscale="log", xlabel=label.format(**result))
            ticks(one, sorted({row[column] for row in own}))
        axes[0].set_ylabel("ms per candidate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="at each point")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few points, to try the command")
    parser.add_argument("--only", choices=list(LABELS), help="measure these points, keep the last run's others")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what was measured")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot, args.quick)
        return
    start()
    models = Models(tiny_checkpoint() if args.quick else nano_checkpoint(), args.dtype)
    measure(models, Point("candidates", 10, 64), 0.0)  # whatever is compiled or laid out at the first call
    wanted = [point for point in points(args.quick) if args.only in (None, point.varied)]
    rows = [row for point in wanted for row in measure(models, point, args.seconds)]
    if args.only:
        before = [[row[name] for name in COLUMNS] for row in read_result("scaling", quick=args.quick)["rows"]]
        rows = [row for varied in LABELS for row in (rows if varied == args.only else before) if row[0] == varied]
    report(
        "scaling", COLUMNS, rows, tables, quick=args.quick, dtype=args.dtype, passage_tokens=PASSAGE_TOKENS,
        ratio=RATIO, long_tokens=points(args.quick)[-1].passage_tokens,
        prompt_tokens=PROMPT_TOKENS, prefix_tokens=PREFIX_TOKENS, batch=BATCH,
    )  # fmt: skip


if __name__ == "__main__":
    main()
