"""What results of `benchmarks.codecs` look like in docs/codecs.md: tables and a picture. Measures nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

COMPUTE = "bfloat16 decoder"  # the row that is no codec
FAMILIES = {"SQfp16": "black", "SQbf16": "grey", "SQ8": "C0", "SQ6": "C2", "SQ4": "C1", "PQ": "C3", "RQ": "C4"}
LINES = ("o-", "^--", "s:", "D-.", "v-")  # of a family's codecs, one after another
Rows = dict[tuple[str, int], dict[str, Any]]  # by codec and ratio


def rows_of(result: dict[str, Any]) -> Rows:
    rows = [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]
    return {(row["codec"], row["r"]): row for row in rows}


def print_tables(result: dict[str, Any]) -> None:
    """Markdown: how uneven the states are, each codec at each ratio, and the best order for the bytes."""
    rows = rows_of(result)
    ratios = sorted({ratio for _, ratio in rows})
    print(f"\n{result['name']}, weights {result['weights']}, {result['queries']} queries, dim {result['dim']}\n")
    spread = {one["ratio"]: one for one in result["outliers"]}
    _table(["r", *map(str, ratios)])
    for name in [name for name in result["outliers"][0] if name not in ("ratio", "states")]:
        share = name.startswith(("energy", "variance"))
        _row([name, *(f"{spread[r][name]:.0%}" if share else f"{spread[r][name]:.3g}" for r in ratios)])
    print()
    _table(["codec", "bits", "bytes", *(f"r = {r}" for r in ratios)])
    for codec in dict.fromkeys(codec for codec, _ in rows):
        found = [rows.get((codec, r)) for r in ratios]
        size = next(row["bytes a state"] for row in found if row)
        cells = [f"{100 * row['noise']:.2f} · {row['tau']:.3f}" if row else "" for row in found]
        sizes = ["", ""] if codec == COMPUTE else [f"{8 * size / result['dim']:.3g}", str(size)]
        _row([f"*{codec}*" if codec == COMPUTE else f"`{codec}`", *sizes, *cells])
    print()
    _table(["bytes a token", "codec", "r", "tau to r = 1", "tau to its own r"])
    for row in best_for_bytes(rows):
        cells = [f"`{row['codec']}`", str(row["r"]), f"{row['tau to r = 1']:.3f}", f"{row['tau']:.3f}"]
        _row([f"{row['bytes a token']:.4g}", *cells])


def best_for_bytes(rows: Rows) -> list[dict[str, Any]]:
    """By bytes a token: what is nearer to the order at r = 1 than all that is smaller, by a hundredth of tau."""
    front: list[dict[str, Any]] = []
    coded = [row for (codec, _), row in rows.items() if codec != COMPUTE]
    for row in sorted(coded, key=lambda row: (row["bytes a token"], -row["tau to r = 1"])):
        if not front or row["tau to r = 1"] > front[-1]["tau to r = 1"] + 0.01:
            front.append(row)
    return front


def plot(target: Path, results: list[dict[str, Any]]) -> None:
    """Over bytes a token the change of a margin and tau to r = 1, a row for each result, a line for each codec.

    Rotations are left out: they are measured, not offered.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 2, figsize=(13, 5 * len(results)), squeeze=False)
    for (left, right), result in zip(axes, results, strict=True):
        rows = rows_of(result)
        ratios = sorted({ratio for _, ratio in rows})
        lines: dict[str, list[Any]] = {family: [] for family in FAMILIES}
        for codec in dict.fromkeys(codec for codec, _ in rows):
            family = re.match(r"SQ\w+|PQ|RQ", codec.rpartition(",")[2])
            if codec == COMPUTE or codec.startswith(("RR", "OPQ", "PCA")) or family is None:
                continue
            own = [rows[codec, r] for r in ratios if (codec, r) in rows]
            like = lines[family[0]]
            kind, colour = LINES[len(like)], FAMILIES[family[0]]
            sizes = [row["bytes a token"] for row in own]
            right.plot(sizes, [row["tau to r = 1"] for row in own], kind, color=colour, ms=4, lw=1)
            like += left.plot(sizes, [row["noise"] for row in own], kind, color=colour, ms=4, lw=1, label=codec)
        floor = np.mean([row["noise"] for (codec, _), row in rows.items() if codec == COMPUTE])
        left.axhline(floor, color="grey", lw=0.8)
        left.text(
            0.01,
            floor,
            f"{COMPUTE}, no codec",
            va="bottom",
            fontsize=8,
            color="grey",
            transform=left.get_yaxis_transform(),
        )
        along = f"bytes a token; along a line r = {', '.join(map(str, reversed(ratios)))}"
        left.set(xscale="log", yscale="log", xlabel=along, title=f"{result['name'].removeprefix('codecs-')}: own r")
        left.set_ylabel("mean change of a margin / standard deviation of margins")
        right.set(xscale="log", xlabel=along, title="against r = 1, no codec", ylabel="Kendall's tau")
        # From worst to best, as the lines lie.
        handles = sorted((line for like in lines.values() for line in like), key=lambda line: -max(line.get_ydata()))
        right.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        for axis in (left, right):
            axis.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(target, dpi=90)


def _table(heads: list[str]) -> None:
    _row(heads)
    _row(["---"] * len(heads))


def _row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |")
