"""Rerank BM25's best candidates of a judged collection, at several ratios, with a checkpoint held in memory.

nDCG@10 comes from ir_measures. Used while training runs, and by `evaluate` for the model card.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import ir_measures
import torch
from ir_measures import Qrel, ScoredDoc, nDCG

from training import scoring
from training.checkpoint_dir import Checkpoint
from training.collections_io import Collection, read_collection
from training.lexical import Bm25

Run = dict[str, dict[str, float]]  # query_id -> {passage_id: score}


def first_stage(collection: Collection, query_ids: list[str], k: int) -> Run:
    """BM25's best k for each query, only passages that match at all."""
    ids = list(collection.passages)
    rows, scores = Bm25([collection.passages[p] for p in ids]).top([collection.queries[q] for q in query_ids], k)
    return {
        q: {ids[row]: float(score) for row, score in zip(row_list, score_list, strict=True) if score > 0}
        for q, row_list, score_list in zip(query_ids, rows.tolist(), scores.tolist(), strict=True)
    }


@torch.inference_mode()
def rerank(
    checkpoint: Checkpoint,
    collection: Collection,
    candidates: Run,
    ratios: Iterable[int],
    instruction: str = "",
    batch: int = 64,
) -> dict[int, Run]:
    """{ratio: run}. Each passage is encoded once, pooled per ratio, and scored among pairs of like length."""
    model = checkpoint.model
    passage_ids = sorted({p for found in candidates.values() for p in found})
    place = {p: i for i, p in enumerate(passage_ids)}
    tokens = checkpoint.passage_ids([collection.passages[p] for p in passage_ids])
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    encoded: dict[int, torch.Tensor] = {}  # row -> (num_tokens, dim)
    autocast = torch.autocast(model.device.type, torch.bfloat16)
    with autocast:
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            states, _ = scoring.encode(model, [tokens[i] or [0] for i in part])
            encoded |= {i: states[k, : max(1, len(tokens[i]))].float() for k, i in enumerate(part)}
    query_ids = list(candidates)
    prompts = dict(
        zip(
            query_ids,
            checkpoint.prompt_ids([collection.queries[q] for q in query_ids], [instruction] * len(query_ids)),
            strict=True,
        )
    )
    pairs = [(q, p) for q in query_ids for p in candidates[q]]
    pairs.sort(
        key=lambda pair: (len(prompts[pair[0]]) // 3, len(encoded[place[pair[1]]]))
    )  # little padding on either side
    out: dict[int, Run] = {}
    for ratio in ratios:
        run: Run = {q: {} for q in query_ids}
        pooled = {
            i: scoring.mean_pool(s[None], torch.ones(1, len(s), dtype=torch.long, device=s.device), ratio)[0][0]
            for i, s in encoded.items()
        }
        for start in range(0, len(pairs), batch):
            part_pairs = pairs[start : start + batch]
            rows = [pooled[place[p]] for _, p in part_pairs]
            states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(r) for r in rows], device=states.device)
            mask = (torch.arange(states.shape[1], device=states.device)[None] < lengths[:, None]).long()
            with autocast:
                margin = scoring.margins(model, [prompts[q] for q, _ in part_pairs], states, mask, checkpoint.answers)
            for (q, p), value in zip(part_pairs, margin.tolist(), strict=True):
                run[q][p] = value
        out[ratio] = run
    return out


def ndcg(collection: Collection, run: Run) -> dict[str, float]:
    """nDCG@10 of each query of the run; a query with nothing found has 0."""
    qrels = [Qrel(q, p, g) for q in run for p, g in collection.qrels[q].items()]
    scored = [ScoredDoc(q, p, s) for q, found in run.items() for p, s in found.items()]
    values = dict.fromkeys(run, 0.0)
    for metric in ir_measures.iter_calc([nDCG @ 10], qrels, scored):
        values[metric.query_id] = float(metric.value)
    return values


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / max(1, len(values))


class HeldOut:
    """Small fixed samples of the held-out collections, with their BM25 candidates found once."""

    def __init__(self, folder: Path, num_queries: int, k: int = 50) -> None:
        self.parts: list[tuple[Collection, Run]] = []
        for part in sorted(p for p in folder.iterdir() if (p / "qrels.tsv").exists()):
            collection = read_collection(part)
            query_ids = list(collection.qrels)[:num_queries]
            self.parts.append((collection, first_stage(collection, query_ids, k)))

    def report(self, checkpoint: Checkpoint, ratios: tuple[int, ...] = (4,)) -> str:
        """One line: nDCG@10 of BM25 and of each ratio, per collection."""
        words = []
        for collection, candidates in self.parts:
            runs = rerank(checkpoint, collection, candidates, ratios)
            values = " ".join(f"r{ratio} {mean(ndcg(collection, run)):.3f}" for ratio, run in runs.items())
            words.append(f"{collection.name}: BM25 {mean(ndcg(collection, candidates)):.3f} {values}")
        return "; ".join(words)
