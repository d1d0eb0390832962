from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.groups import TrainingGroup
from training.model import TrainableCheckpoint, mean_pool
from training.recipe import Recipe
from training.trainer import Trainer

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
COLOURS = ("red", "green", "blue")
GROUPS = [
    TrainingGroup(c, "", (f"{c} fish", f"{c} bird stone"), tuple(f"{o} fish" for o in COLOURS if o != c))
    for c in COLOURS
] * 4
RECIPE = Recipe(
    steps=6,
    queries_per_step=3,
    num_negatives=2,
    num_shared=1,
    max_passage_tokens=(8,),
    ratios_low=(1, 2),
    ratios_high=(4,),
    warmup_steps=2,
)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_the_mean_of_several_steps_is_exported_also_by_a_resumed_run(
    tiny: Callable[[int], TrainableCheckpoint], tmp_path: Path
) -> None:
    recipe = replace(RECIPE, mean_with=(3,))
    seen: dict[int, dict[str, torch.Tensor]] = {}
    watched = tiny(0)
    trainer = Trainer(watched, GROUPS, RECIPE, tmp_path / "watched")
    while trainer.step < 6:
        trainer.advance()
        seen[trainer.step] = weights(trainer)
    begun = tiny(0)
    first = Trainer(begun, GROUPS, recipe, tmp_path / "run")
    while first.step < 4:
        first.advance()
    first.save_state()
    ended = tiny(5)
    resumed = Trainer(ended, GROUPS, recipe, tmp_path / "run")
    resumed.resume()
    resumed.run()
    for name, value in weights(resumed).items():
        torch.testing.assert_close(value, (seen[3][name] + seen[6][name]) / 2, msg=name)


@pytest.mark.parametrize("batches_per_step", [1, 2])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    tiny: Callable[[int], TrainableCheckpoint], tmp_path: Path, batches_per_step: int
) -> None:
    recipe = replace(RECIPE, batches_per_step=batches_per_step)
    first = tiny(0)
    whole = Trainer(first, GROUPS, recipe, tmp_path / "whole")
    whole.run()
    second = tiny(0)
    broken = Trainer(second, GROUPS, recipe, tmp_path / "broken")
    for _ in range(3):
        broken.advance()
    broken.save_state()
    third = tiny(5)  # other weights: all must come from the state
    resumed = Trainer(third, GROUPS, recipe, tmp_path / "broken")
    resumed.resume()
    assert resumed.step == 3
    resumed.run()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_a_step_takes_the_mean_gradient_of_its_batches(
    tiny: Callable[[int], TrainableCheckpoint], tmp_path: Path
) -> None:
    checkpoint = tiny(0)
    recipe = replace(RECIPE, batches_per_step=2, max_grad_norm=1e9, precision="fp32")
    trainer = Trainer(checkpoint, GROUPS, recipe, tmp_path)
    (_, one), (_, other) = (trainer.gradients(number, trainer.sampler.step(number)) for number in (0, 1))
    trainer.advance()
    for parameter, first, second in zip(trainer.parameters, one, other, strict=True):
        known = [gradient for gradient in (first, second) if gradient is not None]
        if known:
            torch.testing.assert_close(parameter.grad, sum(known) / len(known))


def test_a_tiny_model_learns_its_groups_at_every_ratio(
    tiny: Callable[[int], TrainableCheckpoint], tmp_path: Path
) -> None:
    checkpoint = tiny(0)
    recipe = Recipe(
        steps=120, queries_per_step=3, num_negatives=2, num_shared=1, max_passage_tokens=(8,),
        ratios_low=(1, 2), ratios_high=(4,), learning_rate=5e-3,
        embedding_rate=1.0, warmup_steps=5, precision="fp32",
    )  # fmt: skip
    Trainer(checkpoint, GROUPS, recipe, tmp_path).run()
    loaded = TrainableCheckpoint.load(tmp_path)  # what was written ranks, not only what is in memory
    passages = [f"{c} fish" for c in COLOURS]
    with torch.inference_mode():
        states, mask = loaded.encode(loaded.passage_ids(passages))
        for ratio in (1, 2, 4):
            pooled, pooled_mask = mean_pool(states, mask, ratio)
            for i, prompt in enumerate(loaded.prompt_ids(list(COLOURS), [""] * 3)):
                margins = loaded.margins([prompt] * 3, pooled, pooled_mask)
                assert int(margins.argmax()) == i, (ratio, margins)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft reads every attribute
def test_lora_trains_few_weights_and_saves_a_plain_checkpoint(
    tiny: Callable[[int], TrainableCheckpoint], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    checkpoint = tiny(0)
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    recipe = Recipe(
        steps=4,
        queries_per_step=3,
        num_negatives=2,
        num_shared=0,
        max_passage_tokens=(8,),
        lora_rank=2,
        learning_rate=1e-2,
        precision="fp32",
    )
    trainer = Trainer(checkpoint, GROUPS, recipe, tmp_path)
    assert sum(p.numel() for p in trainer.parameters) < 0.3 * sum(value.numel() for value in before.values())
    trainer.run()
    after = TrainableCheckpoint.load(tmp_path).model.state_dict()
    assert set(after) == set(before)
    changed = {name for name in before if not torch.equal(before[name].bfloat16(), after[name].bfloat16())}
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    recipe = Recipe(steps=100, warmup_steps=10, decay_share=0.5)
    assert [round(recipe.rate(step), 2) for step in (0, 9, 49, 75, 100)] == [0.1, 1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_can_be_read(path: Path) -> None:
    assert Recipe.read(path, {"steps": 7}).steps == 7


def test_a_recipe_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="precision is 'fp8', expected bf16 or fp32"):
        Recipe(precision="fp8")
    with pytest.raises(ValueError, match="steps is 0"):
        Recipe(steps=0)
