"""`python -m training data`: raw collections and Debian descriptions -> training groups and held-out collections.

Writes OUT/train.jsonl and OUT/train.npz (teacher vectors), OUT/heldout/<source>/ and OUT/select/<source>/ (BEIR:
queries to report, and others to choose by while training), OUT/texts.jsonl (all training texts, for the vocabulary).
The relevant passages of a held-out query stay out of the groups, as positives and as negatives.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training import collections as instructions
from training.collections import (
    RawCollection,
    fraction,
    held_out_queries,
    normalise,
    read_debian,
    topic_of,
    write_jsonl,
)
from training.groups import TeacherVectors, TrainingGroup, word_vectors, write_groups
from training.teacher import Bm25, VectorCache

MAX_CHARACTERS = 2400  # about 480 tokens: more than a training passage is ever cut to
VECTOR_SIZE = 384  # MiniLM's
NEAR_COPY = 0.95  # teacher cosine above which a passage counts as a copy of a relevant one
HELD_OUT_SHARE = {"medquad": 0.06, "debian": 0.02}
OPPOSED_SHARE = 0.06
MAX_GROUPS = {"medquad": 14_000, "scifact": 24_000, "debian": 8_000}  # the scientific text is what was missed most
LEXICAL = {"medquad": 0.2, "scifact": 1.0, "debian": 0.0}  # BM25 beside the cosine: best on TRAINING queries
NUM_NEGATIVES = {"medquad": 7, "scifact": 7, "debian": 4}
MAX_HELD_OUT_QUERIES = 500
SELECTION_QUERIES = 40  # the last of those
TEACHER_CHARACTERS = 1500  # it reads 128 tokens of them


@dataclass(frozen=True)
class Draft:
    """A group before its teacher scores: passages by id, so that vectors are looked up, not computed again."""

    query: str
    instruction: str
    positives: list[str]
    negatives: list[str]
    override: str | None = None  # text of the positive when it is not the stored passage
    opposed: bool = False
    reading: str | None = None  # what the teacher, which reads no instruction, is asked instead of the query


@dataclass
class TrainingSource:
    """One training source after the split: passages open for training, their vectors, a BM25 index over them."""

    collection: RawCollection
    held: set[str]  # query ids kept for evaluation
    vectors: dict[str, NDArray[np.float32]]  # passage_id -> (VECTOR_SIZE,), the teacher's or of words
    rng: random.Random
    num_negatives: int = 7
    ids: list[str] = field(init=False)

    def __post_init__(self) -> None:
        hidden = {p for q in self.held for p in self.collection.qrels.get(q, {})}
        self.ids = [p for p in self.collection.passages if p not in hidden]
        self._open = set(self.ids)
        self.index = Bm25([self.collection.passages[p] for p in self.ids])

    def training_pairs(self) -> list[tuple[str, list[str]]]:
        """(query_id, open relevant passage ids), queries with none left out."""
        pairs = [
            (q, [p for p in grades if p in self._open])
            for q, grades in self.collection.qrels.items()
            if q not in self.held
        ]
        return [(q, relevant) for q, relevant in pairs if relevant]

    def near_copy(self, passage_id: str, relevant: Iterable[str]) -> bool:
        anchors = np.stack([self.vectors[p] for p in relevant])
        return float((anchors @ self.vectors[passage_id]).max()) >= NEAR_COPY

    def negatives(self, top: list[int], relevant: set[str]) -> list[str]:
        """Four of seven from the best ten, the rest from the next thirty; near-copies of a relevant one are dropped."""
        bodies = {normalise(self.collection.passages[p]) for p in relevant}
        kept = []
        for row in top:
            p = self.ids[row]
            if (
                p not in relevant
                and not self.near_copy(p, relevant)
                and normalise(self.collection.passages[p]) not in bodies
            ):
                kept.append(p)
        near, far = kept[:10], kept[10:40]
        num_near = (self.num_negatives + 1) // 2
        chosen = self.rng.sample(near, min(num_near, len(near)))
        chosen += self.rng.sample(far, min(self.num_negatives - num_near, len(far)))
        return chosen + [self.rng.choice(self.ids) for _ in range(3 - len(chosen))]

    def query_drafts(self, task: str, repeat: int = 1, limit: int | None = None) -> Iterator[Draft]:
        """The judged queries of a source, each against its BM25 neighbours; `limit` takes so many, drawn by hash."""
        pairs = self.training_pairs()
        if limit is not None:
            pairs = sorted(pairs, key=lambda pair: fraction(pair[0]))[:limit]
        pairs = pairs * repeat
        top, _ = self.index.top([self.collection.queries[q] for q, _ in pairs], 45)
        for (query_id, relevant), rows in zip(pairs, top.tolist(), strict=True):
            positives = self.rng.sample(relevant, min(2, len(relevant)))
            yield Draft(
                self.collection.queries[query_id],
                _wording(task, self.rng),
                positives,
                self.negatives(rows, set(relevant)),
            )

    def title_drafts(self, repeat: int = 1) -> Iterator[Draft]:
        """Title -> abstract, the title cut from its passage."""
        ids = [p for p in self.ids if p in self.collection.titles] * repeat
        top, _ = self.index.top([self.collection.titles[p] for p in ids], 45)
        for p, rows in zip(ids, top.tolist(), strict=True):
            title = self.collection.titles[p]
            body = self.collection.passages[p][len(title) :].strip()
            if len(body.split()) > 20:
                yield Draft(title, _wording("title", self.rng), [p], self.negatives(rows, {p}), override=body)

    def sentence_drafts(self, count: int) -> Iterator[Draft]:
        """Inverse cloze: a sentence with some words dropped -> the passage without that sentence."""
        ids = [p for p in self.ids if len(self.collection.passages[p].split()) > 60]
        drawn = []
        for p in (self.rng.choice(ids) for _ in range(count)):
            sentences = re.split(r"(?<=[.?!]) ?(?=[A-Z])", self.collection.passages[p][:MAX_CHARACTERS])
            fit = [i for i, s in enumerate(sentences) if 8 <= len(s.split()) <= 40]
            if len(sentences) > 2 and fit:
                i = self.rng.choice(fit)
                query = " ".join(w for w in sentences[i].split() if self.rng.random() > 0.2)
                drawn.append((p, query, " ".join(sentences[:i] + sentences[i + 1 :])))
        top, _ = self.index.top([query for _, query, _ in drawn], 45)
        for (p, query, rest), rows in zip(drawn, top.tolist(), strict=True):
            yield Draft(query, _wording("sentence", self.rng), [p], self.negatives(rows, {p}), override=rest)

    def aspect_drafts(self) -> Iterator[Draft]:
        """The instruction decides: query `X`, instruction `... the symptoms`, other aspects of X are the negatives."""
        topics: dict[str, dict[str, str]] = {}
        for query_id, relevant in self.training_pairs():
            found = instructions.aspect_of(self.collection.queries[query_id])
            if found:
                topics.setdefault(found[1], {})[found[0]] = relevant[0]
        topics = {topic: aspects for topic, aspects in topics.items() if len(set(aspects.values())) > 1}
        top, _ = self.index.top(list(topics), 45)
        for (topic, aspects), rows in zip(topics.items(), top.tolist(), strict=True):
            for name in self.rng.sample(sorted(aspects), min(3, len(aspects))):
                others = [p for p in set(aspects.values()) if p != aspects[name]]
                phrase = self.rng.choice(instructions.ASPECT_WORDINGS).format(aspect=instructions.ASPECTS[name][1])
                same = set(aspects.values())
                negatives = sorted(others)[:4] + [p for p in self.negatives(rows, same) if p not in same][:3]
                reading = f"{instructions.ASPECTS[name][1]} of {topic}"
                yield Draft(topic, phrase, [aspects[name]], negatives, reading=reading)

    def finish(self, draft: Draft, query_vector: NDArray[np.float32] | None) -> tuple[TrainingGroup, list[str]]:
        """Texts and teacher scores of a draft, and its passages' ids. No scores without the query's vector, nor for an
        opposed group: the teacher reads no instruction."""
        texts = [self.collection.passages[p][:MAX_CHARACTERS] for p in draft.positives + draft.negatives]
        if draft.override is not None:
            texts[0] = draft.override[:MAX_CHARACTERS]
        cut, ids = len(draft.positives), draft.positives + draft.negatives
        scores: tuple[float, ...] = ()
        if query_vector is not None and not draft.opposed:
            scores = tuple(round(float(query_vector @ self.vectors[p]), 4) for p in ids)
        positives, negatives = tuple(texts[:cut]), tuple(texts[cut:])
        in_batch = not draft.opposed
        return TrainingGroup(draft.query, draft.instruction, positives, negatives, scores, in_batch), ids


def _wording(task: str, rng: random.Random, default_share: float = 0.4) -> str:
    """One of the task's wordings, or empty for the checkpoint's default instruction."""
    return "" if rng.random() < default_share else rng.choice(instructions.TASKS[task])


def opposed_drafts(drafts: list[Draft], rng: random.Random, share: float) -> Iterator[Draft]:
    """The same query and passages under an instruction that asks for the contrary: labels change places."""
    for draft in drafts:
        if rng.random() < share and draft.override is None:
            yield Draft(
                draft.query, rng.choice(instructions.TASKS["opposed"]), draft.negatives, draft.positives, opposed=True
            )


def _scifact_held_out(collection: RawCollection) -> tuple[set[str], set[str]]:
    """(validation queries, train queries to drop because they share a passage with one of those)."""
    held = {q for q, split in collection.splits.items() if split != "train" and q in collection.qrels}
    passages = {p for q in held for p in collection.qrels[q]}
    return held, {q for q, grades in collection.qrels.items() if q not in held and passages & set(grades)}


def held_out_collections(collection: RawCollection, held: set[str]) -> tuple[RawCollection, RawCollection]:
    """(to report, to choose by): held-out queries, at most 500, drawn by hash, over ALL passages of the source."""
    chosen = sorted(held, key=fraction)[:MAX_HELD_OUT_QUERIES]

    def part(query_ids: list[str]) -> RawCollection:
        return RawCollection(
            collection.name,
            passages=collection.passages,
            queries={q: collection.queries[q] for q in query_ids},
            qrels={q: collection.qrels[q] for q in query_ids},
        )

    return part(chosen[:-SELECTION_QUERIES]), part(chosen[-SELECTION_QUERIES:])


def build(
    collections_folder: Path, debian_folder: Path, out: Path, seed: int = 0, max_debian: int | None = None
) -> None:
    """One call makes everything `train` reads. Teacher vectors are kept in OUT/vectors.npz: a second call is short."""
    teacher, rng = VectorCache(out / "vectors.npz"), random.Random(seed)
    drafts: list[tuple[TrainingSource, Draft]] = []
    opened: list[TrainingSource] = []
    for collection, held in _split(collections_folder, debian_folder, out):
        source = TrainingSource(collection, held, {}, random.Random(seed), NUM_NEGATIVES[collection.name])
        source.vectors = _vectors(source, teacher)
        opened.append(source)
        made = list(_drafts(source, max_debian))
        made += list(opposed_drafts(made, rng, OPPOSED_SHARE))
        made = rng.sample(made, min(len(made), MAX_GROUPS[collection.name]))
        drafts += [(source, draft) for draft in made]
        print(f"{collection.name}: {len(made)} groups", flush=True)
    rng.shuffle(drafts)
    queries = np.zeros((len(drafts), VECTOR_SIZE), dtype=np.float32)
    taught = [i for i, (source, _) in enumerate(drafts) if source.collection.name != "debian"]
    queries[taught] = teacher.embed([drafts[i][1].reading or drafts[i][1].query for i in taught], max_tokens=64)
    rows: dict[str, NDArray[np.float32]] = {}  # text -> its passage's vector, in the order of the file

    def groups() -> Iterator[TrainingGroup]:
        for (source, draft), vector in zip(drafts, queries, strict=True):
            group, ids = source.finish(draft, vector if vector.any() else None)
            for text, passage_id in zip(group.passages, ids, strict=True):
                rows.setdefault(text, source.vectors[passage_id])
            yield group

    count = write_groups(out / "train.jsonl", groups())
    lexical = np.array([LEXICAL[source.collection.name] for source, _ in drafts], dtype=np.float32)
    TeacherVectors(np.stack(list(rows.values())), queries, lexical).write(out / "train.jsonl")
    write_jsonl(out / "texts.jsonl", ({"text": s.collection.passages[p]} for s in opened for p in s.ids))
    print(f"{count} groups in {out / 'train.jsonl'}")


def _split(collections_folder: Path, debian_folder: Path, out: Path) -> list[tuple[RawCollection, set[str]]]:
    """Each collection, less what may not be trained on, and its held-out queries, which are written to `out`."""
    medquad, scifact = (RawCollection.read(collections_folder / name) for name in ("medquad", "scifact"))
    debian = read_debian(debian_folder)
    scifact_held, dropped = _scifact_held_out(scifact)
    split = [
        (medquad, held_out_queries(medquad, HELD_OUT_SHARE["medquad"], topic_of)),
        (scifact, scifact_held),
        (debian, held_out_queries(debian, HELD_OUT_SHARE["debian"])),
    ]
    for collection, held in split:
        report, select = held_out_collections(collection, held)
        report.write(out / "heldout" / collection.name)
        select.write(out / "select" / collection.name)
        counts = f"{len(collection.passages)} passages, {len(collection.qrels)} queries, {len(held)} held out"
        print(f"{collection.name}: {counts}", flush=True)
    for query_id in dropped:
        del scifact.qrels[query_id]
    return split


def _vectors(source: TrainingSource, teacher: VectorCache) -> dict[str, NDArray[np.float32]]:
    passages = source.collection.passages
    if source.collection.name == "debian":  # sixty thousand passages: too many for the teacher
        return dict(zip(source.ids, word_vectors([passages[p] for p in source.ids]), strict=True))
    return dict(zip(passages, teacher.embed([text[:TEACHER_CHARACTERS] for text in passages.values()]), strict=True))


def _drafts(source: TrainingSource, max_debian: int | None) -> Iterator[Draft]:
    if source.collection.name == "medquad":
        yield from source.query_drafts("question")
        yield from source.aspect_drafts()
        yield from source.sentence_drafts(6000)
    elif source.collection.name == "scifact":
        yield from source.query_drafts("claim", repeat=3)
        yield from source.title_drafts(repeat=2)
        yield from source.sentence_drafts(12000)
    else:
        yield from source.query_drafts("package", limit=max_debian or MAX_GROUPS["debian"])
