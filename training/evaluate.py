"""`python -m training evaluate`: BM25, MiniLM and a checkpoint at several ratios on the same candidates.

nDCG@10, MRR@10 and recall come from ir_measures; intervals are percentile bootstraps over queries with a fixed seed,
and the relative gain over BM25 is bootstrapped on the same resampled queries (paired).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
from ir_measures import RR, Qrel, R, ScoredDoc, nDCG
from numpy.typing import NDArray

from training.checkpoint_dir import load
from training.collections_io import Collection, read_collection
from training.heldout import Run, first_stage, rerank
from training.trainer import pick_device

MEASURES = {"nDCG@10": nDCG @ 10, "MRR@10": RR @ 10, "R@10": R @ 10}
NUM_RESAMPLES = 10_000
HEADER = "| | nDCG@10 (95% interval) | over BM25 (paired) | MRR@10 | R@10 |\n|---|---|---|---|---|"


def per_query(collection: Collection, run: Run) -> dict[str, NDArray[np.float64]]:
    """{measure: (num_queries,)} in the run's query order; a query with nothing found counts 0."""
    qrels = [Qrel(q, p, g) for q in run for p, g in collection.qrels[q].items()]
    scored = [ScoredDoc(q, p, s) for q, found in run.items() for p, s in found.items()]
    place = {q: i for i, q in enumerate(run)}
    values = {name: np.zeros(len(run)) for name in MEASURES}
    names = {str(measure): name for name, measure in MEASURES.items()}
    for metric in ir_measures.iter_calc(list(MEASURES.values()), qrels, scored):
        values[names[str(metric.measure)]][place[metric.query_id]] = metric.value
    return values


def interval(values: NDArray[np.float64], draws: NDArray[np.int64]) -> tuple[float, float]:
    """95% percentile bootstrap of the mean. draws: (num_resamples, num_queries) rows into values"""
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def gain_interval(
    values: NDArray[np.float64], base: NDArray[np.float64], draws: NDArray[np.int64]
) -> tuple[float, float]:
    """95% paired bootstrap of mean(values) / mean(base) - 1."""
    low, high = np.percentile(values[draws].mean(1) / base[draws].mean(1) - 1, [2.5, 97.5])
    return float(low), float(high)


def minilm_run(collection: Collection, candidates: Run) -> Run:
    from training.teacher import MiniLM  # optional dependency

    teacher = MiniLM()
    ids = sorted({p for found in candidates.values() for p in found})
    passages = dict(zip(ids, teacher.embed([collection.passages[p] for p in ids], max_tokens=256), strict=True))
    queries = dict(
        zip(candidates, teacher.embed([collection.queries[q] for q in candidates], max_tokens=256), strict=True)
    )
    return {q: {p: float(queries[q] @ passages[p]) for p in found} for q, found in candidates.items()}


def evaluate(
    checkpoint_folder: Path,
    folders: Sequence[Path],
    ratios: Sequence[int],
    depth: int = 50,
    max_queries: int | None = None,
    instruction: str = "",
    teacher: bool = False,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """Print one table per collection and return (and write) its figures."""
    checkpoint = load(checkpoint_folder)
    checkpoint.model.to(pick_device()).eval()
    figures: dict[str, Any] = {}
    for folder in folders:
        collection = read_collection(folder)
        query_ids = list(collection.qrels)[:max_queries]
        candidates = first_stage(collection, query_ids, depth)
        runs: dict[str, Run] = {"BM25": candidates}
        if teacher:
            runs["MiniLM"] = minilm_run(collection, candidates)
        runs |= {
            f"r={ratio}": run for ratio, run in rerank(checkpoint, collection, candidates, ratios, instruction).items()
        }
        draws = np.random.default_rng(0).integers(0, len(query_ids), (NUM_RESAMPLES, len(query_ids)))
        base = per_query(collection, candidates)["nDCG@10"]
        rows = figures[folder.name] = {"num_queries": len(query_ids), "systems": {}}
        print(f"\n{folder.name}: {len(query_ids)} queries, BM25 top {depth}\n{HEADER}")
        for name, run in runs.items():
            values = per_query(collection, run)
            low, high = interval(values["nDCG@10"], draws)
            gain = float(values["nDCG@10"].mean() / base.mean() - 1)
            gain_low, gain_high = gain_interval(values["nDCG@10"], base, draws)
            means = {measure: round(float(v.mean()), 4) for measure, v in values.items()}
            rows["systems"][name] = {
                **means,
                "interval": [round(low, 4), round(high, 4)],
                "gain": [round(g, 4) for g in (gain, gain_low, gain_high)],
            }
            print(
                f"| {name} | {means['nDCG@10']:.3f} ({low:.3f} to {high:.3f})"
                f" | {gain:+.1%} ({gain_low:+.1%} to {gain_high:+.1%})"
                f" | {means['MRR@10']:.3f} | {means['R@10']:.3f} |",
                flush=True,
            )
    if json_path:
        json_path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures
