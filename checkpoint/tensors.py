"""Single tensors straight from safetensors files, sharded or not, quantized or not.

Every tensor of a checkpoint is used, known to be unused, or an error that names it: one that is left over would make
scores that are not the model's. Cross-encoders read them by the names they are stored under; of T5Gemma 2 each half
reads its own by their canonical names, so that neither ever holds the other half or the vision tower.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from checkpoint.files import CheckpointError, read_json
from checkpoint.quantized import HF_QUANT_CONFIG, REMEDY, Weight, read_weights

# transformers wrote the text encoder as `encoder.*` first and as `encoder.text_model.*` later.
_PREFIX = re.compile(
    r"^(?:model\.)?(?:(encoder)\.(?:text_model\.|language_model\.)?|(decoder)\.)(layers|norm|embed_tokens)\."
)
_VISION = re.compile(r"^(?:model\.)?encoder\.(?:vision_tower|multi_modal_projector)\.")
# Stored by some writers, and computed by every forward pass.
_BUFFERS = re.compile(r"(?:^|\.)(?:position_ids|token_type_ids|(?:\w+_)?inv_freq|embed_scale)$")
_ADAPTERS = re.compile(r"(?:^|\.)(?:lora_|base_layer\.|modules_to_save\.|ia3_|adapter)")
_QUANTIZED = re.compile(
    r"(?:scale|_scale_inv|_packed|zero_point|qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state[\w.]*|SCB|"
    r"weight_format|weight_shape)(?:$|\.)|_scale(?:_2)?$"
)


class StoredTensors:
    """A checkpoint's tensors; quantized weights read as plain ones. Opening reads names, shapes and formats."""

    def __init__(self, directory: Path, canonical: Collection[str] | None = None) -> None:
        """
        Args:
            canonical: names of T5Gemma 2 that one half or the other reads; None: names are as they are stored.
        """
        self.directory = directory
        self.files = _safetensors_files(directory)
        # The scheme is "", modelopt or compressed-tensors.
        self.quantization, self.weights = read_weights(directory, self.files)
        if canonical is not None:
            self._rename(canonical)

    def _rename(self, canonical: Collection[str]) -> None:
        stored: dict[str, str] = {}  # by canonical name
        unused = []
        for name in sorted(self.weights):
            known = _canonical_name(name)
            if known is None or known not in canonical:
                if not _VISION.match(name):
                    unused.append(name)
            elif known in stored:
                raise CheckpointError(
                    f"{self.directory}: {stored[known]} and {name} are the same tensor {known}; expected one"
                )
            else:
                stored[known] = name
        self.refuse_unused(unused)
        self.weights = {known: self.weights[name] for known, name in stored.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def refuse_missing(self, names: Iterable[str]) -> None:
        """Raises CheckpointError where there are names of weights that are not stored."""
        missing = sorted(names)
        if missing:
            raise CheckpointError(
                f"{self.directory}: {len(missing)} weights are not in the checkpoint and would be random: "
                f"{_first_of(missing)}"
            )

    def refuse_unused(self, names: Iterable[str]) -> None:
        """Raises CheckpointError where one of the names is none of a buffer, with a remedy."""
        left = sorted(name for name in names if not _BUFFERS.search(name))
        if not left:
            return
        if any(_ADAPTERS.search(name) for name in left):
            remedy = "merge the adapter into the weights first"
        elif any(_QUANTIZED.search(name) for name in left):
            remedy = REMEDY
        else:
            remedy = "expected the tensors that config.json implies: it is of another model, or has another size"
        raise CheckpointError(
            f"{self.directory}: {len(left)} stored tensors are not used by this model, whose scores would be wrong "
            f"without them: {_first_of(left)}; {remedy}"
        )

    def check_formats(self) -> None:
        """Weight.check_format of all that a model reads."""
        for name, weight in sorted(self.weights.items()):
            if not _BUFFERS.search(name):
                weight.check_format()

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError where a weight has another shape, or a format that cannot be read."""
        weight = self.weights[name]
        if weight.shape != shape:
            raise CheckpointError(
                f"{weight.values.path}: {name} has the shape {weight.shape}; config.json says {shape}"
            )
        weight.check_format()

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Rows of a matrix in float32, (len(indices), width), without reading the rest."""
        weight = self.weights[name]
        weight.check_format()
        count = weight.shape[0] if len(weight.shape) == 2 else 0
        if not all(0 <= index < count for index in indices):
            raise CheckpointError(
                f"{weight.values.path}: {name} has the shape {weight.shape}; expected row {max(indices)}"
            )
        return torch.cat([weight.rows(index, index + 1) for index in indices]).float()

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A whole tensor, chunk by chunk, so the peak is the result plus one chunk."""
        weight = self.weights[name]
        if _BUFFERS.search(name) and not weight.quantized:
            return weight.values.rows(0, math.prod(weight.shape[:1]))
        weight.check_format()
        tensor = torch.empty(weight.shape, dtype=dtype)
        if not weight.shape:
            return tensor.copy_(weight.rows(0, 1))
        row = 0
        for chunk in weight.chunks():
            tensor[row : row + len(chunk)] = chunk
            row += len(chunk)
        return tensor

    def digest(self) -> str:
        """sha256 over the files' bytes, and quantization's own: a second or two per gigabyte."""
        total = hashlib.sha256()
        described = self.directory / HF_QUANT_CONFIG
        for path in [*self.files, *([described] if described.exists() else [])]:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    def check_all(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError naming missing tensors, or one of another shape or format."""
        self.refuse_missing(shapes.keys() - self.weights.keys())
        for name, shape in shapes.items():
            self.check(name, shape)

    def read_all(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors by name, checked as in `check_all`."""
        self.check_all(shapes)
        return {name: self.read(name, dtype) for name in shapes}

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; reads both a chunk at a time."""
        a, b = self.weights[one], self.weights[other]
        if a.shape != b.shape:
            return False
        return all(torch.equal(x.float(), y.float()) for x, y in zip(a.chunks(), b.chunks(), strict=True))

    def digest_of(self, names: Iterable[str]) -> bytes:
        """sha256 over names, dtypes, shapes and bytes; how tensors are spread over files does not matter."""
        total = hashlib.sha256()
        for name in sorted(names):
            if name not in self:
                raise CheckpointError(f"{self.directory}: tensor {name} is missing")
            weight = self.weights[name]
            for part in weight.parts:
                label = name if not weight.quantized else f"{name} from {part.name.rpartition('.')[2]}"
                total.update(f"{label}|{part.dtype}|{part.shape}|".encode())
                for chunk in Weight(part).chunks():
                    total.update(chunk.contiguous().view(torch.uint8).flatten().numpy().data)
        return total.digest()


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _canonical_name(name: str) -> str | None:
    """`encoder.…`, `decoder.…` or `lm_head.weight`; None for names of neither half."""
    if name == "lm_head.out_proj.weight":
        return "lm_head.weight"
    match = _PREFIX.match(name)
    if match is None:
        return None
    return f"{match[1] or match[2]}.{match[3]}.{name[match.end() :]}"


def _safetensors_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if (directory / name).exists():
            raise CheckpointError(
                f"{directory}: {name} is there and would not be applied; merge the adapter into the weights first"
            )
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map is missing or no object")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index}: shard {name!r} is not a plain file name")
            if not (directory / name).exists():
                raise CheckpointError(f"{directory}: shard {name} is named by the index and missing")
        if single.exists() and single.name not in names:
            # transformers reads the single file then, other programs the shards.
            raise CheckpointError(f"{directory}: {single.name} and {index.name} are both there; expected one of them")
        return [directory / name for name in names]
    if single.exists():
        return [single]
    other = [path.name for path in (*directory.glob("*.bin"), *directory.glob("*.pt"))]
    also = f"; {', '.join(sorted(other))} can run code when opened and is not read" if other else ""
    raise CheckpointError(f"{directory}: no model.safetensors and no index of shards{also}")
