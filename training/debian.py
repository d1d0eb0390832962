"""Debian package descriptions as a collection: the short line is the query, the long body its passage.

The lists are fetched by apt-get into a private folder, whose paths never touch the system's own lists.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

from training.collections_io import Collection

APT_HELPER = "/usr/lib/apt/apt-helper"


def fetch_lists(folder: Path) -> list[Path]:
    """Download the English description lists into `folder` unless they are there, and name them."""
    if not list(folder.glob("*Translation-en*")):
        (folder / "partial").mkdir(parents=True, exist_ok=True)
        options = [
            "Acquire::Languages=en",
            "Acquire::IndexTargets::deb::Translations::DefaultEnabled=true",
            f"Dir::State::Lists={folder.resolve()}",
        ]
        subprocess.run(["apt-get", *(part for option in options for part in ("-o", option)), "update"], check=True)
    lists = sorted(folder.glob("*Translation-en*"))
    if not lists:
        raise FileNotFoundError(f"{folder}: apt-get update left no *Translation-en* list")
    return lists


def read_descriptions(lists: list[Path]) -> Collection:
    """Short line -> body, bodies of at least eight words; equal bodies are one passage with several queries."""
    collection = Collection("debian")
    seen: set[tuple[str, str]] = set()
    for path in lists:
        text = subprocess.run([APT_HELPER, "cat-file", str(path)], check=True, capture_output=True).stdout.decode(
            "utf-8", "replace"
        )
        for stanza in text.split("\n\n"):
            match = re.search(r"^Description-en: (.*)\n((?: .*\n?)*)", stanza + "\n", re.MULTILINE)
            if match is None:
                continue
            short, body = match.group(1).strip(), clean_body(match.group(2))
            if len(body.split()) < 8 or len(short.split()) < 2 or (short, body) in seen:
                continue
            seen.add((short, body))
            passage_id = "d" + hashlib.sha256(body.encode()).hexdigest()[:12]
            query_id = "q" + hashlib.sha256(short.encode()).hexdigest()[:12]
            collection.passages[passage_id] = body
            collection.queries[query_id] = short
            collection.qrels.setdefault(query_id, {})[passage_id] = 1
    return collection


def clean_body(body: str) -> str:
    """Join the wrapped lines of a description; ` .` lines are paragraph breaks."""
    return re.sub(r"\s+", " ", " ".join(line.strip() for line in body.split("\n") if line.strip() != ".")).strip()
