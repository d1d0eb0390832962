"""What a codec costs in margins and order, on real states: bytes against loss, at every ratio.

    python -m benchmarks.codecs [--checkpoint DIR] [--collection DIR] [--ratios 1,2,4,8,16,32] [--codecs Flat,SQ8,…]
    python -m benchmarks.codecs --plot docs/codecs.png RESULT.json …     and the tables of docs/codecs.md

States of a ratio go through each codec and back; margins are computed in float32 and compared with those of the states
as they were. mean and max are absolute changes of the margin, `noise` is the mean one over the standard deviation of a
query's margins; tau is Kendall's, top 10 the share of the best ten that stays, both the mean over queries; `tau to
r = 1` is against the uncoded states of every token, so it holds what pooling costs too. The last row of each ratio is
no codec: the decoder in bfloat16 over float32 states, for scale. Goes on where it was interrupted, and takes from the
work folder what an earlier run with other codecs or ratios has measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from benchmarks.codecs_shown import COMPUTE, plot, print_tables
from benchmarks.codecs_workload import Margins, Sizes, Workload
from benchmarks.common import CACHE, report, start
from preread_cli.terminal import ProgressDisplay
from tuning.metrics import HEADLINE, per_query
from tuning.trec import rank

# 16, 8, 6 and 4 bits a number, plain, scaled and rotated; then 4, 2 and 1 by product quantizers; 16 and 8 bytes in all.
CODECS = (
    "SQfp16", "SQbf16",
    "SQ8", "B32,SQ8", "Z,B32,SQ8", "B{dim},SQ8", "Z,B{dim},SQ8", "RR{dim},SQ8",
    "SQ6", "B32,SQ6", "Z,B32,SQ6",
    "SQ4", "B32,SQ4", "Z,B32,SQ4", "RR{dim},SQ4",
    "PQ{half}", "PQ{quarter}", "PQ{eighth}", "OPQ{eighth},PQ{eighth}", "PCA{half},SQ8", "RQ16x8", "RQ8x8",
)  # fmt: skip
COLUMNS = ["codec", "r", "bytes a state", "bytes a token", "max", "mean", "noise", "tau", "top 10", HEADLINE, "change"]
COLUMNS += ["tau to r = 1"]


def compare(workload: Workload, finest: Margins, reference: Margins, margins: Margins) -> list[float]:
    """max, mean, noise, tau, top 10, nDCG@10 and its change; tau to r = 1."""
    change = np.abs(margins - reference)
    top = np.mean([len(best(a) & best(b)) / 10 for a, b in zip(reference, margins, strict=True)])
    ndcg, before = quality(workload, margins), quality(workload, reference)
    noise = change.mean() / reference.std(axis=1).mean()
    tau, tau_finest = order(reference, margins), order(finest, margins)
    return [float(x) for x in (change.max(), change.mean(), noise, tau, top, ndcg, ndcg - before, tau_finest)]


def order(reference: Margins, margins: Margins) -> float:
    """Kendall's tau, the mean over queries."""
    return float(np.mean([kendalltau(*rows).statistic for rows in zip(reference, margins, strict=True)]))


def best(margins: NDArray[np.float32]) -> set[int]:
    return set(np.argsort(-margins, kind="stable")[:10].tolist())


def quality(workload: Workload, margins: Margins) -> float:
    run = {q: rank(ids, row) for (q, ids), row in zip(workload.candidates.items(), margins, strict=True)}
    return float(per_query(workload.qrels, run, top_k=10)[HEADLINE].mean())


def outliers(workload: Workload, ratio: int) -> dict[str, float]:
    """How uneven the dimensions of real states are."""
    states = workload.sample(ratio, 20_000).astype(np.float64)
    energy = np.sort((states**2).mean(axis=0))[::-1]
    deviation, norms = np.sort(states.std(axis=0)), np.linalg.norm(states, axis=1)
    spread = np.linalg.eigvalsh(np.cov(states.T))[::-1]
    return {
        "ratio": ratio,
        "states": len(states),
        "largest value over rms": float(np.abs(states).max() / np.sqrt(energy.mean())),
        "std of the widest dim over the median one": float(deviation[-1] / np.median(deviation)),
        "constant dims": int((deviation < 1e-6 * deviation[-1]).sum()),
        "energy in the top 1 dim": float(energy[0] / energy.sum()),
        "energy in the top 4": float(energy[:4].sum() / energy.sum()),
        "energy in the top 16": float(energy[:16].sum() / energy.sum()),
        "norm, 99th over 1st percentile": float(np.percentile(norms, 99) / np.percentile(norms, 1)),
        "variance in a quarter of the principal directions": float(spread[: len(spread) // 4].sum() / spread.sum()),
    }


def measure(args: argparse.Namespace) -> None:
    start()
    sizes = Sizes(args.queries, args.candidates, args.training_passages, args.residual_training_states)
    with ProgressDisplay() as progress:
        workload = Workload(args.checkpoint, args.collection, sizes, args.work, progress)
        rows: list[list[Any]] = []
        trained_on: dict[str, int] = {}
        dim = workload.dim
        args.codecs = [c.format(dim=dim, half=dim // 2, quarter=dim // 4, eighth=dim // 8) for c in args.codecs]
        advance = progress.begin("margins", len(args.ratios) * (len(args.codecs) + 2), "rankings")
        finest = workload.margins("reference", 1, lambda states: states)
        for ratio in args.ratios:
            reference = workload.margins("reference", ratio, lambda states: states)
            advance(1)
            for name in args.codecs:
                margins, size, trained_on[f"{name} at {ratio}"] = workload.coded(name, ratio)
                rows.append([name, ratio, size, size / ratio, *compare(workload, finest, reference, margins)])
                advance(1)
            margins = workload.margins("bfloat16", ratio, lambda states: states, dtype="bfloat16")
            rows.append([COMPUTE, ratio, 0, 0.0, *compare(workload, finest, reference, margins)])
            advance(1)
        spread = [outliers(workload, ratio) for ratio in args.ratios]
    report(
        f"codecs-{workload.name}", COLUMNS, rows, weights=workload.weights, dim=workload.dim, queries=args.queries,
        candidates=args.candidates,
        passages=len(workload.scored), outliers=spread, trained_on=trained_on,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="with --plot: what to draw and to print tables of")
    parser.add_argument("--checkpoint", default="preread/models/preread-mini")
    parser.add_argument("--collection", type=Path, default=Path("examples/scifact"), help="a BEIR folder")
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=20, help="of each query")
    parser.add_argument("--training-passages", type=int, default=600, help="kept apart, to train codecs on")
    parser.add_argument(
        "--residual-training-states", type=int, metavar="N",
        help="train residual quantizers, which take long, on at most so many; default: as preread index would",
    )  # fmt: skip
    parser.add_argument("--ratios", type=lambda text: [int(r) for r in text.split(",")], default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--codecs", type=lambda text: text.split(";"), default=list(CODECS), help="separated by ';'")
    parser.add_argument("--work", type=Path, default=CACHE / "codecs", help="states and margins are kept here")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    args = parser.parse_args()
    if args.plot:
        results = [json.loads(file.read_text()) | {"name": file.stem} for file in args.results]
        plot(args.plot, results)
        for result in results:
            print_tables(result)
    else:
        measure(args)


if __name__ == "__main__":
    main()
