"""The training file format: one JSON object a line, one query with its judged passages.

    {"query": "...", "instruction": "...", "positives": ["..."], "negatives": ["..."], "scores": [0.8, 0.1]}

`instruction` may be missing or empty (the checkpoint's default is used). `scores`, optional, holds one teacher
score per passage, positives first. `"in_batch": false` says that passages of other groups must not be taken as
non-relevant (an instruction that asks for unrelated passages). Nothing here knows where the judgements came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Group:
    query: str
    instruction: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    scores: tuple[float, ...] = ()  # teacher scores of positives + negatives, or empty
    in_batch: bool = True  # whether other groups' passages count as non-relevant

    @property
    def passages(self) -> tuple[str, ...]:
        return self.positives + self.negatives


def parse_group(row: dict[str, Any], where: str) -> Group:
    """Check one row; ValueError names the place, the field and what was expected."""
    for name in ("query", "positives", "negatives"):
        if name not in row:
            raise ValueError(f"{where}: field {name!r} is missing")
    if not isinstance(row["query"], str):
        raise ValueError(f"{where}: query is {row['query']!r}, expected text")
    for name in ("positives", "negatives"):
        if not isinstance(row[name], list) or not all(isinstance(text, str) for text in row[name]):
            raise ValueError(f"{where}: {name} must be a list of texts")
    group = Group(
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


def read_groups(path: Path) -> Iterator[Group]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as exc:
                    raise ValueError(f"{path}:{number}: not a JSON object ({exc})") from exc
                yield parse_group(row, f"{path}:{number}")


def write_groups(path: Path, groups: Iterable[Group]) -> int:
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
