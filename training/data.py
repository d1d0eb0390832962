"""`python -m training data`: raw collections and Debian descriptions -> training groups and held-out collections.

Writes OUT/train.jsonl, OUT/heldout/<source>/ (BEIR folders), OUT/texts.jsonl (all training texts, for the vocabulary).
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np

from training import sources
from training.collections_io import Collection, read_collection, write_collection, write_jsonl
from training.debian import fetch_lists, read_descriptions
from training.groups import write_groups
from training.instructions import topic_of
from training.sources import Draft, Source
from training.split import fraction, held_out_queries, normalise
from training.teacher import MiniLM

HELD_OUT_SHARE = {"medquad": 0.06, "debian": 0.02}
OPPOSED_SHARE = 0.06
MAX_HELD_OUT_QUERIES = 500


def scifact_held_out(collection: Collection) -> tuple[set[str], set[str]]:
    """(validation queries, train queries to drop because they share a passage with one of those)."""
    held = {q for q, split in collection.splits.items() if split != "train" and q in collection.qrels}
    passages = {p for q in held for p in collection.qrels[q]}
    return held, {q for q, grades in collection.qrels.items() if q not in held and passages & set(grades)}


def held_out_collection(collection: Collection, held: set[str]) -> Collection:
    """The held-out queries over ALL passages of the source; at most 500 queries, drawn by hash."""
    chosen = sorted(held, key=fraction)[:MAX_HELD_OUT_QUERIES]
    return Collection(
        collection.name,
        passages=collection.passages,
        queries={q: collection.queries[q] for q in chosen},
        qrels={q: collection.qrels[q] for q in chosen},
    )


def build(
    collections_folder: Path, debian_folder: Path, out: Path, seed: int = 0, max_debian: int | None = None
) -> None:
    """One call makes everything `train` reads."""
    medquad = read_collection(collections_folder / "medquad")
    scifact = read_collection(collections_folder / "scifact")
    debian = read_descriptions(fetch_lists(debian_folder))
    if max_debian is not None:
        debian.qrels = dict(itertools.islice(debian.qrels.items(), max_debian))
    held = {
        "medquad": held_out_queries(medquad, HELD_OUT_SHARE["medquad"], topic_of),
        "debian": held_out_queries(debian, HELD_OUT_SHARE["debian"], normalise),
    }
    held["scifact"], dropped = scifact_held_out(scifact)
    for collection in (medquad, scifact, debian):
        write_collection(out / "heldout" / collection.name, held_out_collection(collection, held[collection.name]))
        print(
            f"{collection.name}: {len(collection.passages)} passages, {len(collection.qrels)} queries,"
            f" {len(held[collection.name])} held out",
            flush=True,
        )
    for query_id in dropped:
        del scifact.qrels[query_id]
    teacher = MiniLM()
    drafts: list[tuple[Source, Draft]] = []
    opened: dict[str, Source] = {}
    rng = random.Random(seed)
    for collection in (medquad, scifact, debian):
        ids = list(collection.passages)
        vectors = teacher.embed([collection.passages[p][: sources.MAX_CHARACTERS] for p in ids])
        source = Source(collection, held[collection.name], dict(zip(ids, vectors, strict=True)), random.Random(seed))
        opened[collection.name] = source
        made: list[Draft] = []
        if collection is medquad:
            made += list(sources.query_drafts(source, "question"))
            made += list(sources.aspect_drafts(source)) + list(sources.sentence_drafts(source, 6000))
        elif collection is scifact:
            made += list(sources.query_drafts(source, "claim", repeat=3))
            made += list(sources.title_drafts(source, repeat=2)) + list(sources.sentence_drafts(source, 12000))
        else:
            made += list(sources.query_drafts(source, "package"))
        made += list(sources.opposed_drafts(made, rng, OPPOSED_SHARE))
        drafts += [(source, draft) for draft in made]
        print(f"{collection.name}: {len(made)} groups", flush=True)
    rng.shuffle(drafts)
    vectors = teacher.embed([draft.query for _, draft in drafts], max_tokens=64)
    count = write_groups(
        out / "train.jsonl", (sources.finish(d, s, v) for (s, d), v in zip(drafts, np.asarray(vectors), strict=True))
    )
    write_jsonl(out / "texts.jsonl", ({"text": s.collection.passages[p]} for s in opened.values() for p in s.ids))
    print(f"{count} groups in {out / 'train.jsonl'}")
