"""Single tensors straight from safetensors files, sharded or not.

Knows the names T5Gemma 2 checkpoints use and gives each half only its own, so that neither ever
holds the other half or the vision tower. Does not know what the tensors are for.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from checkpoint.errors import CheckpointError
from checkpoint.files import read_json

# transformers wrote the text encoder as `encoder.*` first and as `encoder.text_model.*` later.
_PREFIX = re.compile(
    r"^(?:model\.)?(?:(encoder)\.(?:text_model\.|language_model\.)?|(decoder)\.)(layers|norm|embed_tokens)\."
)
# safetensors names of the formats a weight may be stored in.
FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
CHUNK_BYTES = 32 << 20
_HEAD = re.compile(r"^lm_head\.(?:out_proj\.)?weight$")


def canonical_name(name: str) -> str | None:
    """`encoder.…`, `decoder.…` or `lm_head.weight`; None for tensors that no half reads (the vision tower)."""
    if _HEAD.match(name):
        return "lm_head.weight"
    match = _PREFIX.match(name)
    if match is None:
        return None
    return f"{match[1] or match[2]}.{match[3]}.{name[match.end() :]}"


class TensorFiles:
    """The safetensors files of one checkpoint, by canonical tensor name."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._where: dict[str, tuple[Path, str]] = {}
        for path in _shards(directory):
            with _open(path) as shard:
                for name in shard.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                    canonical = canonical_name(name)
                    if canonical is not None:
                        self._where[canonical] = (path, name)

    def names(self) -> list[str]:
        return sorted(self._where)

    def read(self, names: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Reads tensors chunk by chunk, so the peak is the result plus one chunk.

        Args:
            names: canonical name -> expected shape.

        Raises:
            CheckpointError: naming every missing tensor, or the first one of another shape.
        """
        missing = [name for name in names if name not in self._where]
        if missing:
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise CheckpointError(f"{self._directory}: {len(missing)} tensors are missing: {shown}")
        return {name: self._read_one(name, shape, dtype) for name, shape in names.items()}

    def digest(self, names: list[str]) -> bytes:
        """sha256 over names, dtypes, shapes and bytes; how tensors are spread over files does not matter."""
        total = hashlib.sha256()
        for name in sorted(names):
            if name not in self._where:
                raise CheckpointError(f"{self._directory}: tensor {name} is missing")
            shape, stored_dtype = self._describe(name)
            total.update(f"{name}|{stored_dtype}|{shape}|".encode())
            for chunk in self._chunks(name, shape):
                total.update(chunk.contiguous().view(torch.uint8).flatten().numpy().data)
        return total.digest()

    def _read_one(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        path, _ = self._where[name]
        stored_shape, stored_dtype = self._describe(name)
        if stored_shape != shape:
            raise CheckpointError(f"{path}: {name} has the shape {stored_shape}; config.json says {shape}")
        if stored_dtype not in FLOAT_TYPES:
            raise CheckpointError(f"{path}: {name} is stored as {stored_dtype}; expected one of {sorted(FLOAT_TYPES)}")
        tensor = torch.empty(shape, dtype=dtype)
        row = 0
        for chunk in self._chunks(name, shape):
            tensor[row : row + len(chunk)] = chunk
            row += len(chunk)
        return tensor

    def _describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype as stored."""
        path, stored = self._where[name]
        with _open(path) as shard:
            part = cast(Any, shard).get_slice(stored)
            return tuple(part.get_shape()), str(part.get_dtype())

    def _chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """Consecutive rows of one tensor, at most CHUNK_BYTES (as float32) at a time.

        Each chunk has its own mapping: pages of a mapping count as ours for as long as it lives,
        and an embedding read through one would be held twice.
        """
        path, stored = self._where[name]
        row_bytes = 4 * math.prod(shape[1:])
        step = max(1, CHUNK_BYTES // max(row_bytes, 1))
        for first in range(0, shape[0], step):
            with _open(path) as shard:
                try:
                    yield cast(torch.Tensor, cast(Any, shard).get_slice(stored)[first : first + step])
                except SafetensorError as exc:
                    raise CheckpointError(f"{path}: tensor {stored} cannot be read ({exc})") from exc


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({exc})") from exc


def _shards(directory: Path) -> Iterator[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise CheckpointError(f"{directory}: neither model.safetensors nor model.safetensors.index.json is there")
        yield single
        return
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map is missing or no object")
    for name in sorted({str(shard) for shard in weight_map.values()}):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name")
        if not (directory / name).exists():
            raise CheckpointError(f"{directory}: shard {name} is named by the index and missing")
        yield directory / name
