"""Judged collections in the BEIR layout, their held-out split, Debian's descriptions, and instructions."""

import gzip
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from networkx.utils import UnionFind  # type: ignore[import-untyped]

MAX_HELD_OUT_QUERIES = 500
SELECTION_QUERIES = 40  # the last of those
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
    def read(cls, folder: Path) -> Self:
        """A BEIR folder: corpus.jsonl[.gz], queries.jsonl[.gz], qrels.tsv with one header line."""
        rows = {}
        for stem in ("corpus", "queries"):
            found = [path for ending in (".gz", "") if (path := folder / f"{stem}.jsonl{ending}").exists()]
            if not found:
                raise FileNotFoundError(f"{folder}: expected {stem}.jsonl or {stem}.jsonl.gz (BEIR layout)")
            rows[stem] = {row["_id"]: row for _, row in read_jsonl(found[0])}
        titles = {key: row["title"] for key, row in rows["corpus"].items() if row.get("title")}
        passages = {key: f"{titles.get(key, '')} {row['text']}".strip() for key, row in rows["corpus"].items()}
        queries = {key: row["text"] for key, row in rows["queries"].items()}
        splits = {key: row["split"] for key, row in rows["queries"].items() if "split" in row}
        collection = cls(folder.name, passages, titles, queries, splits)
        for line in (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]:
            query_id, passage_id, grade = line.split("\t")
            collection.qrels.setdefault(query_id, {})[passage_id] = int(grade)
        return collection

    def write(self, folder: Path) -> None:
        """Write a BEIR folder; titles, already part of the passage texts, are empty."""
        write_jsonl(folder / "corpus.jsonl.gz", ({"_id": i, "title": "", "text": t} for i, t in self.passages.items()))
        write_jsonl(folder / "queries.jsonl.gz", ({"_id": i, "text": t} for i, t in self.queries.items()))
        lines = ["query-id\tcorpus-id\tscore"]
        lines += [f"{q}\t{p}\t{g}" for q, grades in self.qrels.items() for p, g in grades.items()]
        (folder / "qrels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def of_descriptions(cls, lists: Iterable[str]) -> Self:
        """Debian's packages: the short line is the query, the long body (at least eight words) its passage.

        Equal bodies are one passage with several queries; ` .` lines in a body are paragraph breaks.
        """
        collection = cls("debian")
        pattern = re.compile(r"^Description-en: (.*)\n((?: .*\n?)*)", re.MULTILINE)
        stanzas = (f"{stanza}\n" for text in lists for stanza in text.split("\n\n"))
        for match in filter(None, map(pattern.search, stanzas)):
            short, lines = match[1].strip(), (line.strip() for line in match[2].split("\n"))
            body = " ".join(" ".join(line for line in lines if line != ".").split())
            if len(body.split()) < 8 or len(short.split()) < 2:
                continue
            passage_id = "d" + hashlib.sha256(body.encode()).hexdigest()[:12]
            query_id = "q" + hashlib.sha256(short.encode()).hexdigest()[:12]
            collection.passages[passage_id] = body
            collection.queries[query_id] = short
            collection.qrels.setdefault(query_id, {})[passage_id] = 1
        return collection

    @classmethod
    def debian(cls, folder: Path) -> Self:
        """Debian's English descriptions; apt-get downloads the lists into the private `folder` when it is empty."""
        if not list(folder.glob("*Translation-en*")):
            (folder / "partial").mkdir(parents=True, exist_ok=True)
            translations = "Acquire::IndexTargets::deb::Translations::DefaultEnabled=true"
            options = ("Acquire::Languages=en", translations, f"Dir::State::Lists={folder.resolve()}")
            subprocess.run(["apt-get", *(f"--option={one}" for one in options), "update"], check=True)
        lists = sorted(folder.glob("*Translation-en*"))
        if not lists:
            raise FileNotFoundError(f"{folder}: apt-get update left no *Translation-en* list")
        helper = ["/usr/lib/apt/apt-helper", "cat-file"]  # lists may be compressed
        texts = (subprocess.run([*helper, str(path)], check=True, capture_output=True).stdout for path in lists)
        return cls.of_descriptions(text.decode("utf-8", "replace") for text in texts)

    def held_out(self, share: float, topic: Callable[[str], str] | None = None, max_component: int = 60) -> set[str]:
        """About `share` of the queries, as whole components of (query topic, passage text, passage opening) keys.

        One of more than `max_component` queries stays in training: the held-out part would test that family alone.
        """
        topics = {q: f"query {(topic or normalise)(self.queries[q])}" for q in self.qrels}
        components = UnionFind()
        for query_id, grades in self.qrels.items():
            bodies = {passage_id: normalise(self.passages[passage_id]) for passage_id in grades}
            keys = (key for p, b in bodies.items() for key in (f"passage {p}", f"body {b}", f"opening {b[:200]}"))
            components.union(topics[query_id], *keys)
        members: dict[str, list[str]] = {}
        for query_id, key in topics.items():
            members.setdefault(components[key], []).append(query_id)
        families = (family for family in members.values() if len(family) <= max_component)
        return {q for family in families if fraction(min(self.queries[q] for q in family)) < share for q in family}

    def to_report_and_select(self, held: set[str]) -> tuple[Self, Self]:
        """(to report, to choose by): held-out queries, at most 500, drawn by hash, over all passages."""
        chosen = sorted(held, key=fraction)[:MAX_HELD_OUT_QUERIES]
        parts = chosen[:-SELECTION_QUERIES], chosen[-SELECTION_QUERIES:]
        queries = [{q: self.queries[q] for q in part} for part in parts]
        qrels = [{q: self.qrels[q] for q in part} for part in parts]
        return replace(self, queries=queries[0], qrels=qrels[0]), replace(self, queries=queries[1], qrels=qrels[1])


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each line of a .jsonl or .jsonl.gz file; ValueError names the place of a broken one."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as exc:
                    raise ValueError(f"{path}:{number}: not a JSON object ({exc})") from exc
                yield f"{path}:{number}", row


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows one a line; .gz names are gzipped, with no timestamp, so that equal rows give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in rows)
    with open(path, "wb") as out:
        out.writelines([gzip.compress(b"".join(lines), mtime=0)] if path.suffix == ".gz" else lines)


def normalise(text: str) -> str:
    """Lower-case words only: two texts that differ in case, digits or punctuation are near-duplicates."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def fraction(key: str) -> float:
    """A stable number in [0, 1) from a text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def aspect_of(question: str) -> tuple[str, str] | None:
    """(aspect, topic) of a MedQuAD question, or None: `What are the symptoms of X ?` -> (`symptoms`, `X`)."""
    for name, (pattern, _) in ASPECTS.items():
        if match := re.match(pattern, question.strip(), re.IGNORECASE):
            return name, match.group(1)
    return None


def topic_of(question: str) -> str:
    """The key of a question's topic: questions with equal keys fall on the same side of the held-out split."""
    _, text = aspect_of(question) or ("", question)
    return " ".join(re.findall(r"\w+", text.lower()))
