"""Code and pages use the field's words: none of the phrases that readers stumbled over comes back."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BANNED = re.compile(
    r"\b(anew|under way|of its own|by itself|for ever|askings?|whoever|nobody|let go|turned round)\b", re.IGNORECASE
)
READ = {".md", ".py", ".proto", ".toml", ".yaml", ".html", ".js", ".sh", ""}
SKIPPED = ("benchmarks/results/", "examples/scifact/", "tests/", "LICENSE")


def test_no_banned_phrase() -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    found = []
    for name in names:
        path = ROOT / name
        if name.startswith(SKIPPED) or path.suffix not in READ or "_pb2" in name or not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found += [f"{name}:{number}: {match[0]}" for match in BANNED.finditer(line)]
    assert not found, "\n".join(found)
