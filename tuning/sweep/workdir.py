"""Where a sweep keeps what took long, so that a run that was killed goes on: one folder per set of inputs.

A file is written aside and renamed, so it is whole or absent; that holds when the process dies, not when the power
does, and then the damage is found on reading and the piece made again. Does not know what the arrays mean.

What names a work directory: a digest of everything that states and margins depend on. Computes none of them.

States on disk: every candidate passage's states once, as the source gives them, for as many readings as it takes.

`states.f32` holds the rows, `passages.jsonl` a line for each chunk that is whole. A chunk counts when its line is
there; whatever a killed run left behind it is cut off and made again. Does not know codecs or queries.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.collection import Collection
from cache.states import PassageStates, text_digest
from checkpoint import Checkpoint
from decoder_server.models.backend import Backend
from tuning import EvaluationError
from tuning.judged import JudgedCollection
from tuning.progress import SILENT, Progress
from tuning.rerank import StateSource
from tuning.sweep.settings import SweepSettings
from tuning.trec import Run


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


WORK_VERSION = 1  # raised when what is kept in a work directory means something else


def inputs_of(
    judged: JudgedCollection,
    checkpoint: Checkpoint,
    backend: Backend,
    settings: SweepSettings,
    first: Run,
    from_states: Collection | None,
) -> dict[str, Any]:
    """Everything that states and margins depend on."""
    wanted = sorted({p for found in first.values() for p, _ in found})
    if from_states is not None:
        digests = from_states.digests(wanted)
        passages: list[Any] = [
            [p, digest.hex() if digest is not None else None] for p, digest in zip(wanted, digests, strict=True)
        ]
    else:
        passages = [[p, text_digest(judged.passages[p]).hex()] for p in wanted if p in judged.passages]
    candidates = [[q, judged.queries[q], [p for p, _ in found]] for q, found in first.items()]
    return {
        "version": WORK_VERSION,
        # Another codec, pass or product may round otherwise.
        "packages": {name: version(name) for name in ("preread", "faiss-cpu", "torch")},
        "fingerprint": checkpoint.identity().fingerprint,
        "weights": checkpoint.weights_digest(),
        "checkpoint_settings": asdict(checkpoint.settings),
        "states_of": from_states.manifest.binding if from_states is not None else None,
        "dtype": backend.dtype_name,
        "device": backend.device_name,
        "split": settings.split,
        "instruction": settings.instruction,
        "seed": settings.seed,
        "passages": _digest(passages),
        "candidates": _digest(candidates),
    }


def _digest(value: list[Any]) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()


READ_CHUNK_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class _Row:
    """Where one passage lies."""

    start: int
    num_states: int
    window_tokens: tuple[int, ...]
    truncated: bool
    digest: bytes


class SpilledStates:
    """A `StateSource` over a directory; chunks come in file order, always cut alike."""

    def __init__(self, directory: Path, ratio: int, dim: int, chunk_bytes: int = READ_CHUNK_BYTES) -> None:
        self.ratio = ratio
        self.dim = dim
        self.seconds = 0.0  # that the source took, over all runs
        self.num_not_finite = 0  # passages left out because their states hold NaN or infinity
        self._chunk_bytes = chunk_bytes
        self._data = directory / "states.f32"
        self._index = directory / "passages.jsonl"
        self._rows: dict[str, _Row] = {}
        self._num_rows = 0
        self._complete = False
        self._read_index()

    @property
    def passage_ids(self) -> list[str]:
        """Those that have states, in file order."""
        return list(self._rows)

    @property
    def num_tokens(self) -> int:
        return sum(sum(row.window_tokens) for row in self._rows.values())

    @property
    def truncated(self) -> set[str]:
        return {p for p, row in self._rows.items() if row.truncated}

    def fill(self, source: StateSource, passage_ids: Sequence[str], progress: Progress = SILENT) -> None:
        """Takes what is not here yet from the source, a chunk at a time. Does nothing where it is complete."""
        if self._complete:
            return
        missing = [p for p in passage_ids if p not in self._rows]
        begun = time.perf_counter()
        with self._data.open("ab") as data, self._index.open("a", encoding="utf-8") as index:
            data.truncate(self._num_rows * self.dim * 4)  # rows of a chunk that a killed run did not finish
            for chunk in source.chunks(missing, progress):
                seconds, begun = time.perf_counter() - begun, time.perf_counter()
                self._append(chunk, seconds, data, index)
                begun = time.perf_counter()
            index.write(json.dumps({"complete": True}) + "\n")
        self._complete = True

    def chunks(self, passage_ids: Sequence[str], progress: Progress = SILENT) -> Iterator[Mapping[str, PassageStates]]:
        for ids in self.chunk_ids(passage_ids):
            yield {p: self.states(p) for p in ids}

    def chunk_ids(self, passage_ids: Sequence[str]) -> list[list[str]]:
        """Which passages `chunks` gives together; nothing is read."""
        wanted = set(passage_ids)
        chunks: list[list[str]] = []
        num_bytes = self._chunk_bytes
        for p, row in self._rows.items():
            if p not in wanted:
                continue
            if num_bytes >= self._chunk_bytes:
                chunks.append([])
                num_bytes = 0
            chunks[-1].append(p)
            num_bytes += row.num_states * self.dim * 4
        return chunks

    def states(self, passage_id: str) -> PassageStates:
        """One passage; its states are read from the file, not mapped. Raises KeyError."""
        row = self._rows[passage_id]
        flat = np.fromfile(
            self._data, dtype="<f4", count=row.num_states * self.dim, offset=row.start * self.dim * 4
        ).astype(np.float32, copy=False)
        return PassageStates(
            flat.reshape(row.num_states, self.dim), row.window_tokens, self.ratio, row.truncated, row.digest
        )

    def sample(self, ratio: int, num_states: int, seed: int) -> NDArray[np.float32]:
        """At most `num_states` states at `ratio` of passages drawn at random, (n, dim); by seed, always the same."""
        order = np.random.default_rng(seed).permutation(len(self._rows))
        ids = self.passage_ids
        taken: list[NDArray[np.float32]] = []
        count = 0
        for place in order.tolist():
            if count >= num_states:
                break
            taken.append(self.states(ids[place]).at_ratio(ratio).states)
            count += len(taken[-1])
        return np.concatenate(taken)[:num_states] if taken else np.empty((0, self.dim), dtype=np.float32)

    def _append(self, chunk: Mapping[str, PassageStates], seconds: float, data: Any, index: Any) -> None:
        kept = {p: states for p, states in chunk.items() if np.isfinite(states.states).all()}
        line = {
            "seconds": seconds,
            "not_finite": len(chunk) - len(kept),
            "passages": [
                [p, states.num_states, list(states.window_tokens), states.truncated, states.text_digest.hex()]
                for p, states in kept.items()
            ],
        }
        for states in kept.values():
            data.write(np.ascontiguousarray(states.states, dtype="<f4").data)
        data.flush()
        index.write(json.dumps(line, ensure_ascii=False) + "\n")
        index.flush()
        self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        self.seconds += line["seconds"]
        self.num_not_finite += line["not_finite"]
        for p, num_states, windows, truncated, digest in line["passages"]:
            self._rows[p] = _Row(self._num_rows, num_states, tuple(windows), truncated, bytes.fromhex(digest))
            self._num_rows += num_states

    def _read_index(self) -> None:
        if not self._index.exists():
            return
        content = self._index.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            for text in whole.splitlines():
                line = json.loads(text)
                if line.get("complete"):
                    self._complete = True
                else:
                    self._take(line)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise EvaluationError(f"{self._index}: damaged ({exc}); delete the folder and run again") from exc
        if len(whole) < len(content):
            os.truncate(self._index, len(whole))
        have = self._data.stat().st_size if self._data.exists() else 0
        if have < self._num_rows * self.dim * 4:
            raise EvaluationError(f"{self._data}: {have} bytes, fewer than its index says; delete the folder")
