"""Which groups and passages a step sees: a function of (seed, step) alone, so that a resumed run goes on exactly."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from training.checkpoint_dir import Checkpoint
from training.groups import Group


@dataclass
class TokenisedGroup:
    prompt: list[int]
    positives: list[int]  # rows of the passage table
    negatives: list[int]
    scores: tuple[float, ...]
    in_batch: bool


@dataclass
class Step:
    """Passages are listed once and shared by all queries. K = candidates a query is scored against."""

    passages: list[list[int]]  # token ids
    prompts: list[list[int]]  # token ids, one per query
    candidates: torch.Tensor  # (num_queries, K) rows of `passages`
    valid: torch.Tensor  # (num_queries, K) bool; candidate 0 is the relevant one
    teacher: torch.Tensor  # (num_queries, K) teacher scores, nan where unknown


class GroupSet:
    """All groups of a training file, every distinct passage tokenised once."""

    def __init__(self, groups: Iterable[Group], checkpoint: Checkpoint) -> None:
        rows: dict[str, int] = {}  # groups are read once and let go: their texts repeat many times over
        queries: list[str] = []
        instructions: list[str] = []
        self.groups: list[TokenisedGroup] = []
        for group in groups:
            places = [rows.setdefault(text, len(rows)) for text in group.passages]
            cut = len(group.positives)
            self.groups.append(TokenisedGroup([], places[:cut], places[cut:], group.scores, group.in_batch))
            queries.append(group.query)
            instructions.append(group.instruction)
        self.table = [array("I", ids) for ids in checkpoint.passage_ids(list(rows))]
        for made, prompt in zip(self.groups, checkpoint.prompt_ids(queries, instructions), strict=True):
            made.prompt = prompt

    def __len__(self) -> int:
        return len(self.groups)


class Sampler:
    """Shuffles every epoch, keeps groups of like length in one step to spare padding."""

    def __init__(
        self,
        data: GroupSet,
        seed: int,
        queries_per_step: int,
        num_negatives: int,
        num_shared: int,
        max_tokens: tuple[int, ...],
    ) -> None:
        self.data, self.seed = data, seed
        self.queries_per_step = min(queries_per_step, len(data))
        self.num_negatives, self.num_shared, self.max_tokens = num_negatives, num_shared, max_tokens
        self.steps_per_epoch = max(1, len(data) // self.queries_per_step)
        self._epoch, self._order = -1, list[list[int]]()

    def _plan(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed} epoch {epoch}")
        order = list(range(len(self.data)))
        rng.shuffle(order)
        steps, pool = [], 40 * self.queries_per_step
        for start in range(0, len(order), pool):
            part = sorted(
                order[start : start + pool], key=lambda i: len(self.data.table[self.data.groups[i].positives[0]])
            )
            steps += [part[k : k + self.queries_per_step] for k in range(0, len(part), self.queries_per_step)]
        steps = [s for s in steps if len(s) == self.queries_per_step]
        rng.shuffle(steps)
        return steps

    def step(self, number: int) -> Step:
        epoch = number // self.steps_per_epoch
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._plan(epoch)
        rng = random.Random(f"{self.seed} step {number}")
        chosen = [self.data.groups[i] for i in self._order[number % self.steps_per_epoch % len(self._order)]]
        cut = rng.choice(self.max_tokens)
        place: dict[int, int] = {}
        own: list[list[tuple[int, float]]] = []
        for group in chosen:
            scores = dict(zip(group.positives + group.negatives, group.scores or [float("nan")] * 99, strict=False))
            rows = [
                rng.choice(group.positives),
                *rng.sample(group.negatives, min(self.num_negatives, len(group.negatives))),
            ]
            own.append([(place.setdefault(row, len(place)), scores[row]) for row in rows])
        width = 1 + self.num_negatives + self.num_shared
        candidates = torch.zeros(len(chosen), width, dtype=torch.long)
        valid = torch.zeros(len(chosen), width, dtype=torch.bool)
        teacher = torch.full((len(chosen), width), float("nan"))
        for i, (group, mine) in enumerate(zip(chosen, own, strict=True)):
            taken = {place[row] for row in group.positives + group.negatives if row in place}
            others = [k for k in range(len(place)) if k not in taken] if group.in_batch else []
            full = mine + [(k, float("nan")) for k in rng.sample(others, min(width - len(mine), len(others)))]
            for k, (row, score) in enumerate(full):
                candidates[i, k], valid[i, k], teacher[i, k] = row, True, score
        passages = [self.data.table[row][:cut].tolist() or [0] for row in place]
        return Step(passages, [g.prompt for g in chosen], candidates, valid, teacher)
