"""`python -m training data`: raw collections and Debian descriptions -> training groups and held-out collections.

Writes OUT/train.jsonl and OUT/train.npz (teacher vectors), OUT/heldout/<source>/ and OUT/select/<source>/ (BEIR:
queries to report, and others to choose by while training), OUT/texts.jsonl (all training texts, for the vocabulary).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training import sources
from training.collections_io import Collection, read_collection, write_collection, write_jsonl
from training.debian import fetch_lists, read_descriptions
from training.groups import Group, write_groups
from training.instructions import topic_of
from training.sources import Draft, Source
from training.split import fraction, held_out_queries, normalise
from training.teacher import VectorCache
from training.vectors import TeacherVectors, vectors_path, word_vectors, write_vectors

HELD_OUT_SHARE = {"medquad": 0.06, "debian": 0.02}
OPPOSED_SHARE = 0.06
MAX_GROUPS = {"medquad": 14_000, "scifact": 24_000, "debian": 8_000}  # the scientific text is what was missed most
LEXICAL = {"medquad": 0.2, "scifact": 1.0, "debian": 0.0}  # BM25 beside the cosine: best on TRAINING queries
NUM_NEGATIVES = {"medquad": 7, "scifact": 7, "debian": 4}
MAX_HELD_OUT_QUERIES = 500
SELECTION_QUERIES = 40  # the last of those
TEACHER_CHARACTERS = 1500  # it reads 128 tokens of them


def scifact_held_out(collection: Collection) -> tuple[set[str], set[str]]:
    """(validation queries, train queries to drop because they share a passage with one of those)."""
    held = {q for q, split in collection.splits.items() if split != "train" and q in collection.qrels}
    passages = {p for q in held for p in collection.qrels[q]}
    return held, {q for q, grades in collection.qrels.items() if q not in held and passages & set(grades)}


def held_out_collections(collection: Collection, held: set[str]) -> tuple[Collection, Collection]:
    """(to report, to choose by): held-out queries, at most 500, drawn by hash, over ALL passages of the source."""
    chosen = sorted(held, key=fraction)[:MAX_HELD_OUT_QUERIES]

    def part(query_ids: list[str]) -> Collection:
        return Collection(
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
    medquad = read_collection(collections_folder / "medquad")
    scifact = read_collection(collections_folder / "scifact")
    debian = read_descriptions(fetch_lists(debian_folder))
    held = {
        "medquad": held_out_queries(medquad, HELD_OUT_SHARE["medquad"], topic_of),
        "debian": held_out_queries(debian, HELD_OUT_SHARE["debian"], normalise),
    }
    held["scifact"], dropped = scifact_held_out(scifact)
    for collection in (medquad, scifact, debian):
        report, select = held_out_collections(collection, held[collection.name])
        write_collection(out / "heldout" / collection.name, report)
        write_collection(out / "select" / collection.name, select)
        print(
            f"{collection.name}: {len(collection.passages)} passages, {len(collection.qrels)} queries,"
            f" {len(held[collection.name])} held out",
            flush=True,
        )
    for query_id in dropped:
        del scifact.qrels[query_id]
    teacher = VectorCache(out / "vectors.npz")
    drafts: list[tuple[Source, Draft]] = []
    opened: dict[str, Source] = {}
    rng = random.Random(seed)
    for collection in (medquad, scifact, debian):
        name = collection.name
        source = Source(collection, held[name], {}, random.Random(seed), NUM_NEGATIVES[name])
        opened[name] = source
        if collection is debian:  # sixty thousand passages: too many for the teacher
            source.vectors = dict(
                zip(source.ids, word_vectors([collection.passages[p] for p in source.ids]), strict=True)
            )
        else:
            texts = [passage[:TEACHER_CHARACTERS] for passage in collection.passages.values()]
            source.vectors = dict(zip(collection.passages, teacher.embed(texts), strict=True))
        made: list[Draft] = []
        if collection is medquad:
            made += list(sources.query_drafts(source, "question"))
            made += list(sources.aspect_drafts(source)) + list(sources.sentence_drafts(source, 6000))
        elif collection is scifact:
            made += list(sources.query_drafts(source, "claim", repeat=3))
            made += list(sources.title_drafts(source, repeat=2)) + list(sources.sentence_drafts(source, 12000))
        else:
            made += list(sources.query_drafts(source, "package", limit=max_debian or MAX_GROUPS[name]))
        made += list(sources.opposed_drafts(made, rng, OPPOSED_SHARE))
        made = rng.sample(made, min(len(made), MAX_GROUPS[name]))
        drafts += [(source, draft) for draft in made]
        print(f"{name}: {len(made)} groups", flush=True)
    rng.shuffle(drafts)
    queries = np.zeros((len(drafts), sources.VECTOR_SIZE), dtype=np.float32)
    taught = [i for i, (source, _) in enumerate(drafts) if source.collection is not debian]
    queries[taught] = teacher.embed([drafts[i][1].reading or drafts[i][1].query for i in taught], max_tokens=64)
    rows: dict[str, NDArray[np.float32]] = {}  # text -> its passage's vector, in the order of the file

    def groups() -> Iterator[Group]:
        for (source, draft), vector in zip(drafts, queries, strict=True):
            group, ids = sources.finish(draft, source, vector if vector.any() else None)
            for text, passage_id in zip(group.passages, ids, strict=True):
                rows.setdefault(text, source.vectors[passage_id])
            yield group

    count = write_groups(out / "train.jsonl", groups())
    lexical = np.array([LEXICAL[source.collection.name] for source, _ in drafts], dtype=np.float32)
    write_vectors(vectors_path(out / "train.jsonl"), TeacherVectors(np.stack(list(rows.values())), queries, lexical))
    write_jsonl(out / "texts.jsonl", ({"text": s.collection.passages[p]} for s in opened.values() for p in s.ids))
    print(f"{count} groups in {out / 'train.jsonl'}")
