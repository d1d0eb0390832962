"""Training groups, the teacher's vectors beside their file, and the steps that are drawn from them.

training/README.md describes `train.jsonl`. `train.npz` next to it holds the fields of TeacherVectors in float16, the
passages in the order in which the file first names each text. A step is a function of (seed, step) alone, so that a
resumed run continues exactly.
"""

import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from training.collections import read_jsonl
from training.model import TrainableCheckpoint
from training.recipe import Recipe
from training.teacher import Bm25

NEAR_COPY = 0.9  # a teacher cosine to the relevant passage above which another one is no fair non-relevant passage
_REQUIRED = (("query", str, "text"), ("positives", list, "a list of texts"), ("negatives", list, "a list of texts"))


@dataclass(frozen=True)
class TrainingGroup:
    query: str
    instruction: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    scores: tuple[float, ...] = ()  # teacher scores of positives + negatives, or empty
    in_batch: bool = True  # whether other groups' passages count as non-relevant

    @property
    def passages(self) -> tuple[str, ...]:
        return self.positives + self.negatives

    @classmethod
    def read(cls, path: Path) -> Iterator[Self]:
        """Read a file of groups; ValueError names the line, the field and the expectation."""
        for where, row in read_jsonl(path):
            for name, kind, expected in _REQUIRED:
                if name not in row:
                    raise ValueError(f"{where}: field {name!r} is missing")
                value = row[name]
                if not isinstance(value, kind) or not all(isinstance(part, str) for part in value):
                    raise ValueError(f"{where}: {name} is {value!r:.80}, expected {expected}")
            if not row["positives"]:
                raise ValueError(f"{where}: positives is empty, expected at least one passage")
            texts, scores = (tuple(row["positives"]), tuple(row["negatives"])), tuple(row.get("scores") or ())
            group = cls(row["query"], row.get("instruction") or "", *texts, scores, bool(row.get("in_batch", True)))
            if scores and len(scores) != len(group.passages):
                raise ValueError(f"{where}: {len(scores)} scores for {len(group.passages)} passages")
            yield group

    def row(self) -> dict[str, Any]:
        """A JSON object as `read` takes it, fields with their default left out."""
        return {k: v for k, v in asdict(self).items() if (k, v) not in (("scores", ()), ("in_batch", True))}


@dataclass(frozen=True)
class TeacherVectors:
    passages: NDArray[np.float32]  # (num_passages, dim) unit rows
    queries: NDArray[np.float32]  # (num_groups, dim) unit rows; zeros where the teacher did not read
    lexical: NDArray[np.float32]  # (num_groups,) BM25's weight, the cosine's being 1

    def write(self, groups: Path) -> None:
        """Beside a file of groups."""
        np.savez(groups.with_suffix(".npz"), **{f.name: getattr(self, f.name).astype(np.float16) for f in fields(self)})

    @classmethod
    def read(cls, groups: Path) -> Self | None:
        """Read the file beside a file of groups; None where there is none."""
        path = groups.with_suffix(".npz")
        if not path.exists():
            return None
        with np.load(path) as stored:
            return cls(*(stored[f.name].astype(np.float32) for f in fields(cls)))


def leaves(vectors: NDArray[np.float32], size: int, rng: np.random.Generator) -> list[list[int]]:
    """Rows in lists of `size` near neighbours, a last one maybe shorter: halved along directions that join two rows."""
    done: list[list[int]] = []
    todo = [np.arange(len(vectors))]
    while todo:
        rows = todo.pop()
        if len(rows) <= size:
            done.append(rows.tolist())
            continue
        one, other = rng.choice(rows, 2, replace=False)
        order = rows[np.argsort(vectors[rows] @ (vectors[one] - vectors[other]), kind="stable")]
        cut = max(1, len(rows) // (2 * size)) * size
        todo += [order[cut:], order[:cut]]
    return done


@dataclass
class _Tokenised:
    query: str
    positives: list[int]  # rows of the passage table
    negatives: list[int]
    scores: tuple[float, ...]
    in_batch: bool
    prompt: list[int]


@dataclass
class Step:
    """Passages are listed once and shared by all queries. K = candidates a query is scored against."""

    passages: list[list[int]]  # token ids
    prompts: list[list[int]]  # token ids, one per query
    candidates: torch.Tensor  # (num_queries, K) rows of `passages`
    valid: torch.Tensor  # (num_queries, K) bool; candidate 0 is the relevant one
    teacher: torch.Tensor  # (num_queries, K) teacher scores, nan where unknown


class Sampler:
    """All groups of a training file, every distinct passage tokenised once, shuffled every epoch.

    With teacher vectors a step is a few leaves of groups on one subject, whose passages are hard for each other;
    without, groups of like length, to spare padding.
    """

    def __init__(
        self,
        groups: Iterable[TrainingGroup],
        checkpoint: TrainableCheckpoint,
        recipe: Recipe,
        vectors: TeacherVectors | None = None,
    ) -> None:
        rows: dict[str, int] = {}  # groups are read once and not kept: their texts repeat many times over
        instructions: list[str] = []
        self.groups: list[_Tokenised] = []
        for group in groups:
            places = [rows.setdefault(text, len(rows)) for text in group.passages]
            cut = len(group.positives)
            self.groups.append(_Tokenised(group.query, places[:cut], places[cut:], group.scores, group.in_batch, []))
            instructions.append(group.instruction)
        self.table = [array("I", ids) for ids in checkpoint.passage_ids(list(rows))]
        prompts = checkpoint.prompt_ids([made.query for made in self.groups], instructions)
        for made, prompt in zip(self.groups, prompts, strict=True):
            made.prompt = prompt
        if vectors and (len(vectors.passages), len(vectors.queries)) != (len(rows), len(self.groups)):
            found = f"{len(vectors.passages)} passages and {len(vectors.queries)} groups"
            expected = f"expected {len(rows)} and {len(self.groups)}: they belong to another file of groups"
            raise ValueError(f"teacher vectors are for {found}, {expected}")
        self.vectors, self.recipe = vectors, recipe
        self._bm25 = Bm25(list(rows)) if vectors and vectors.lexical.any() else None
        self._queries_per_step = min(recipe.queries_per_step, len(self.groups))
        self.steps_per_epoch = len(self.groups) // self._queries_per_step
        self._epoch, self._order = -1, list[list[int]]()

    def teacher(self, number: int) -> NDArray[np.float32]:
        """The teacher's score of group `number` for every passage. -> (num_passages,), nan where it knows none

        With vectors: the mean of the cosine and, `lexical` times as heavy, BM25's share of its best.
        """
        group = self.groups[number]
        if not group.scores or self.vectors is None:
            known = np.full(len(self.table), np.nan, dtype=np.float32)
            if group.scores:
                known[group.positives + group.negatives] = group.scores
            return known
        scores, weight = self.vectors.passages @ self.vectors.queries[number], float(self.vectors.lexical[number])
        if self._bm25 and weight:
            matched = self._bm25.scores(group.query)
            scores = (scores + weight * matched / max(float(matched.max()), 1e-6)) / (1 + weight)
        return np.asarray(scores, dtype=np.float32)

    def _plan(self, epoch: int) -> list[list[int]]:
        """Numbers of the groups of each step; groups that do not fill a last step are left out."""
        rng, size = random.Random(f"{self.recipe.seed} epoch {epoch}"), self._queries_per_step
        order = list(range(len(self.groups)))
        rng.shuffle(order)
        if self.vectors is not None:
            subjects = self.vectors.passages[[self.groups[i].positives[0] for i in order]]
            found = leaves(subjects, min(self.recipe.leaf, size), np.random.default_rng(rng.getrandbits(63)))
            rng.shuffle(found)
            order = [order[row] for leaf in found for row in leaf]
        else:
            lengths = [len(self.table[group.positives[0]]) for group in self.groups]
            pools = [order[start : start + 40 * size] for start in range(0, len(order), 40 * size)]
            order = [i for pool in pools for i in sorted(pool, key=lengths.__getitem__)]
        steps = [order[k : k + size] for k in range(0, len(order) - size + 1, size)]
        if self.vectors is None:
            rng.shuffle(steps)
        return steps

    def step(self, number: int) -> Step:
        epoch, place_in_epoch = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._plan(epoch)
        rng, recipe = random.Random(f"{self.recipe.seed} step {number}"), self.recipe
        chosen = self._order[place_in_epoch]
        cut = rng.choice(recipe.max_passage_tokens)
        own: list[list[int]] = []
        for group in (self.groups[i] for i in chosen):
            drawn = rng.sample(group.negatives, min(recipe.num_negatives, len(group.negatives)))
            own.append([rng.choice(group.positives), *drawn])
        rows = list(dict.fromkeys(row for mine in own for row in mine))
        place = {row: at for at, row in enumerate(rows)}  # row of the passage table -> place in this step
        size = (len(chosen), 1 + recipe.num_negatives + recipe.num_shared)
        candidates, valid = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.bool)
        teacher = torch.full(size, float("nan"))
        for i, mine in enumerate(own):
            known = self.teacher(chosen[i])
            full = mine + self._shared(rows, self.groups[chosen[i]], mine, known, rng)
            candidates[i, : len(full)] = torch.tensor([place[row] for row in full])
            valid[i, : len(full)] = True
            teacher[i, : len(full)] = torch.from_numpy(known[full])
        passages = [self.table[row][:cut].tolist() or [0] for row in rows]
        return Step(passages, [self.groups[i].prompt for i in chosen], candidates, valid, teacher)

    def _shared(
        self, rows: list[int], group: _Tokenised, mine: list[int], known: NDArray[np.float32], rng: random.Random
    ) -> list[int]:
        """Passages of the step's other groups: any, or those near the top of the teacher's list, copies left out."""
        if not group.in_batch:
            return []
        count = 1 + self.recipe.num_negatives + self.recipe.num_shared - len(mine)
        taken = {*group.positives, *group.negatives, *mine}
        others = [row for row in rows if row not in taken]
        if self.vectors is not None and others:
            near = self.vectors.passages[others] @ self.vectors.passages[mine[0]]
            others = [row for row, cosine in zip(others, near.tolist(), strict=True) if cosine < NEAR_COPY]
            if not np.isnan(known[0]):
                others = sorted(others, key=lambda row: -float(known[row]))[: 3 * count]
        return rng.sample(others, min(count, len(others)))
