"""Margins of a checkpoint in training, on held-out collections and under opposed instructions.

Files, BM25, metrics and rankings are those of `preread evaluate` (package tuning).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from training.collections import ASPECTS, DEFAULT, aspect_of
from training.model import TrainableCheckpoint, mean_pool
from tuning.baselines import search
from tuning.judged import JudgedCollection, read_judged
from tuning.metrics import HEADLINE, per_query
from tuning.trec import Run, rank

Candidates = Mapping[str, Sequence[str]]  # query_id -> passage ids

CONTRARY = "Retrieve passages that do not answer the query"
DEMO_QUERY = "malaria"
DEMO_PASSAGES = {
    "symptoms": "Malaria begins with fever, shaking chills, headache and muscle aches. Nausea and vomiting may follow.",
    "treatments": "Malaria is treated with antimalarial drugs such as chloroquine"
    " or artemisinin combinations, chosen by region.",
    "other": "Cataract surgery removes the clouded lens of the eye and puts an artificial lens in its place.",
}
DEMO_INSTRUCTIONS = [*(f"Retrieve passages about the {name}" for name in ("symptoms", "treatments")), DEFAULT, CONTRARY]


@torch.inference_mode()
def margins(
    checkpoint: TrainableCheckpoint,
    passages: Mapping[str, str],
    queries: Mapping[str, str],
    candidates: Candidates,
    ratios: Iterable[int],
    instruction: str = "",
    batch: int = 64,
) -> dict[int, dict[str, dict[str, float]]]:
    """{ratio: {query_id: {passage_id: margin}}}. A passage is encoded once; pairs of like length go together."""
    passage_ids = sorted({p for found in candidates.values() for p in found})
    tokens = dict(zip(passage_ids, checkpoint.passage_ids([passages[p] for p in passage_ids]), strict=True))
    order = sorted(passage_ids, key=lambda p: len(tokens[p]))
    prompt_ids = checkpoint.prompt_ids([queries[q] for q in candidates], [instruction] * len(candidates))
    prompts = dict(zip(candidates, prompt_ids, strict=True))
    encoded: dict[str, torch.Tensor] = {}  # passage_id -> (num_tokens, dim)
    out: dict[int, dict[str, dict[str, float]]] = {}
    with torch.autocast(checkpoint.model.device.type, torch.bfloat16):
        for part in (order[start : start + batch] for start in range(0, len(order), batch)):
            states, _ = checkpoint.encode([tokens[p] or [0] for p in part])
            encoded |= {p: states[k, : max(1, len(tokens[p]))].float() for k, p in enumerate(part)}
        pairs = [(q, p) for q, found in candidates.items() for p in found]
        pairs.sort(key=lambda pair: (len(prompts[pair[0]]) // 3, len(encoded[pair[1]])))  # little padding on both sides
        chunks = [pairs[start : start + batch] for start in range(0, len(pairs), batch)]
        for ratio in ratios:
            scored = out[ratio] = {q: {} for q in candidates}
            ones = {p: s.new_ones(1, len(s), dtype=torch.long) for p, s in encoded.items()}
            pooled = {p: mean_pool(s[None], ones[p], ratio)[0][0] for p, s in encoded.items()}
            for chunk in chunks:
                rows = [pooled[p] for _, p in chunk]
                mask = pad_sequence([r.new_ones(len(r), dtype=torch.long) for r in rows], batch_first=True)
                states = pad_sequence(rows, batch_first=True)
                margin = checkpoint.margins([prompts[q] for q, _ in chunk], states, mask)
                for (q, p), value in zip(chunk, margin.tolist(), strict=True):
                    scored[q][p] = value
    return out


def rerank(
    checkpoint: TrainableCheckpoint, judged: JudgedCollection, candidates: Run, ratios: Iterable[int]
) -> dict[int, Run]:
    """{ratio: run} of the same candidates, in the order of `candidates` where margins are equal."""
    named = {q: [p for p, _ in found] for q, found in candidates.items()}
    runs: dict[int, Run] = {}
    for ratio, own in margins(checkpoint, judged.passages, judged.queries, named, ratios).items():
        runs[ratio] = {q: rank(passages, [own[q][p] for p in passages]) for q, passages in named.items()}
    return runs


class HeldOut:
    """Small fixed samples of judged collections, with their BM25 candidates found once."""

    def __init__(self, folder: Path, max_queries: int, top_k: int = 50) -> None:
        self.parts: list[tuple[JudgedCollection, Run]] = []
        for part in sorted(p for p in folder.iterdir() if (p / "qrels.tsv").exists()):
            judged = read_judged(part).sample(max_queries, seed=0)
            self.parts.append((judged, search(judged.passages, judged.queries, top_k)))

    def report(self, checkpoint: TrainableCheckpoint, ratios: tuple[int, ...] = (4,)) -> str:
        """One line: nDCG@10 of BM25 and of each ratio, per collection."""
        words = []
        for judged, candidates in self.parts:
            runs = rerank(checkpoint, judged, candidates, ratios)
            named = {"BM25": candidates} | {f"r{ratio}": run for ratio, run in runs.items()}
            ndcg = {name: per_query(judged.qrels, run, 10)[HEADLINE].mean() for name, run in named.items()}
            words.append(f"{judged.name}: {' '.join(f'{name} {mean:.3f}' for name, mean in ndcg.items())}")
        return "; ".join(words)


def report_opposed(folder: Path, medquad: Path, ratio: int = 4) -> None:
    """Print how far the instructions turn the order, on held-out MedQuAD and a demonstration."""
    checkpoint, collection = TrainableCheckpoint.load(folder, "auto"), read_judged(medquad)
    checkpoint.model.eval()
    query_ids = list(collection.qrels)[:200]
    answers = [next(iter(collection.qrels[q])) for q in query_ids]
    others = answers[-7:] + answers[:-7]
    pairs = {q: (a, o) for q, a, o in zip(query_ids, answers, others, strict=True) if a != o}
    plain, contrary = (
        margins(checkpoint, collection.passages, collection.queries, pairs, [ratio], instruction)[ratio]
        for instruction in (DEFAULT, CONTRARY)
    )
    above = sum(plain[q][a] > plain[q][o] for q, (a, o) in pairs.items()) / len(pairs)
    below = sum(contrary[q][a] < contrary[q][o] for q, (a, o) in pairs.items()) / len(pairs)
    signs = sum(plain[q][a] > 0 > contrary[q][a] for q, (a, _) in pairs.items()) / len(pairs)
    share, total = _aspects(checkpoint, collection, ratio)
    demo = {"q": list(DEMO_PASSAGES)}
    print("| instruction | " + " | ".join(DEMO_PASSAGES) + " |\n|---|" + "---|" * len(DEMO_PASSAGES))
    for instruction in DEMO_INSTRUCTIONS:  # a table of P(yes)
        run = margins(checkpoint, DEMO_PASSAGES, {"q": DEMO_QUERY}, demo, [ratio], instruction)[ratio]["q"]
        scores = (f"{1 / (1 + math.exp(-run[name])):.3f} ({run[name]:+.2f})" for name in DEMO_PASSAGES)
        print(f"| {instruction} | " + " | ".join(scores) + " |")
    print(f"{DEFAULT!r}: answer above an unrelated passage in {above:.1%}")
    print(f"{CONTRARY!r}: answer below it in {below:.1%}; the answer's margin changes sign in {signs:.1%}")
    order = "the aspect the instruction asks for above another aspect of the same topic"
    print(f"{order} in {share:.1%} of {total} pairs (chance 50%)")


def _aspects(checkpoint: TrainableCheckpoint, collection: JudgedCollection, ratio: int) -> tuple[float, int]:
    """Share and number of (answer on the instruction's aspect, another of the topic) pairs in the right order."""
    topics: dict[str, dict[str, str]] = {}
    for query_id, grades in collection.qrels.items():
        if found := aspect_of(collection.queries[query_id]):
            topics.setdefault(found[1], {})[found[0]] = next(iter(grades))
    won, total = 0, 0
    for name, (_, phrase) in ASPECTS.items():
        pairs = {t: sorted(set(a.values())) for t, a in topics.items() if name in a and len(set(a.values())) > 1}
        if not pairs:
            continue
        names, instruction = {t: t for t in pairs}, f"Retrieve passages about {phrase}"
        run = margins(checkpoint, collection.passages, names, pairs, [ratio], instruction)[ratio]
        for topic, passage_ids in pairs.items():
            right = topics[topic][name]
            won += sum(run[topic][right] > run[topic][p] for p in passage_ids if p != right)
            total += len(passage_ids) - 1
    return won / max(1, total), total
