"""Judged collections in the BEIR layout, their held-out split, Debian's descriptions, and instructions."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from networkx.utils import UnionFind  # type: ignore[import-untyped]

APT_HELPER = "/usr/lib/apt/apt-helper"
# The instructions a checkpoint is trained to follow, in several wordings each, and their opposites.
DEFAULT = "Retrieve passages that answer the query"

TASKS: dict[str, tuple[str, ...]] = {
    "question": (
        "Given a question, retrieve passages that answer the question",
        "Find the passage that answers this question",
        "Retrieve answers to the medical question",
    ),
    "package": (
        "Given a short description, retrieve the package it describes",
        "Find the software package that fits the description",
        "Retrieve the full description of this software",
    ),
    "claim": (
        "Given a scientific claim, retrieve abstracts that support or refute the claim",
        "Find scientific evidence for or against the claim",
    ),
    "title": (
        "Given a title, retrieve the abstract of the paper",
        "Find research papers on this subject",
        "Retrieve abstracts about the topic",
    ),
    "sentence": (
        "Given a sentence, retrieve the document it belongs to",
        "Find documents about the same subject as the text",
    ),
    "opposed": (
        "Retrieve passages that do not answer the query",
        "Find passages that are not about the query",
        "Retrieve passages about something else than the query",
        "Given a query, retrieve passages from a different topic",
    ),
}

ASPECTS: dict[str, tuple[str, str]] = {  # name -> (how MedQuAD asks for it, how an instruction asks for it)
    "overview": (r"^what is \(are\) (.+?) ?\?$", "the definition and overview"),
    "symptoms": (r"^what are the symptoms of (.+?) ?\?$", "the symptoms"),
    "treatments": (r"^what are the treatments for (.+?) ?\?$", "the treatments"),
    "genetics": (r"^what are the genetic changes related to (.+?) ?\?$", "the genetic changes"),
    "causes": (r"^what causes (.+?) ?\?$", "the causes"),
    "inheritance": (r"^is (.+?) inherited ?\?$", "the inheritance"),
    "diagnosis": (r"^how to diagnose (.+?) ?\?$", "the diagnosis"),
    "frequency": (r"^how many people are affected by (.+?) ?\?$", "the number of people affected"),
    "outlook": (r"^what is the outlook for (.+?) ?\?$", "the outlook"),
    "risk": (r"^who is at risk for (.+?)\?? ?\?$", "who is at risk"),
    "prevention": (r"^how to prevent (.+?) ?\?$", "the prevention"),
}
ASPECT_WORDINGS = (
    "Retrieve passages about {aspect}",
    "Given a topic, find the passage that describes {aspect}",
    "Find passages on {aspect} of the query",
)


@dataclass
class RawCollection:
    """Passages, queries and graded judgements; a passage is its title, a space and its text."""

    name: str
    passages: dict[str, str] = field(default_factory=dict)  # passage_id -> text
    titles: dict[str, str] = field(default_factory=dict)  # passage_id -> title, where there is one
    queries: dict[str, str] = field(default_factory=dict)  # query_id -> text
    splits: dict[str, str] = field(default_factory=dict)  # query_id -> the source's own split, where it has one
    qrels: dict[str, dict[str, int]] = field(default_factory=dict)  # query_id -> {passage_id: grade}

    @classmethod
    def read(cls, folder: Path) -> RawCollection:
        """A BEIR folder: corpus.jsonl[.gz], queries.jsonl[.gz], qrels.tsv with one header line."""
        collection = cls(folder.name)
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

    def write(self, folder: Path) -> None:
        """Write a BEIR folder; titles are already part of the passage text and are not written again."""
        corpus = ({"_id": i, "title": "", "text": t} for i, t in self.passages.items())
        write_jsonl(folder / "corpus.jsonl.gz", corpus)
        write_jsonl(folder / "queries.jsonl.gz", ({"_id": i, "text": t} for i, t in self.queries.items()))
        lines = ["query-id\tcorpus-id\tscore"]
        lines += [f"{q}\t{p}\t{g}" for q, grades in self.qrels.items() for p, g in grades.items()]
        (folder / "qrels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


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


def normalise(text: str) -> str:
    """Lower-case words only: two texts that differ in case, digits or punctuation are near-duplicates."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def fraction(key: str) -> float:
    """A stable number in [0, 1) from a text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def held_out_queries(
    collection: RawCollection, share: float, topic: Callable[[str], str] = normalise, max_component: int = 60
) -> set[str]:
    """About `share` of the queries, as whole components of (query topic, passage text, passage opening) keys.

    A component larger than `max_component` queries stays in training: one giant family of near-duplicates would
    make the held-out part a test of that family alone.
    """
    components = UnionFind()
    for query_id, grades in collection.qrels.items():
        keys = [f"query {topic(collection.queries[query_id])}"]
        for passage_id in grades:
            body = normalise(collection.passages[passage_id])
            keys += [f"passage {passage_id}", f"body {body}", f"opening {body[:200]}"]
        components.union(*keys)
    members: dict[str, list[str]] = {}
    for query_id in collection.qrels:
        members.setdefault(components[f"query {topic(collection.queries[query_id])}"], []).append(query_id)
    held: set[str] = set()
    for queries in members.values():
        if len(queries) <= max_component and fraction(min(collection.queries[q] for q in queries)) < share:
            held.update(queries)
    return held


def _fetch_lists(folder: Path) -> list[Path]:
    """Debian's English description lists; apt-get downloads them into the private `folder` when it is empty."""
    if not list(folder.glob("*Translation-en*")):
        (folder / "partial").mkdir(parents=True, exist_ok=True)
        options = [
            "--option=Acquire::Languages=en",
            "--option=Acquire::IndexTargets::deb::Translations::DefaultEnabled=true",
            f"--option=Dir::State::Lists={folder.resolve()}",
        ]
        subprocess.run(["apt-get", *options, "update"], check=True)
    lists = sorted(folder.glob("*Translation-en*"))
    if not lists:
        raise FileNotFoundError(f"{folder}: apt-get update left no *Translation-en* list")
    return lists


def read_debian(folder: Path) -> RawCollection:
    """Debian's packages: the short line is the query, the long body its passage.

    Bodies have at least eight words; equal ones are one passage with several queries.
    """
    collection = RawCollection("debian")
    seen: set[tuple[str, str]] = set()
    for path in _fetch_lists(folder):
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


def aspect_of(question: str) -> tuple[str, str] | None:
    """(aspect, topic) of a MedQuAD question, or None: `What are the symptoms of X ?` -> (`symptoms`, `X`)."""
    for name, (pattern, _) in ASPECTS.items():
        match = re.match(pattern, question.strip(), re.IGNORECASE)
        if match:
            return name, match.group(1)
    return None


def topic_of(question: str) -> str:
    """The key of a question's topic: questions with equal keys fall on the same side of the held-out split."""
    found = aspect_of(question)
    text = found[1] if found else question
    return " ".join(re.findall(r"\w+", text.lower()))
