from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from training.teacher import VectorCache

TEXTS = ["Chloroquine treats malaria.", "A drug against malaria.", "A program that shows photographs."]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> VectorCache:
    cache = VectorCache(tmp_path_factory.mktemp("teacher") / "vectors.npz", flush_every=2)
    cache.embed(TEXTS)
    return cache


def test_the_teacher_sees_meaning_and_gives_unit_rows(cache: VectorCache) -> None:
    vectors = cache.embed(TEXTS)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-3)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def test_vectors_are_read_from_the_file_and_not_computed_again(
    cache: VectorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SentenceTransformer, "encode", None)
    again = VectorCache(cache.path)
    assert (again.embed([*TEXTS[::-1], TEXTS[0]]) == cache.embed([*TEXTS[::-1], TEXTS[0]])).all()
    assert sorted(path.name for path in Path(cache.path.parent).iterdir()) == ["vectors.npz"]
