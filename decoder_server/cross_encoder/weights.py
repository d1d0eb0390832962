"""Single rows and an identity straight from a checkpoint's safetensors files. Does not know what a tensor is for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from checkpoint.errors import CheckpointError
from checkpoint.files import read_json


def safetensors_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors.

    Raises:
        CheckpointError: none, or one that the index names is missing.
    """
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map is missing or no object")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not (directory / name).exists():
                raise CheckpointError(f"{directory}: shard {name!r} is named by the index and missing")
        return [directory / name for name in names]
    if single.exists():
        return [single]
    other = [path.name for path in (*directory.glob("*.bin"), *directory.glob("*.pt"))]
    also = f"; {', '.join(sorted(other))} can run code when opened and is not read" if other else ""
    raise CheckpointError(f"{directory}: no model.safetensors and no index of shards{also}")


class StoredTensors:
    """Names and places of a checkpoint's tensors."""

    def __init__(self, directory: Path) -> None:
        self.files = safetensors_files(directory)
        self._where: dict[str, Path] = {}
        for path in self.files:
            try:
                with safe_open(str(path), framework="pt") as shard:
                    self._where |= dict.fromkeys(shard.keys(), path)
            except (SafetensorError, OSError) as exc:
                raise CheckpointError(f"{path}: cannot be read as safetensors ({exc})") from exc

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        return sorted(self._where)

    def rows(self, name: str, indices: list[int]) -> torch.Tensor:
        """Rows of a matrix in float32, (len(indices), width), without reading the rest."""
        path = self._where[name]
        with safe_open(str(path), framework="pt") as shard:
            part = cast(Any, shard).get_slice(name)
            count = part.get_shape()[0]
            if not all(0 <= index < count for index in indices):
                raise CheckpointError(f"{path}: {name} has {count} rows; expected row {max(indices)}")
            return torch.cat([cast(torch.Tensor, part[index : index + 1]) for index in indices]).float()

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor in float32."""
        with safe_open(str(self._where[name]), framework="pt") as shard:
            return cast(torch.Tensor, cast(Any, shard).get_tensor(name)).float()

    def digest(self) -> str:
        """sha256 over the files' bytes: a second or two per gigabyte."""
        total = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()
