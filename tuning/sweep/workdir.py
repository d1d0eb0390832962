"""Where a sweep keeps what took long, so that a run that was killed goes on: one folder per set of inputs.

A file is written aside and renamed, so it is whole or absent; that holds when the process dies, not when the power
does, and then the damage is found on reading and the piece made again. Does not know what the arrays mean.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuning.errors import EvaluationError


class WorkDir:
    """`root/<digest of the inputs>/`."""

    def __init__(self, root: Path, inputs: Mapping[str, Any]) -> None:
        """
        Args:
            inputs: everything that what is kept here depends on, as JSON values.
        """
        document = json.dumps(inputs, sort_keys=True, ensure_ascii=False, indent=1)
        self.digest = hashlib.sha256(document.encode()).hexdigest()[:16]
        self.path = root / self.digest
        self.path.mkdir(parents=True, exist_ok=True)
        described = self.path / "inputs.json"
        if not described.exists():
            self._replace(described, document.encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """For this process alone; the kernel lets go when the process dies.

        Raises:
            EvaluationError: another run has it.
        """
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise EvaluationError(f"{self.path}: another run on the same inputs is working here") from exc
            yield

    def save(self, name: str, **arrays: NDArray[Any] | np.generic) -> None:
        """Arrays under one name; whole or absent."""
        path = self.path / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".tmp")
        with aside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(aside, path)

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """What was saved under the name, or None: not there, or damaged."""
        try:
            # Opened here: numpy does not close what it cannot read.
            with (self.path / f"{name}.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.npz").exists()

    @staticmethod
    def _replace(path: Path, content: bytes) -> None:
        aside = path.with_name(path.name + ".tmp")
        aside.write_bytes(content)
        os.replace(aside, path)
