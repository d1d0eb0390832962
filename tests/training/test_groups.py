from __future__ import annotations

from pathlib import Path

import pytest

from training.collections import write_jsonl
from training.groups import TrainingGroup


def test_groups_survive_a_round_trip(tmp_path: Path) -> None:
    groups = [
        TrainingGroup("red fish", "", ("a",), ("b", "c"), (0.5, 0.25, 0.125)),
        TrainingGroup("red fish", "not the query", ("b", "c"), ("a",), in_batch=False),
    ]
    write_jsonl(tmp_path / "g.jsonl", (group.row() for group in groups))
    assert list(TrainingGroup.read(tmp_path / "g.jsonl")) == groups


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "positives": ["a"]}', "field 'negatives' is missing"),
        ('{"query": 3, "positives": ["a"], "negatives": []}', "query is 3, expected text"),
        ('{"query": "q", "positives": [], "negatives": ["b"]}', "positives is empty"),
        ('{"query": "q", "positives": ["a"], "negatives": ["b"], "scores": [1]}', "1 scores for 2 passages"),
        ("{", "not a JSON object"),
    ],
)
def test_an_error_names_file_line_and_expectation(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "g.jsonl").write_text('{"query": "q", "positives": ["a"], "negatives": []}\n' + line + "\n")
    with pytest.raises(ValueError, match="g.jsonl:2: .*" + message):
        list(TrainingGroup.read(tmp_path / "g.jsonl"))
