"""The pairs that scores are compared on: a file of the user's, or the hundred that come with preread.

The built-in ones are twenty questions with five passages each, from the answer to nonsense: eight in
English, eight in Korean, four that mix both; nine of the questions have an instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from encoder_worker.sources import Place
from tuning import EvaluationError
from tuning.trec import JudgedFile

Margins = NDArray[np.float32]  # (num_pairs,)
MIN_PAIRS = 2  # fewer have no order to compare
_BUILT_IN = Path(__file__).parent / "pairs.jsonl"
_PASSAGE_FIELDS = ("passage", "text", "document")


class TextTriple(NamedTuple):
    """A query, its instruction if any, and one passage: the order in which cross-encoders take them."""

    query: str
    instruction: str | None
    passage: str


@dataclass(frozen=True)
class PairSet:
    """Pairs and where they came from."""

    name: str
    pairs: Sequence[TextTriple]

    @classmethod
    def read(cls, path: Path | None = None) -> PairSet:
        """JSON lines of `query`, `passage` (or `text`, `document`) and perhaps `instruction`; None: the built-in pairs.

        Raises EvaluationError naming the line that is no pair.
        """
        pairs = [_pair(where, row) for where, row in JudgedFile(path or _BUILT_IN).rows()]
        if len(pairs) < MIN_PAIRS:
            raise EvaluationError(f"{path}: {len(pairs)} pairs; expected at least {MIN_PAIRS}")
        return cls(str(path) if path is not None else "built-in pairs", pairs)

    def __len__(self) -> int:
        return len(self.pairs)


def _pair(where: Place, row: dict[str, Any]) -> TextTriple:
    passage = next((name for name in _PASSAGE_FIELDS if name in row), None)
    if "query" not in row or passage is None:
        raise EvaluationError(f"{where}: fields {', '.join(row) or 'none'}; expected query and passage")
    for name in ("query", passage, "instruction"):
        value = row.get(name)
        default = name == "instruction" and value in (None, "")  # the model's
        if not default and (not isinstance(value, str) or not value.strip()):
            raise EvaluationError(f"{where}: {name} is {value!r}; expected a text")
    return TextTriple(row["query"], row.get("instruction"), row[passage])
