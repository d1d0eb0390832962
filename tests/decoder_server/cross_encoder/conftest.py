"""Random checkpoints of every architecture, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.synthetic import make_cross_encoder

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """tiny(architecture, **arguments of make_cross_encoder) -> directory, each made once."""
    made: dict[str, Path] = {}

    def make(architecture: str, **options: Any) -> Path:
        key = f"{architecture} {sorted(options.items())}"
        if key not in made:
            made[key] = make_cross_encoder(tmp_path_factory.mktemp("cross") / "model", architecture, **options)
        return made[key]

    return make
