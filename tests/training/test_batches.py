from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from training.groups import NEAR_COPY, Sampler, TeacherVectors, TrainingGroup, leaves
from training.model import TrainableCheckpoint
from training.recipe import Recipe
from training.teacher import word_vectors

GROUPS = [
    TrainingGroup("red", "", ("red fish", "red bird"), ("green stone", "blue stone"), (0.9, 0.8, 0.1, 0.2)),
    TrainingGroup("green", "", ("green fish",), ("blue river", "red cloud"), (0.9, 0.1, 0.2)),
    TrainingGroup("blue", "find passages not about the query", ("green stone",), ("blue stone",), in_batch=False),
    TrainingGroup("north", "", ("north river",), ("south river",)),
]


@pytest.fixture
def sampler(tiny: Callable[[int], TrainableCheckpoint]) -> Sampler:
    recipe = Recipe(seed=1, queries_per_step=4, num_negatives=2, num_shared=2, max_passage_tokens=(8,))
    return Sampler(GROUPS, tiny(0), recipe)


def test_candidate_zero_is_relevant_and_passages_are_listed_once(
    sampler: Sampler, tiny: Callable[[int], TrainableCheckpoint]
) -> None:
    checkpoint = tiny(0)
    prompts = [tuple(p) for p in checkpoint.prompt_ids([g.query for g in GROUPS], [g.instruction for g in GROUPS])]
    for number in range(20):
        step = sampler.step(number)
        assert len({tuple(p) for p in step.passages}) == len(step.passages)
        for i, prompt in enumerate(step.prompts):
            group = GROUPS[prompts.index(tuple(prompt))]
            texts = [
                checkpoint.tokenizer.decode(step.passages[int(c)])
                for c, ok in zip(step.candidates[i], step.valid[i], strict=True)
                if ok
            ]
            assert texts[0] in group.positives
            assert not set(texts[1:]) & set(group.positives)
            if not group.in_batch:
                assert set(texts) <= set(group.passages)
            if group.scores:
                known = dict(zip(group.passages, group.scores, strict=True))
                for text, score in zip(texts, step.teacher[i].tolist(), strict=False):
                    assert score != score or score == pytest.approx(known[text])


def test_a_step_is_a_function_of_seed_and_number(sampler: Sampler) -> None:
    first, later, again = sampler.step(3), sampler.step(7), sampler.step(3)
    assert first.passages == again.passages
    assert torch.equal(first.candidates, again.candidates)
    assert first.passages != later.passages or not torch.equal(first.candidates, later.candidates)


def test_every_group_is_seen_once_an_epoch(tiny: Callable[[int], TrainableCheckpoint]) -> None:
    groups = [
        TrainingGroup(q, "", (f"{q} fish",), ("stone",)) for q in ("red", "green", "blue", "north", "south", "river")
    ]
    recipe = Recipe(queries_per_step=2, num_negatives=1, num_shared=0, max_passage_tokens=(8,))
    sampler = Sampler(groups, tiny(0), recipe)
    seen = sorted(tuple(p) for number in range(sampler.steps_per_epoch) for p in sampler.step(number).prompts)
    assert len(seen) == len(set(seen)) == 6


def unit(rows: list[list[float]]) -> np.ndarray:
    made = np.array(rows, dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.fixture
def with_vectors(tiny: Callable[[int], TrainableCheckpoint]) -> Sampler:
    """Passages in the order GROUPS first names them; the first query knows BM25 too."""
    passages = unit([[i + 1.0, (i * 5) % 7, 1.0] for i in range(9)])
    vectors = TeacherVectors(passages, unit([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]), np.array([1.0, 0, 0, 0]))
    recipe = Recipe(seed=1, queries_per_step=4, num_negatives=1, num_shared=2, max_passage_tokens=(8,), leaf=2)
    return Sampler(GROUPS, tiny(0), recipe, vectors)


def test_teacher_vectors_score_shared_passages_too_and_copies_are_left_out(with_vectors: Sampler) -> None:
    data = with_vectors
    assert data.vectors is not None
    table = {tuple(ids): row for row, ids in enumerate(data.table)}
    shared = 0
    for number in range(20):
        step = with_vectors.step(number)
        for i, prompt in enumerate(step.prompts):
            which = next(k for k, g in enumerate(data.groups) if g.prompt == prompt)
            rows = [table[tuple(step.passages[int(c)])] for c in step.candidates[i][step.valid[i]]]
            expected = data.vectors.passages[rows] @ data.vectors.queries[which]
            known = step.teacher[i][step.valid[i]]
            if not data.groups[which].scores:
                assert known.isnan().all()
            elif not data.vectors.lexical[which]:
                assert known.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
            for row in rows[2:]:
                shared += 1
                assert data.vectors.passages[row] @ data.vectors.passages[rows[0]] < NEAR_COPY
    assert shared


def test_the_lexical_half_of_the_teacher_is_bm25_over_its_best(with_vectors: Sampler) -> None:
    data = with_vectors
    assert data.vectors is not None
    scores = data.teacher(0) * 2 - data.vectors.passages @ data.vectors.queries[0]  # query `red`
    texts = list(dict.fromkeys(text for group in GROUPS for text in group.passages))
    assert max(scores) == pytest.approx(1, abs=1e-5)
    assert [bool(score > 1e-5) for score in scores] == ["red" in text.split() for text in texts]


def test_vectors_of_another_file_are_refused(tiny: Callable[[int], TrainableCheckpoint]) -> None:
    vectors = TeacherVectors(unit([[1, 0]]), unit([[1, 0]]), np.zeros(1))
    with pytest.raises(ValueError, match="vectors are for 1 passages and 1 groups, expected 9 and 4"):
        Sampler(GROUPS, tiny(0), Recipe(), vectors)


def test_leaves_hold_every_row_once_and_near_rows_together() -> None:
    rng = np.random.default_rng(0)
    centres = unit(rng.normal(size=(8, 16)).tolist())
    rows = unit((centres.repeat(4, 0) + 0.01 * rng.normal(size=(32, 16))).tolist())
    found = leaves(rows, 4, rng)
    assert sorted(row for leaf in found for row in leaf) == list(range(32))
    assert all(len(leaf) == 4 for leaf in found)
    assert sum(len({row // 4 for row in leaf}) == 1 for leaf in found) >= 4


def test_word_vectors_are_near_where_rare_words_are_shared() -> None:
    texts = ["the red fish", "the red fish swims", "the blue bird", "the blue bird sings", "the red fish"]
    vectors = word_vectors(texts, dim=256)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[4] == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
