from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from training.batches import GroupSet, Sampler
from training.checkpoint_dir import Checkpoint
from training.groups import Group

GROUPS = [
    Group("red", "", ("red fish", "red bird"), ("green stone", "blue stone"), (0.9, 0.8, 0.1, 0.2)),
    Group("green", "", ("green fish",), ("blue river", "red cloud")),
    Group("blue", "find passages not about the query", ("green stone",), ("blue stone",), in_batch=False),
    Group("north", "", ("north river",), ("south river",)),
]


@pytest.fixture
def sampler(tiny: Callable[[int], Checkpoint]) -> Sampler:
    return Sampler(
        GroupSet(GROUPS, tiny(0)), seed=1, queries_per_step=4, num_negatives=2, num_shared=2, max_tokens=(8,)
    )


def test_candidate_zero_is_relevant_and_passages_are_listed_once(
    sampler: Sampler, tiny: Callable[[int], Checkpoint]
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


def test_every_group_is_seen_once_an_epoch(tiny: Callable[[int], Checkpoint]) -> None:
    groups = [Group(q, "", (f"{q} fish",), ("stone",)) for q in ("red", "green", "blue", "north", "south", "river")]
    sampler = Sampler(
        GroupSet(groups, tiny(0)), seed=0, queries_per_step=2, num_negatives=1, num_shared=0, max_tokens=(8,)
    )
    seen = sorted(tuple(p) for number in range(sampler.steps_per_epoch) for p in sampler.step(number).prompts)
    assert len(seen) == len(set(seen)) == 6
