"""Teacher vectors kept beside a file of groups, and what they are for: which groups belong together in a step.

`train.npz` beside `train.jsonl`: `passages` (num_passages, dim), in the order in which the file first names each text,
`queries` (num_groups, dim), unit rows, and `lexical` (num_groups,), how much BM25 counts beside the cosine for each
group. Without the file a step is drawn from groups of like length.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class TeacherVectors:
    passages: Vectors  # (num_passages, dim)
    queries: Vectors  # (num_groups, dim)
    lexical: Vectors  # (num_groups,) BM25's weight, the cosine's being 1


def vectors_path(groups: Path) -> Path:
    return groups.with_suffix(".npz")


def write_vectors(path: Path, vectors: TeacherVectors) -> None:
    half = {name: getattr(vectors, name).astype(np.float16) for name in ("passages", "queries", "lexical")}
    np.savez(path, **half)


def read_vectors(path: Path) -> TeacherVectors | None:
    """None where there is no such file."""
    if not path.exists():
        return None
    with np.load(path) as stored:
        return TeacherVectors(*(stored[name].astype(np.float32) for name in ("passages", "queries", "lexical")))


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
