"""Training groups: their file, the teacher's vectors beside it, and the steps that are drawn from them.

One JSON object a line of `train.jsonl`, one query with its judged passages:

    {"query": "...", "instruction": "...", "positives": ["..."], "negatives": ["..."], "scores": [0.8, 0.1]}

`instruction` may be missing or empty (the checkpoint's default is used). `scores`, optional, holds one teacher
score per passage, positives first. `"in_batch": false` says that passages of other groups must not be taken as
non-relevant (an instruction that asks for unrelated passages).

`train.npz` holds `passages` (num_passages, dim), in the order in which the file first names each text, `queries`
(num_groups, dim), unit rows, and `lexical` (num_groups,), the weight of BM25 next to the cosine for each group. Without
it a step is drawn from groups of like length. A step is a function of (seed, step) alone, so that a resumed run
continues exactly.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.model import TrainableCheckpoint
from training.teacher import Bm25


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


def _parse_group(row: dict[str, Any], where: str) -> TrainingGroup:
    """Check one row; ValueError names the place, the field and what was expected."""
    for name in ("query", "positives", "negatives"):
        if name not in row:
            raise ValueError(f"{where}: field {name!r} is missing")
    if not isinstance(row["query"], str):
        raise ValueError(f"{where}: query is {row['query']!r}, expected text")
    for name in ("positives", "negatives"):
        if not isinstance(row[name], list) or not all(isinstance(text, str) for text in row[name]):
            raise ValueError(f"{where}: {name} must be a list of texts")
    group = TrainingGroup(
        query=row["query"],
        instruction=row.get("instruction") or "",
        positives=tuple(row["positives"]),
        negatives=tuple(row["negatives"]),
        scores=tuple(row.get("scores") or ()),
        in_batch=bool(row.get("in_batch", True)),
    )
    if not group.positives:
        raise ValueError(f"{where}: positives is empty, expected at least one passage")
    if group.scores and len(group.scores) != len(group.passages):
        raise ValueError(f"{where}: {len(group.scores)} scores for {len(group.passages)} passages")
    return group


def read_groups(path: Path) -> Iterator[TrainingGroup]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as exc:
                    raise ValueError(f"{path}:{number}: not a JSON object ({exc})") from exc
                yield _parse_group(row, f"{path}:{number}")


def write_groups(path: Path, groups: Iterable[TrainingGroup]) -> int:
    """Write groups, return how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with open(path, "w", encoding="utf-8") as out:
        for group in groups:
            row = {
                k: v for k, v in asdict(group).items() if not (k == "scores" and not v) and not (k == "in_batch" and v)
            }
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


Vectors = NDArray[np.float32]

NEAR_COPY = 0.9  # a teacher cosine to the relevant passage above which another one is no fair non-relevant passage


@dataclass(frozen=True)
class TeacherVectors:
    passages: Vectors  # (num_passages, dim)
    queries: Vectors  # (num_groups, dim)
    lexical: Vectors  # (num_groups,) BM25's weight, the cosine's being 1

    @classmethod
    def read(cls, groups: Path) -> TeacherVectors | None:
        """Those beside a file of groups; None where there are none."""
        path = groups.with_suffix(".npz")
        if not path.exists():
            return None
        with np.load(path) as stored:
            return cls(*(stored[field.name].astype(np.float32) for field in fields(cls)))

    def write(self, groups: Path) -> None:
        """Beside a file of groups."""
        half = {field.name: getattr(self, field.name).astype(np.float16) for field in fields(self)}
        np.savez(groups.with_suffix(".npz"), **half)


def word_vectors(texts: list[str], dim: int = 384) -> Vectors:
    """Unit rows whose cosine is about that of tf-idf: random signs per word, summed by rarity. Costs no teacher; says
    which texts are on one subject or copies, not which one answers. -> (num_texts, dim)"""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    seen = Counter(word for counts in words for word in counts)
    signs = {
        word: np.random.default_rng(zlib.crc32(word.encode())).choice(np.array([-1, 1], dtype=np.float32), dim)
        * np.float32(np.log(len(texts) / count + 1))
        for word, count in seen.items()
        if count > 1
    }
    out = np.zeros((len(texts), dim), dtype=np.float32)
    for i, counts in enumerate(words):
        for word, count in counts.items():
            if word in signs:
                out[i] += np.sqrt(count, dtype=np.float32) * signs[word]
    out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-6)
    return out


def leaves(vectors: Vectors, size: int, rng: np.random.Generator) -> list[list[int]]:
    """Rows in lists of `size` near neighbours (a last one may be shorter): halve along a random direction until small.

    A direction joins two random rows, so that it separates subjects rather than noise; cuts fall on multiples of
    `size`.
    """
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

    def __init__(
        self,
        groups: Iterable[TrainingGroup],
        checkpoint: TrainableCheckpoint,
        vectors: TeacherVectors | None = None,
    ) -> None:
        rows: dict[str, int] = {}  # groups are read once and not kept: their texts repeat many times over
        self.queries: list[str] = []
        instructions: list[str] = []
        self.groups: list[_Tokenised] = []
        for group in groups:
            places = [rows.setdefault(text, len(rows)) for text in group.passages]
            cut = len(group.positives)
            self.groups.append(_Tokenised([], places[:cut], places[cut:], group.scores, group.in_batch))
            self.queries.append(group.query)
            instructions.append(group.instruction)
        self.table = [array("I", ids) for ids in checkpoint.passage_ids(list(rows))]
        for made, prompt in zip(self.groups, checkpoint.prompt_ids(self.queries, instructions), strict=True):
            made.prompt = prompt
        if vectors and (len(vectors.passages), len(vectors.queries)) != (len(rows), len(self.groups)):
            raise ValueError(
                f"teacher vectors are for {len(vectors.passages)} passages and {len(vectors.queries)} groups,"
                f" expected {len(rows)} and {len(self.groups)}: they belong to another file of groups"
            )
        self.vectors = vectors
        self._bm25 = Bm25(list(rows)) if vectors and vectors.lexical.any() else None

    def __len__(self) -> int:
        return len(self.groups)

    def teacher(self, number: int) -> NDArray[np.float32]:
        """The teacher's score of group `number` for every passage: the mean of the cosine and, `lexical` times
        as heavy, BM25's share of its best. nan where it cannot know what is asked for. -> (num_passages,)"""
        if self.vectors is None or not self.groups[number].scores:
            return np.full(len(self.table), np.nan, dtype=np.float32)
        scores, weight = self.vectors.passages @ self.vectors.queries[number], float(self.vectors.lexical[number])
        if self._bm25 and weight:
            matched = self._bm25.scores(self.queries[number])
            scores = (scores + weight * matched / max(float(matched.max()), 1e-6)) / (1 + weight)
        return np.asarray(scores, dtype=np.float32)


class Sampler:
    """Shuffles every epoch. With teacher vectors a step is a few leaves of groups on one subject, whose passages are
    hard for each other; without, groups of like length, to spare padding."""

    def __init__(
        self,
        data: GroupSet,
        seed: int,
        queries_per_step: int,
        num_negatives: int,
        num_shared: int,
        max_tokens: tuple[int, ...],
        leaf: int = 8,
    ) -> None:
        self.data, self.seed = data, seed
        self.queries_per_step = min(queries_per_step, len(data))
        self.num_negatives, self.num_shared, self.max_tokens = num_negatives, num_shared, max_tokens
        self.leaf = min(leaf, self.queries_per_step)
        self.steps_per_epoch = max(1, len(data) // self.queries_per_step)
        self._epoch, self._order = -1, list[list[int]]()

    def _plan(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed} epoch {epoch}")
        order = list(range(len(self.data)))
        rng.shuffle(order)
        if self.data.vectors is not None:
            subjects = self.data.vectors.passages[[self.data.groups[i].positives[0] for i in order]]
            found = leaves(subjects, self.leaf, np.random.default_rng(rng.getrandbits(63)))
            rng.shuffle(found)
            order = [order[row] for leaf in found for row in leaf]
            parts = [order[k : k + self.queries_per_step] for k in range(0, len(order), self.queries_per_step)]
            return [part for part in parts if len(part) == self.queries_per_step]
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
        chosen = self._order[number % self.steps_per_epoch % len(self._order)]
        groups = [self.data.groups[i] for i in chosen]
        cut = rng.choice(self.max_tokens)
        place: dict[int, int] = {}  # row of the passage table -> place in this step
        own: list[list[int]] = []
        for group in groups:
            drawn = rng.sample(group.negatives, min(self.num_negatives, len(group.negatives)))
            own.append([rng.choice(group.positives), *drawn])
            for row in own[-1]:
                place.setdefault(row, len(place))
        rows = list(place)
        width = 1 + self.num_negatives + self.num_shared
        candidates = torch.zeros(len(chosen), width, dtype=torch.long)
        valid = torch.zeros(len(chosen), width, dtype=torch.bool)
        teacher = torch.full((len(chosen), width), float("nan"))
        for i, (group, mine) in enumerate(zip(groups, own, strict=True)):
            known = self.data.teacher(chosen[i])
            if self.data.vectors is None and group.scores:
                known[group.positives + group.negatives] = group.scores
            full = mine + (self._shared(rows, group, mine, width - len(mine), known, rng) if group.in_batch else [])
            candidates[i, : len(full)] = torch.tensor([place[row] for row in full])
            valid[i, : len(full)] = True
            teacher[i, : len(full)] = torch.from_numpy(known[full])
        passages = [self.data.table[row][:cut].tolist() or [0] for row in rows]
        return Step(passages, [g.prompt for g in groups], candidates, valid, teacher)

    def _shared(
        self,
        rows: list[int],
        group: _Tokenised,
        mine: list[int],
        count: int,
        known: NDArray[np.float32],
        rng: random.Random,
    ) -> list[int]:
        """Passages of the step's other groups: any, or those near the top of the teacher's list, copies left out."""
        taken = {*group.positives, *group.negatives, *mine}
        others = [row for row in rows if row not in taken]
        if self.data.vectors is not None:
            table = self.data.vectors.passages
            near = table[others] @ table[mine[0]] if others else np.zeros(0)
            others = [row for row, cosine in zip(others, near.tolist(), strict=True) if cosine < NEAR_COPY]
            if not np.isnan(known[0]):
                others = sorted(others, key=lambda row: -float(known[row]))[: 3 * count]
        return rng.sample(others, min(count, len(others)))
