"""docs/operations.md has today's settings: flags, defaults, bounds and words come from the configurations' fields."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "settings-table"


def test_the_tables_are_those_of_the_options() -> None:
    script = runpy.run_path(str(SCRIPT))
    assert script["PAGE"].read_text() == script["page"](), "run scripts/settings-table"
