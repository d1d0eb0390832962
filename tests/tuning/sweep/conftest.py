"""One small sweep over the hand-made collection, and what it was made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preread.values import parse_stages
from tuning.config import SweepSettings
from tuning.judged import JudgedCollection, read_judged
from tuning.sweep.report import SweepReport
from tuning.sweep.tune import tune

SETTINGS = SweepSettings(
    stored_ratios=(1, 2),
    codecs=("Flat", "SQ8"),
    read_ratios=(1, 2, 8),
    cascades=(parse_stages("8:3,2"),),
    overlap_k=3,
    num_resamples=300,
    timed_queries=0,
    rounds=2,
)

Sweep = Callable[..., SweepReport]


@pytest.fixture
def judged(beir: Path) -> JudgedCollection:
    return read_judged(beir)


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One work directory for all: it is named by its inputs, so what one test computed the next one finds."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def sweep(judged: JudgedCollection, tiny: Path, kept: Path) -> Sweep:
    """Sweeps with some settings changed; `judged`, `work_dir` and what tune() takes may be given."""

    def run(**given: Any) -> SweepReport:
        of_tune = {name: given.pop(name) for name in ("progress",) if name in given}
        data = {name: given.pop(name) for name in ("candidates", "stored") if name in given}
        collection, work_dir = replace(given.pop("judged", judged), **data), given.pop("work_dir", kept)
        settings = replace(SETTINGS, **given)
        return tune(collection, tiny, settings, work_dir=work_dir, device="cpu", dtype="float32", **of_tune)

    return run
