"""A sweep's work directory, so that a run that was killed goes on: one folder per set of inputs.

A file of arrays is whole or absent. States are appended to one file: if the power fails, reading finds the damage.
"""

import fcntl
import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.states import PassageStates
from preread_edge.outputs import write_output
from tuning import EvaluationError
from tuning.progress import SILENT, StageProgress
from tuning.rerank import StateSource, chunked


class WorkDir:
    """`root/<digest of the inputs>/`."""

    def __init__(self, root: Path, inputs: Mapping[str, Any]) -> None:
        """`inputs`: everything that the contents depend on, as JSON values."""
        document = json.dumps(inputs, sort_keys=True, ensure_ascii=False, indent=1).encode()
        self.path = root / hashlib.sha256(document).hexdigest()[:16]
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "inputs.json").exists():
            write_output(self.path / "inputs.json", document)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For this process alone; the kernel releases it when the process dies. Raises EvaluationError: it is held."""
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise EvaluationError(f"{self.path}: another run on the same inputs is working here") from exc
            yield

    def save(self, name: str, **arrays: NDArray[Any] | np.generic) -> None:
        """Arrays under one name; whole or absent."""
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, content.getvalue())

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """The arrays saved under the name, or None: not there, or damaged."""
        try:
            # Opened here: numpy does not close a file that it cannot read.
            with self._path(name).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def _path(self, name: str) -> Path:
        """Commas and brackets of a codec's factory string become code points, so that names stay distinct."""
        return self.path / ("".join(c if c.isalnum() or c in "-_/" else f"~{ord(c):x}" for c in name) + ".npz")


class _Extent(NamedTuple):
    start: int  # row in the file
    num_states: int
    window_tokens: tuple[int, ...]
    truncated: bool
    digest: bytes


class SpilledStates:
    """Every candidate passage's states once, as their source gives them, in a directory.

    `states.f32` holds the rows, `passages.jsonl` a line for each chunk that is whole. A chunk counts when its line is
    there; rows that a killed run left after it are cut off and made again.
    """

    def __init__(self, directory: Path, ratio: int, dim: int, chunk_bytes: int = 128 << 20) -> None:
        self.ratio, self.dim, self._chunk_bytes = ratio, dim, chunk_bytes
        self.seconds = 0.0  # that the source took, over all runs
        self.num_not_finite = 0  # passages left out because their states hold NaN or infinity
        self.num_tokens = 0
        self.truncated: set[str] = set()
        self._data, self._index = directory / "states.f32", directory / "passages.jsonl"
        self._extents: dict[str, _Extent] = {}
        self._num_rows, self._complete = 0, False
        content = self._index.read_bytes() if self._index.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        try:
            for line in map(json.loads, whole.splitlines()):
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

    @property
    def passage_ids(self) -> list[str]:
        """In file order."""
        return list(self._extents)

    @property
    def complete(self) -> bool:
        """Whether everything that the source gave is here."""
        return self._complete

    def fill(self, source: StateSource, passage_ids: Sequence[str], progress: StageProgress = SILENT) -> None:
        """Takes states that are missing here from the source, a chunk at a time. Does nothing where it is complete."""
        if self._complete:
            return
        missing = [p for p in passage_ids if p not in self._extents]
        begun = time.perf_counter()
        with self._data.open("ab") as data, self._index.open("a", encoding="utf-8") as index:
            data.truncate(self._num_rows * self.dim * 4)  # rows of a chunk that a killed run did not finish
            for chunk in source.chunks(missing, progress):
                seconds = time.perf_counter() - begun
                kept = {p: one for p, one in chunk.items() if np.isfinite(one.states).all()}
                passages = []
                for p, one in kept.items():
                    data.write(np.ascontiguousarray(one.states, dtype="<f4").data)
                    passages.append([p, one.num_states, list(one.window_tokens), one.truncated, one.text_digest.hex()])
                data.flush()
                line = {"seconds": seconds, "not_finite": len(chunk) - len(kept), "passages": passages}
                index.write(json.dumps(line, ensure_ascii=False) + "\n")
                index.flush()
                self._take(line)
                begun = time.perf_counter()
            index.write(json.dumps({"complete": True}) + "\n")
        self._complete = True

    def chunk_ids(self, passage_ids: Sequence[str]) -> list[list[str]]:
        """Passages to read together, in file order, always cut alike; nothing is read."""
        chosen = set(passage_ids)
        sized = ((p, extent.num_states * self.dim * 4) for p, extent in self._extents.items() if p in chosen)
        return list(chunked(sized, self._chunk_bytes))

    def states(self, passage_id: str) -> PassageStates:
        """One passage; its states are read from the file, not mapped. Raises KeyError."""
        at = self._extents[passage_id]
        flat = np.fromfile(self._data, dtype="<f4", count=at.num_states * self.dim, offset=at.start * self.dim * 4)
        rows = flat.astype(np.float32, copy=False).reshape(at.num_states, self.dim)
        return PassageStates(rows, at.window_tokens, self.ratio, at.truncated, at.digest)

    def sample(self, ratio: int, num_states: int, seed: int) -> NDArray[np.float32]:
        """At most `num_states` states at `ratio` of passages drawn at random, (n, dim); by seed, always the same."""
        ids, count = self.passage_ids, 0
        taken = [np.empty((0, self.dim), dtype=np.float32)]
        for place in np.random.default_rng(seed).permutation(len(ids)).tolist():
            if count >= num_states:
                break
            taken.append(self.states(ids[place]).at_ratio(ratio).states)
            count += len(taken[-1])
        return np.concatenate(taken)[:num_states]

    def _take(self, line: Mapping[str, Any]) -> None:
        self.seconds += line["seconds"]
        self.num_not_finite += line["not_finite"]
        for p, num_states, windows, truncated, digest in line["passages"]:
            self._extents[p] = _Extent(self._num_rows, num_states, tuple(windows), truncated, bytes.fromhex(digest))
            self._num_rows += num_states
            self.num_tokens += sum(windows)
            self.truncated |= {p} if truncated else set()
