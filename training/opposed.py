"""Do instructions decide? Pairs of opposed instructions on held-out MedQuAD, same query, same passages."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from training.checkpoint_dir import Checkpoint, load
from training.heldout import margins
from training.instructions import ASPECTS, aspect_of
from training.trainer import pick_device
from tuning.judged import JudgedCollection, read_judged

ANSWER = "Retrieve passages that answer the query"
CONTRARY = "Retrieve passages that do not answer the query"

DEMO_QUERY = "malaria"
DEMO_PASSAGES = {
    "symptoms": "Malaria begins with fever, shaking chills, headache and muscle aches. Nausea and vomiting may follow.",
    "treatments": "Malaria is treated with antimalarial drugs such as chloroquine"
    " or artemisinin combinations, chosen by region.",
    "other": "Cataract surgery removes the clouded lens of the eye and puts an artificial lens in its place.",
}
DEMO_INSTRUCTIONS = ("Retrieve passages about the symptoms", "Retrieve passages about the treatments", ANSWER, CONTRARY)


def contrary(
    checkpoint: Checkpoint, collection: JudgedCollection, num_queries: int, ratio: int
) -> tuple[float, float, float]:
    """Shares of queries where the answer outscores an unrelated passage under ANSWER, is outscored under CONTRARY,
    and where the answer's own margin changes sign between the two."""
    query_ids = list(collection.qrels)[:num_queries]
    answers = {q: next(iter(collection.qrels[q])) for q in query_ids}
    others = {q: answers[query_ids[i - 7]] for i, q in enumerate(query_ids)}
    pairs = {q: (answers[q], others[q]) for q in query_ids if answers[q] != others[q]}
    plain = margins(checkpoint, collection.passages, collection.queries, pairs, [ratio], ANSWER)[ratio]
    flipped = margins(checkpoint, collection.passages, collection.queries, pairs, [ratio], CONTRARY)[ratio]
    hits = [plain[q][answers[q]] > plain[q][others[q]] for q in pairs]
    turned = [flipped[q][answers[q]] < flipped[q][others[q]] for q in pairs]
    signs = [plain[q][answers[q]] > 0 > flipped[q][answers[q]] for q in pairs]
    return sum(hits) / len(hits), sum(turned) / len(turned), sum(signs) / len(signs)


def aspects(checkpoint: Checkpoint, collection: JudgedCollection, ratio: int) -> tuple[float, int]:
    """For a topic with answers on several aspects: how often the asked aspect's answer outscores another's."""
    topics: dict[str, dict[str, str]] = {}
    for query_id, grades in collection.qrels.items():
        found = aspect_of(collection.queries[query_id])
        if found:
            topics.setdefault(found[1], {})[found[0]] = next(iter(grades))
    won, total = 0, 0
    for name in ASPECTS:
        having = {t: a for t, a in topics.items() if name in a and len(set(a.values())) > 1}
        if not having:
            continue
        pairs = {t: sorted(set(a.values())) for t, a in having.items()}
        asked_for = f"Retrieve passages about {ASPECTS[name][1]}"
        run = margins(checkpoint, collection.passages, {t: t for t in having}, pairs, [ratio], asked_for)[ratio]
        for topic, found_aspects in having.items():
            asked = found_aspects[name]
            for other in set(found_aspects.values()) - {asked}:
                won, total = won + (run[topic][asked] > run[topic][other]), total + 1
    return won / max(1, total), total


def demonstrate(checkpoint: Checkpoint, ratio: int) -> None:
    """A table of P(yes): one query, three passages, every instruction of DEMO_INSTRUCTIONS."""
    pairs = {"q": list(DEMO_PASSAGES)}
    print("| instruction | " + " | ".join(DEMO_PASSAGES) + " |\n|---|" + "---|" * len(DEMO_PASSAGES))
    for instruction in DEMO_INSTRUCTIONS:
        run = margins(checkpoint, DEMO_PASSAGES, {"q": DEMO_QUERY}, pairs, [ratio], instruction)[ratio]["q"]
        scores = (f"{1 / (1 + math.exp(-run[name])):.3f} ({run[name]:+.2f})" for name in DEMO_PASSAGES)
        print(f"| {instruction} | " + " | ".join(scores) + " |")


def report(folder: Path, medquad: Path, ratio: int = 4) -> None:
    checkpoint = load(folder)
    checkpoint.model.to(pick_device()).eval()
    collection = read_judged(medquad)
    with torch.inference_mode():
        hits, turned, signs = contrary(checkpoint, collection, 200, ratio)
        share, total = aspects(checkpoint, collection, ratio)
        demonstrate(checkpoint, ratio)
    print(f"{ANSWER!r}: answer above an unrelated passage in {hits:.1%}")
    print(f"{CONTRARY!r}: answer below it in {turned:.1%}; the answer's margin changes sign in {signs:.1%}")
    print(
        f"the aspect the instruction asks for above another aspect of the same topic in {share:.1%}"
        f" of {total} pairs (chance 50%)"
    )
