"""Raw collections and Debian descriptions -> training groups, without passages relevant to a held-out query."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training import collections
from training.collections import RawCollection, aspect_of, normalise
from training.groups import TeacherVectors, TrainingGroup
from training.teacher import Bm25, VectorCache, word_vectors

MAX_CHARACTERS = 2400  # about 480 tokens: more than a training passage is ever cut to
VECTOR_SIZE = 384  # MiniLM's
NEAR_COPY = 0.95  # teacher cosine above which a passage counts as a copy of a relevant one
HELD_OUT_SHARE = {"medquad": 0.06, "debian": 0.02}
OPPOSED_SHARE = 0.06
MAX_GROUPS = {"medquad": 14_000, "scifact": 24_000, "debian": 8_000}  # scientific text was missed most
LEXICAL = {"medquad": 0.2, "scifact": 1.0, "debian": 0.0}  # BM25 next to the cosine: best on TRAINING queries
NUM_NEGATIVES = {"medquad": 7, "scifact": 7, "debian": 4}
TEACHER_CHARACTERS = 1500  # it reads 128 tokens of them

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class _Draft:
    """A group before its teacher scores."""

    query: str
    instruction: str
    positives: list[str]  # by id, so that vectors are looked up, not computed again
    negatives: list[str]
    override: str | None = None  # text of the positive when it is not the stored passage
    opposed: bool = False
    reading: str | None = None  # the query for the teacher, which reads no instruction, where it is another

    def contrary(self, rng: random.Random) -> "_Draft":
        """Under an instruction that asks for the contrary: labels change places."""
        wording = rng.choice(collections.TASKS["opposed"])
        return _Draft(self.query, wording, self.negatives, self.positives, opposed=True)


@dataclass
class TrainingSource:
    """One training source after the split: passages open for training, their vectors, a BM25 index over them."""

    collection: RawCollection
    held: set[str]  # query ids kept for evaluation
    vectors: dict[str, Vector]  # passage_id -> (VECTOR_SIZE,), the teacher's or of words
    rng: random.Random
    num_negatives: int = 7
    ids: list[str] = field(init=False)

    def __post_init__(self) -> None:
        qrels, passages = self.collection.qrels, self.collection.passages
        hidden = {p for q in self.held for p in qrels.get(q, {})}
        self.ids = [p for p in passages if p not in hidden]
        self._index = Bm25([passages[p] for p in self.ids])
        open_ids = set(self.ids)
        relevant = {q: [p for p in grades if p in open_ids] for q, grades in qrels.items() if q not in self.held}
        self._relevant = {q: found for q, found in relevant.items() if found}

    def _negatives(self, top: list[int], relevant: set[str]) -> list[str]:
        """Four of seven from the best ten, the rest from the next thirty; near-copies of a relevant one are dropped."""
        passages = self.collection.passages
        bodies = {normalise(passages[p]) for p in relevant}
        anchors = np.stack([self.vectors[p] for p in relevant])
        others = (p for p in (self.ids[row] for row in top) if p not in relevant)
        others = (p for p in others if float((anchors @ self.vectors[p]).max()) < NEAR_COPY)
        kept = [p for p in others if normalise(passages[p]) not in bodies]
        near, far = kept[:10], kept[10:40]
        num_near = (self.num_negatives + 1) // 2
        chosen = self.rng.sample(near, min(num_near, len(near)))
        chosen += self.rng.sample(far, min(self.num_negatives - num_near, len(far)))
        return chosen + [self.rng.choice(self.ids) for _ in range(3 - len(chosen))]

    def _draft(self, task: str, queries: Sequence[tuple[str, list[str], str | None]]) -> Iterator[_Draft]:
        """Drafts of (query, relevant ids, text of the positive or None), two fifths with the default instruction."""
        top = self._index.top([query for query, _, _ in queries])
        for (query, relevant, override), rows in zip(queries, top, strict=True):
            positives = self.rng.sample(relevant, min(2, len(relevant))) if override is None else relevant
            wording = "" if self.rng.random() < 0.4 else self.rng.choice(collections.TASKS[task])
            yield _Draft(query, wording, positives, self._negatives(rows, set(relevant)), override)

    def query_drafts(self, task: str, repeat: int = 1, limit: int | None = None) -> Iterator[_Draft]:
        """The judged queries; `limit` takes so many, drawn by hash."""
        chosen = self._relevant if limit is None else sorted(self._relevant, key=collections.fraction)[:limit]
        return self._draft(task, [(self.collection.queries[q], self._relevant[q], None) for q in chosen] * repeat)

    def title_drafts(self, repeat: int = 1) -> Iterator[_Draft]:
        """Title -> abstract, the title cut from its passage."""
        titles = {p: self.collection.titles[p] for p in self.ids if p in self.collection.titles}
        bodies = {p: self.collection.passages[p][len(title) :].strip() for p, title in titles.items()}
        long = [(titles[p], [p], body) for p, body in bodies.items() if len(body.split()) > 20]
        return self._draft("title", long * repeat)

    def sentence_drafts(self, count: int) -> Iterator[_Draft]:
        """Inverse cloze: a sentence with some words dropped -> the passage without that sentence."""
        ids = [p for p in self.ids if len(self.collection.passages[p].split()) > 60]
        drawn = []
        for p in (self.rng.choice(ids) for _ in range(count)):
            sentences = re.split(r"(?<=[.?!]) ?(?=[A-Z])", self.collection.passages[p][:MAX_CHARACTERS])
            fit = [i for i, s in enumerate(sentences) if 8 <= len(s.split()) <= 40]
            if len(sentences) > 2 and fit:
                i = self.rng.choice(fit)
                query = " ".join(w for w in sentences[i].split() if self.rng.random() > 0.2)
                drawn.append((query, [p], " ".join(sentences[:i] + sentences[i + 1 :])))
        return self._draft("sentence", drawn)

    def aspect_drafts(self) -> Iterator[_Draft]:
        """The instruction decides: query `X`, instruction `... the symptoms`, other aspects of X are the negatives."""
        topics: dict[str, dict[str, str]] = {}
        for query_id, relevant in self._relevant.items():
            if found := aspect_of(self.collection.queries[query_id]):
                topics.setdefault(found[1], {})[found[0]] = relevant[0]
        topics = {topic: aspects for topic, aspects in topics.items() if len(set(aspects.values())) > 1}
        for (topic, aspects), rows in zip(topics.items(), self._index.top(list(topics)), strict=True):
            same = set(aspects.values())
            for name in self.rng.sample(sorted(aspects), min(3, len(aspects))):
                aspect = collections.ASPECTS[name][1]
                phrase = self.rng.choice(collections.ASPECT_WORDINGS).format(aspect=aspect)
                negatives = sorted(same - {aspects[name]})[:4]
                negatives += [p for p in self._negatives(rows, same) if p not in same][:3]
                yield _Draft(topic, phrase, [aspects[name]], negatives, reading=f"{aspect} of {topic}")

    def drafts(self, max_debian: int | None) -> Iterator[_Draft]:
        if self.collection.name == "medquad":
            yield from self.query_drafts("question")
            yield from self.aspect_drafts()
            yield from self.sentence_drafts(6000)
        elif self.collection.name == "scifact":
            yield from self.query_drafts("claim", repeat=3)
            yield from self.title_drafts(repeat=2)
            yield from self.sentence_drafts(12000)
        else:
            yield from self.query_drafts("package", limit=max_debian or MAX_GROUPS["debian"])

    def finish(self, draft: _Draft, query_vector: Vector | None) -> TrainingGroup:
        """Texts and teacher scores of a draft; an opposed group has none: the teacher reads no instruction."""
        ids, cut = draft.positives + draft.negatives, len(draft.positives)
        texts = [self.collection.passages[p][:MAX_CHARACTERS] for p in ids]
        if draft.override is not None:
            texts[0] = draft.override[:MAX_CHARACTERS]
        scores: tuple[float, ...] = ()
        if query_vector is not None and not draft.opposed:
            scores = tuple(round(float(query_vector @ self.vectors[p]), 4) for p in ids)
        parts = tuple(texts[:cut]), tuple(texts[cut:])
        return TrainingGroup(draft.query, draft.instruction, *parts, scores, in_batch=not draft.opposed)


def build(
    collections_folder: Path, debian_folder: Path, out: Path, seed: int = 0, max_debian: int | None = None
) -> None:
    """One call makes everything `train` reads. Teacher vectors are kept in OUT/vectors.npz: a second call is short."""
    teacher, rng = VectorCache(out / "vectors.npz"), random.Random(seed)
    drafts: list[tuple[TrainingSource, _Draft]] = []
    opened: list[TrainingSource] = []
    for collection, held in _split(collections_folder, debian_folder, out):
        name, passages = collection.name, collection.passages
        source = TrainingSource(collection, held, {}, random.Random(seed), NUM_NEGATIVES[name])
        if name == "debian":  # sixty thousand passages: too many for the teacher
            made = zip(source.ids, word_vectors([passages[p] for p in source.ids]), strict=True)
        else:
            made = zip(passages, teacher.embed([text[:TEACHER_CHARACTERS] for text in passages.values()]), strict=True)
        source.vectors = dict(made)
        opened.append(source)
        own = list(source.drafts(max_debian))
        own += [d.contrary(rng) for d in own if rng.random() < OPPOSED_SHARE and d.override is None]
        own = rng.sample(own, min(len(own), MAX_GROUPS[name]))
        drafts += [(source, draft) for draft in own]
        print(f"{name}: {len(own)} groups", flush=True)
    rng.shuffle(drafts)
    queries = np.zeros((len(drafts), VECTOR_SIZE), dtype=np.float32)
    taught = [i for i, (source, _) in enumerate(drafts) if source.collection.name != "debian"]
    queries[taught] = teacher.embed([drafts[i][1].reading or drafts[i][1].query for i in taught], max_tokens=64)
    rows: dict[str, Vector] = {}  # text -> its passage's vector, in the order of the file

    def groups() -> Iterator[dict[str, Any]]:
        for (source, draft), vector in zip(drafts, queries, strict=True):
            group = source.finish(draft, vector if vector.any() else None)
            for text, passage_id in zip(group.passages, draft.positives + draft.negatives, strict=True):
                rows.setdefault(text, source.vectors[passage_id])
            yield group.row()

    collections.write_jsonl(out / "train.jsonl", groups())
    lexical = np.array([LEXICAL[source.collection.name] for source, _ in drafts], dtype=np.float32)
    TeacherVectors(np.stack(list(rows.values())), queries, lexical).write(out / "train.jsonl")
    texts = ({"text": source.collection.passages[p]} for source in opened for p in source.ids)
    collections.write_jsonl(out / "texts.jsonl", texts)
    print(f"{len(drafts)} groups in {out / 'train.jsonl'}")


def _split(collections_folder: Path, debian_folder: Path, out: Path) -> list[tuple[RawCollection, set[str]]]:
    """Each collection, less the queries that may not be trained on, and its held-out queries, written to `out`."""
    medquad, scifact = (RawCollection.read(collections_folder / name) for name in ("medquad", "scifact"))
    debian = RawCollection.debian(debian_folder)
    claims = {q for q, split in scifact.splits.items() if split != "train" and q in scifact.qrels}
    split = [
        (medquad, medquad.held_out(HELD_OUT_SHARE["medquad"], collections.topic_of)),
        (scifact, claims),
        (debian, debian.held_out(HELD_OUT_SHARE["debian"])),
    ]
    for collection, held in split:
        for name, part in zip(("heldout", "select"), collection.to_report_and_select(held), strict=True):
            part.write(out / name / collection.name)
        counts = f"{len(collection.passages)} passages, {len(collection.qrels)} queries, {len(held)} held out"
        print(f"{collection.name}: {counts}", flush=True)
    hidden = {p for q in claims for p in scifact.qrels[q]}  # train claims that share one with a held-out claim go
    scifact.qrels = {q: g for q, g in scifact.qrels.items() if q in claims or not hidden & set(g)}
    return split
