"""Pages of docs/engines: their blocks, and the sizes that they name."""

from __future__ import annotations

import re
from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs" / "engines"


def blocks(page: str, language: str) -> list[str]:
    """Contents of a page's blocks of this language, in order; "" for those without one."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (PAGES / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)
    return [text for named, text in fenced if named == language]


def says(page: str, size: str) -> None:
    """The page has this size, and its row of the index the number."""
    assert size in " ".join((PAGES / f"{page}.md").read_text().split())
    (row,) = [line for line in (PAGES / "README.md").read_text().splitlines() if f"]({page}.md)" in line]
    assert f"| {size.split(' ')[0]}" in row
