"""Rerank candidates of a judged collection, at several ratios, with a checkpoint that is still in training's hands.

Files, BM25, metrics and rankings are those of `preread evaluate` (package tuning); only the model is not yet a
checkpoint directory, so its margins are computed here. Used while training runs and for opposed instructions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from training import scoring
from training.checkpoint_dir import Checkpoint
from tuning import first_stage
from tuning.judged import JudgedCollection, read_judged
from tuning.metrics import HEADLINE, per_query
from tuning.ranking import rank
from tuning.trec import Run

Candidates = Mapping[str, Sequence[str]]  # query_id -> passage ids


@torch.inference_mode()
def margins(
    checkpoint: Checkpoint,
    passages: Mapping[str, str],
    queries: Mapping[str, str],
    candidates: Candidates,
    ratios: Iterable[int],
    instruction: str = "",
    batch: int = 64,
) -> dict[int, dict[str, dict[str, float]]]:
    """{ratio: {query_id: {passage_id: margin}}}. A passage is encoded once; pairs of like length go together."""
    model = checkpoint.model
    passage_ids = sorted({p for found in candidates.values() for p in found})
    tokens = dict(zip(passage_ids, checkpoint.passage_ids([passages[p] for p in passage_ids]), strict=True))
    order = sorted(passage_ids, key=lambda p: len(tokens[p]))
    encoded: dict[str, torch.Tensor] = {}  # passage_id -> (num_tokens, dim)
    autocast = torch.autocast(model.device.type, torch.bfloat16)
    with autocast:
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            states, _ = scoring.encode(model, [tokens[p] or [0] for p in part])
            encoded |= {p: states[k, : max(1, len(tokens[p]))].float() for k, p in enumerate(part)}
    query_ids = list(candidates)
    texts = [queries[q] for q in query_ids]
    prompts = dict(zip(query_ids, checkpoint.prompt_ids(texts, [instruction] * len(texts)), strict=True))
    pairs = [(q, p) for q in query_ids for p in candidates[q]]
    pairs.sort(key=lambda pair: (len(prompts[pair[0]]) // 3, len(encoded[pair[1]])))  # little padding on either side
    out: dict[int, dict[str, dict[str, float]]] = {}
    for ratio in ratios:
        scored: dict[str, dict[str, float]] = {q: {} for q in query_ids}
        pooled = {
            p: scoring.mean_pool(s[None], torch.ones(1, len(s), dtype=torch.long, device=s.device), ratio)[0][0]
            for p, s in encoded.items()
        }
        for start in range(0, len(pairs), batch):
            part_pairs = pairs[start : start + batch]
            rows = [pooled[p] for _, p in part_pairs]
            states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(r) for r in rows], device=states.device)
            mask = (torch.arange(states.shape[1], device=states.device)[None] < lengths[:, None]).long()
            with autocast:
                margin = scoring.margins(model, [prompts[q] for q, _ in part_pairs], states, mask, checkpoint.answers)
            for (q, p), value in zip(part_pairs, margin.tolist(), strict=True):
                scored[q][p] = value
        out[ratio] = scored
    return out


def rerank(checkpoint: Checkpoint, judged: JudgedCollection, candidates: Run, ratios: Iterable[int]) -> dict[int, Run]:
    """{ratio: run} of the same candidates, in the order of `candidates` where margins are equal."""
    named = {q: [p for p, _ in found] for q, found in candidates.items()}
    scored = margins(checkpoint, judged.passages, judged.queries, named, ratios)
    return {
        ratio: {q: rank(named[q], [own[q][p] for p in named[q]]) for q in candidates} for ratio, own in scored.items()
    }


def ndcg(judged: JudgedCollection, run: Run) -> float:
    """Mean nDCG@10."""
    return float(per_query(judged.qrels, run, 10)[HEADLINE].mean())


class HeldOut:
    """Small fixed samples of judged collections, with their BM25 candidates found once."""

    def __init__(self, folder: Path, max_queries: int, top_k: int = 50) -> None:
        self.parts: list[tuple[JudgedCollection, Run]] = []
        for part in sorted(p for p in folder.iterdir() if (p / "qrels.tsv").exists()):
            judged = read_judged(part).sample(max_queries, seed=0)
            self.parts.append((judged, first_stage.search(judged.passages, judged.queries, top_k)))

    def report(self, checkpoint: Checkpoint, ratios: tuple[int, ...] = (4,)) -> str:
        """One line: nDCG@10 of BM25 and of each ratio, per collection."""
        words = []
        for judged, candidates in self.parts:
            runs = rerank(checkpoint, judged, candidates, ratios)
            values = " ".join(f"r{ratio} {ndcg(judged, run):.3f}" for ratio, run in runs.items())
            words.append(f"{judged.name}: BM25 {ndcg(judged, candidates):.3f} {values}")
        return "; ".join(words)
