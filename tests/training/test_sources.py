from __future__ import annotations

import random

import numpy as np
import pytest

from training.collections import RawCollection
from training.data import TrainingSource

SUBJECTS = ["influenza", "malaria", "cholera", "measles", "rabies", "tetanus", "typhus", "leprosy", "scurvy", "rickets"]
ASPECTS = {"symptoms": "What are the symptoms of {} ?", "treatments": "What are the treatments for {} ?"}


@pytest.fixture
def source() -> TrainingSource:
    made = RawCollection("medquad")
    rng = np.random.default_rng(0)
    vectors = {}
    for subject in SUBJECTS:
        for aspect, question in ASPECTS.items():
            key = f"{subject} {aspect}"
            made.queries[key] = question.format(subject)
            made.passages[key] = f"The {aspect} of {subject} are known. " * 3
            made.qrels[key] = {key: 1}
            vector = rng.normal(size=384).astype(np.float32)
            vectors[key] = vector / np.linalg.norm(vector)
    held = {f"rickets {aspect}" for aspect in ASPECTS}
    return TrainingSource(made, held, vectors, random.Random(0))


def test_held_out_passages_appear_nowhere(source: TrainingSource) -> None:
    drafts = list(source.query_drafts("question")) + list(source.aspect_drafts())
    assert drafts
    assert not any("rickets" in p for d in drafts for p in d.positives + d.negatives)


def test_negatives_are_not_relevant_and_near(source: TrainingSource) -> None:
    drafts = list(source.query_drafts("question"))
    for draft in drafts:
        assert len(draft.negatives) == 7
        assert not set(draft.positives) & set(draft.negatives)
    hard = [
        any(p.startswith(d.positives[0].split()[0]) for p in d.negatives) for d in drafts
    ]  # the subject's other aspect
    assert sum(hard) > len(hard) / 4


def test_the_instruction_decides_in_aspect_groups(source: TrainingSource) -> None:
    drafts = list(source.aspect_drafts())
    assert len(drafts) == 18
    for draft in drafts:
        subject, aspect = draft.positives[0].split()
        assert draft.query == subject
        assert aspect in draft.instruction
        other = next(a for a in ASPECTS if a != aspect)
        assert f"{subject} {other}" in draft.negatives


def test_opposed_groups_swap_labels_and_carry_no_teacher(source: TrainingSource) -> None:
    drafts = list(source.query_drafts("question"))
    opposed = [draft.contrary(random.Random(0)) for draft in drafts]
    for plain, turned in zip(drafts, opposed, strict=True):
        assert (turned.query, turned.positives, turned.negatives) == (plain.query, plain.negatives, plain.positives)
        assert turned.instruction != plain.instruction
        group = source.finish(turned, np.ones(384, dtype=np.float32))
        assert group.scores == ()
        assert not group.in_batch
        assert len(source.finish(plain, np.ones(384, dtype=np.float32)).scores) == len(
            plain.positives + plain.negatives
        )


def test_sentence_groups_hide_the_sentence(source: TrainingSource) -> None:
    for passage_id in source.ids:
        source.collection.passages[passage_id] = f"{passage_id} opens this text with some words here. " + " ".join(
            f"Word{i} follows." for i in range(40)
        )
    for draft in source.sentence_drafts(20):
        assert draft.override is not None
        assert draft.query not in draft.override
