"""A tiny random checkpoint, and a BEIR folder small enough to count by hand."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest

from checkpoint.synthetic import make_checkpoint

PASSAGES = {
    "moon": ("The Moon", "orbits the Earth and causes tides"),
    "tide": ("Tides", "tides rise and fall because the moon pulls the sea"),
    "bread": ("Bread", "flour water yeast and salt baked in an oven until the crust is brown " * 6),
    "yeast": ("", "yeast eats sugar and gives off gas so that dough rises"),
    "iron": ("Iron", "iron rusts in wet air because water and oxygen reach the metal"),
    "rust": ("", "rust is iron oxide"),
    "sea": ("The sea", "sea water is salt and its tides follow the moon " * 3),
}
QUERIES = {
    "q1": ("why are there tides in the sea", "train"),
    "q2": ("what makes dough rise", "test"),
    "q3": ("how does iron rust", "test"),
    "q4": ("zzz unheard", "test"),  # shares no word with any passage
    "q5": ("never judged", "train"),
}
QRELS = [
    ("q1", "tide", 2),
    ("q1", "moon", 1),
    ("q1", "nowhere", 1),  # no such passage
    ("q2", "yeast", 1),
    ("q2", "bread", 0),
    ("q3", "rust", 1),
    ("q3", "iron", 1),
    ("q4", "moon", 1),
    ("lost", "moon", 1),  # no such query
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint: ranks like dice, always the same dice.

    Of this seed, q1 and q2 come in another order at ratio 8 than at 1, and no two margins of a query are within 0.15.
    """
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "tiny", seed=8)


class MakeBeir(Protocol):
    """Writes the collection and returns its folder."""

    def __call__(self, *, zipped: bool = False, qrels: str = "qrels.tsv", header: bool = True) -> Path: ...


@pytest.fixture
def make_beir(tmp_path: Path) -> MakeBeir:
    return partial(_write_beir, tmp_path / "beir")


@pytest.fixture
def beir(make_beir: MakeBeir) -> Path:
    return make_beir()


def _write_beir(folder: Path, *, zipped: bool = False, qrels: str = "qrels.tsv", header: bool = True) -> Path:
    corpus = [{"_id": i, "title": title, "text": text} for i, (title, text) in PASSAGES.items()]
    queries = [{"_id": i, "text": text, "split": split} for i, (text, split) in QUERIES.items()]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if zipped:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(text)
    (folder / qrels).parent.mkdir(exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore"] if header else []
    (folder / qrels).write_text("\n".join([*lines, *(f"{q}\t{p}\t{g}" for q, p, g in QRELS)]) + "\n")
    return folder
