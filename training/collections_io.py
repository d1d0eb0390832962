"""Read and write judged collections in the BEIR layout.

Knows files only: which collection is a training source and which is kept for evaluation is decided elsewhere.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Collection:
    """Passages, queries and graded judgements; a passage is its title, a space and its text."""

    name: str
    passages: dict[str, str] = field(default_factory=dict)  # passage_id -> text
    titles: dict[str, str] = field(default_factory=dict)  # passage_id -> title, where there is one
    queries: dict[str, str] = field(default_factory=dict)  # query_id -> text
    splits: dict[str, str] = field(default_factory=dict)  # query_id -> the source's own split, where it has one
    qrels: dict[str, dict[str, int]] = field(default_factory=dict)  # query_id -> {passage_id: grade}


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .jsonl.gz file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows one a line; .gz names are gzipped, with no timestamp, so that equal rows give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def _existing(folder: Path, stem: str) -> Path:
    for name in (f"{stem}.jsonl.gz", f"{stem}.jsonl"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder}: expected {stem}.jsonl or {stem}.jsonl.gz (BEIR layout)")


def read_collection(folder: Path) -> Collection:
    """A BEIR folder: corpus.jsonl[.gz], queries.jsonl[.gz], qrels.tsv with one header line."""
    collection = Collection(folder.name)
    for row in read_jsonl(_existing(folder, "corpus")):
        title = row.get("title") or ""
        collection.passages[row["_id"]] = f"{title} {row['text']}".strip()
        if title:
            collection.titles[row["_id"]] = title
    for row in read_jsonl(_existing(folder, "queries")):
        collection.queries[row["_id"]] = row["text"]
        if "split" in row:
            collection.splits[row["_id"]] = row["split"]
    for line in (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query_id, passage_id, grade = line.split("\t")
        collection.qrels.setdefault(query_id, {})[passage_id] = int(grade)
    return collection


def write_collection(folder: Path, collection: Collection) -> None:
    """Write a BEIR folder; titles are already part of the passage text and are not written again."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(
        folder / "corpus.jsonl.gz", ({"_id": i, "title": "", "text": t} for i, t in collection.passages.items())
    )
    write_jsonl(folder / "queries.jsonl.gz", ({"_id": i, "text": t} for i, t in collection.queries.items()))
    lines = ["query-id\tcorpus-id\tscore"]
    lines += [f"{q}\t{p}\t{g}" for q, grades in collection.qrels.items() for p, g in grades.items()]
    (folder / "qrels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
