"""Tables say what was measured, and writing them into a page twice is writing them once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmarks.common as common
from benchmarks.__main__ import MARKED, block

ROWS = [{"way": "a", "r": 1, "ms": 0.012345}, {"way": "b", "r": 1, "ms": 1234.5}, {"way": "a", "r": 32, "ms": 20}]


def test_a_pivot_has_a_column_for_each_value_and_leaves_open_what_was_not_measured() -> None:
    assert common.pivot(ROWS, "way", "r", "ms").splitlines() == [
        "| way | 1      | 32 |",
        "| --- | ------ | -- |",
        "| a   | 0.0123 | 20 |",
        "| b   | 1,234  |    |",
    ]


def test_a_page_says_what_its_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    result = {"hardware": {"cores": 2}, "columns": ["way", "ms"], "rows": [["a", 1.5]]}
    (tmp_path / "memory.json").write_text(json.dumps(result))
    page = "before\n<!-- memory -->\nold\n<!-- end -->\nbetween\n<!-- online -->\n<!-- end -->\nafter\n"
    written = MARKED.sub(block, page)
    assert "| a   | 1.5 |" in written
    assert "cores 2" in written
    assert "old" not in written
    assert written.startswith("before\n<!-- memory -->")
    assert written.endswith("between\n<!-- online -->\n<!-- end -->\nafter\n")  # nothing was measured of it
    assert MARKED.sub(block, written) == written
