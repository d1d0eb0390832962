"""Single tensors straight from safetensors files, sharded or not, 8- and 4-bit floats read as plain numbers.

Every tensor of a checkpoint is used, known to be unused, or an error that names it: one that is left over would make
scores that are not the model's. Of T5Gemma 2 each half reads its own alone, by their canonical names.

Two writers' quantized layouts are read, by the names of the tensors. A module `m` with a weight of shape (out, in) has

    FP8, both           m.weight F8_E4M3 (out, in); m.weight_scale one number, or one per row
                        weight = m.weight * m.weight_scale
    NVFP4, modelopt     m.weight U8 (out, in / 2); m.weight_scale F8_E4M3 (out, in / 16); m.weight_scale_2 one number
                        weight = e2m1(m.weight) * m.weight_scale * m.weight_scale_2
    NVFP4,              m.weight_packed U8 (out, in / 2); m.weight_scale as above; m.weight_global_scale one number
    compressed-tensors  weight = e2m1(m.weight_packed) * m.weight_scale / m.weight_global_scale

A byte of NVFP4 holds two e2m1 numbers, the earlier in its low half. Sources: NVIDIA Model Optimizer's unified
Hugging Face checkpoint (docs/source/deployment/3_unified_hf.rst) and NVFP4QTensor; compressed-tensors'
float-quantized and nvfp4-pack-quantized compressors; vLLM's modelopt and compressed_tensors loaders. Every other
scheme is an error: its weights would load as numbers of another meaning.
"""

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint.files import CheckpointError, read_json

# safetensors names of the formats a plain weight may be stored in.
FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
HF_QUANT_CONFIG = "hf_quant_config.json"
MODELOPT: dict[str, tuple[str, ...]] = {"quant_algo": ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4")}
# By the method that a checkpoint declares, the values of its fields that are read here.
READ: dict[str, dict[str, tuple[str, ...]]] = {
    "modelopt": MODELOPT,
    "modelopt_fp4": MODELOPT,
    "compressed-tensors": {
        "format": ("float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
        "quantization_status": ("compressed",),
    },
}
CHUNK_BYTES = 32 << 20
BLOCK = 16  # numbers of NVFP4 that share a scale
# Scales of activations and of cached keys and values. Weights alone are taken from the checkpoint: activations stay in
# the format that computes, so nothing is divided by these and nothing has to be multiplied back.
ACTIVATION_SCALES = ("input_scale", "input_global_scale", "q_scale", "k_scale", "v_scale")
# By code: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats, FP4 E2M1).
_E2M1 = torch.tensor([sign * x for sign in (1, -1) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
REMEDY = (
    "serve the unquantized checkpoint, or one that modelopt or compressed-tensors wrote in FP8 or NVFP4; "
    "dtype=bfloat16 and runtime=onnx-int8 make a served model smaller"
)
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


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor as a file holds it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it

    def rows(self, first: int = 0, last: int | None = None) -> Tensor:
        # Each call has its own mapping: pages of a mapping count as ours for as long as it lives.
        with _opened(self.path) as shard:
            try:
                part = cast(Any, shard)
                return cast(Tensor, part.get_slice(self.name)[first:last] if self.shape else part.get_tensor(self.name))
            except SafetensorError as exc:
                raise CheckpointError(f"{self.path}: tensor {self.name} cannot be read ({exc})") from exc


@dataclass(frozen=True, slots=True)
class _Weight:
    """One weight as a model uses it, with the scales that were stored for it."""

    values: _Part
    scale: _Part | None = None
    global_scale: _Part | None = None
    divides: bool = False  # by the global scale

    @property
    def parts(self) -> list[_Part]:
        return [part for part in (self.values, self.scale, self.global_scale) if part is not None]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.values.shape
        return shape if self.global_scale is None else (*shape[:-1], 2 * shape[-1])

    def check_format(self) -> None:
        if self.scale is None and self.values.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{self.values.path}: {self.values.name} is stored as {self.values.dtype}; "
                f"expected one of {sorted(FLOAT_TYPES)}; {REMEDY}"
            )

    def rows(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) as stored, or in float32 where they were quantized."""
        values = self.values.rows(first, last)
        if self.scale is None:
            return values
        if self.global_scale is None:
            one = math.prod(self.scale.shape) == 1
            scale = self.scale.rows() if one else self.scale.rows(first, last)
            return values.float() * scale.float().reshape(-1, 1)
        codes = torch.stack([values & 0xF, values >> 4], dim=-1).flatten(-2)  # (rows, in)
        scales = self.scale.rows(first, last).float().repeat_interleave(BLOCK, dim=-1)
        overall = self.global_scale.rows().float().reshape(())
        weight: Tensor = _E2M1[codes.long()] * scales
        return weight.div_(overall) if self.divides else weight.mul_(overall)

    def chunks(self) -> Iterator[Tensor]:
        """Consecutive rows, at most CHUNK_BYTES (as float32) at a time."""
        if not self.shape:
            yield self.rows().reshape(1)
            return
        step = max(1, CHUNK_BYTES // max(4 * math.prod(self.shape[1:]), 1))
        for first in range(0, self.shape[0], step):
            yield self.rows(first, min(first + step, self.shape[0]))


class StoredTensors:
    """A checkpoint's tensors; quantized weights read as plain ones. Opening reads names, shapes and formats."""

    def __init__(self, directory: Path, canonical: Collection[str] | None = None) -> None:
        """With `canonical` names, those of T5Gemma 2 that either half reads; else names are as they are stored."""
        self.directory = directory
        self.files = _safetensors_files(directory)
        stored: dict[str, _Part] = {}
        for path in self.files:
            with _opened(path) as shard:
                for name in shard.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                    if name in stored:
                        raise CheckpointError(
                            f"{directory}: {name} is stored in {stored[name].path.name} and in {path.name}; "
                            "expected each tensor once"
                        )
                    part = shard.get_slice(name)
                    stored[name] = _Part(path, name, tuple(part.get_shape()), str(part.get_dtype()))
        self.quantized = _declares_quantization(directory)
        self.weights = _pair_up(stored) if self.quantized else {name: _Weight(one) for name, one in stored.items()}
        if canonical is None:
            return
        names: dict[str, str] = {}  # by canonical name
        unused = []
        for name in sorted(self.weights):
            match = _PREFIX.match(name)
            key = f"{match[1] or match[2]}.{match[3]}.{name[match.end() :]}" if match else ""
            key = "lm_head.weight" if name == "lm_head.out_proj.weight" else key
            if key not in canonical:
                unused += [] if _VISION.match(name) else [name]
            elif names.setdefault(key, name) != name:
                raise CheckpointError(f"{directory}: {names[key]} and {name} are the same tensor {key}; expected one")
        self.refuse_unused(unused)
        self.weights = {key: self.weights[name] for key, name in names.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def refuse_missing(self, names: Iterable[str]) -> None:
        """Raises CheckpointError where there are names of weights that are not stored."""
        if missing := sorted(names):
            raise CheckpointError(
                f"{self.directory}: {len(missing)} weights are not in the checkpoint and would be random: "
                f"{_first_of(missing)}"
            )

    def refuse_unused(self, names: Iterable[str]) -> None:
        """Raises CheckpointError where one of the names is none of a buffer, with a remedy."""
        left = sorted(name for name in names if not _BUFFERS.search(name))
        remedy = "expected the tensors that config.json implies: it is of another model, or has another size"
        if any(map(_ADAPTERS.search, left)):
            remedy = "merge the adapter into the weights first"
        elif any(map(_QUANTIZED.search, left)):
            remedy = REMEDY
        if left:
            raise CheckpointError(
                f"{self.directory}: {len(left)} stored tensors are not used by this model, whose scores would be wrong "
                f"without them: {_first_of(left)}; {remedy}"
            )

    def check_formats(self) -> None:
        """Raises CheckpointError where a weight is in a format that says nothing without its scales."""
        for name, weight in sorted(self.weights.items()):
            if not _BUFFERS.search(name):
                weight.check_format()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError naming missing tensors, or one of another shape, or one that cannot be read."""
        self.refuse_missing(shapes.keys() - self.weights.keys())
        for name, shape in shapes.items():
            one = self.weights[name]
            if one.shape != shape:
                raise CheckpointError(f"{one.values.path}: {name} has the shape {one.shape}; config.json says {shape}")
            one.check_format()

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Rows of a matrix in float32, (len(indices), width), without reading the rest."""
        one = self.weights[name]
        one.check_format()
        count = one.shape[0] if len(one.shape) == 2 else 0
        if not all(0 <= index < count for index in indices):
            raise CheckpointError(f"{one.values.path}: {name} has the shape {one.shape}; expected row {max(indices)}")
        return torch.cat([one.rows(index, index + 1) for index in indices]).float()

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A whole tensor, chunk by chunk, so the peak is the result plus one chunk."""
        weight = self.weights[name]
        if _BUFFERS.search(name) and weight.scale is None:
            return weight.rows()
        weight.check_format()
        tensor, row = torch.empty(weight.shape or (1,), dtype=dtype), 0
        for chunk in weight.chunks():
            tensor[row : row + len(chunk)] = chunk
            row += len(chunk)
        return tensor.reshape(weight.shape)

    def read_all(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by name, checked as in `check`."""
        self.check(shapes)
        return {name: self.read(name, dtype) for name in shapes}

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; reads both a chunk at a time."""
        a, b = self.weights[one], self.weights[other]
        chunks = zip(a.chunks(), b.chunks(), strict=True)
        return a.shape == b.shape and all(torch.equal(x.float(), y.float()) for x, y in chunks)

    def digest(self) -> str:
        """sha256 over the files' bytes, and quantization's own: a second or two per gigabyte."""
        total = hashlib.sha256()
        described = self.directory / HF_QUANT_CONFIG
        for path in [*self.files, *([described] if described.exists() else [])]:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    def digest_of(self, names: Iterable[str]) -> bytes:
        """sha256 over names, dtypes, shapes and bytes; how tensors are spread over files does not matter."""
        total = hashlib.sha256()
        for name in sorted(names):
            if name not in self:
                raise CheckpointError(f"{self.directory}: tensor {name} is missing")
            weight = self.weights[name]
            for part in weight.parts:
                label = name if weight.scale is None else f"{name} from {part.name.rpartition('.')[2]}"
                total.update(f"{label}|{part.dtype}|{part.shape}|".encode())
                for chunk in _Weight(part).chunks():
                    total.update(chunk.contiguous().view(torch.uint8).flatten().numpy().data)
        return total.digest()


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({exc})") from exc


def _safetensors_files(directory: Path) -> list[Path]:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if (directory / name).exists():
            told = f"{name} is there and would not be applied; merge the adapter into the weights first"
            raise CheckpointError(f"{directory}: {told}")
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
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


def _declares_quantization(directory: Path) -> bool:
    """Whether the checkpoint declares a scheme of quantized weights; one that is not read here is an error."""
    path, described = directory / "config.json", directory / HF_QUANT_CONFIG
    config = read_json(path, optional=True)
    schemes = {f"{path}: {key}": config.get(key) for key in ("quantization_config", "compression_config")}
    if described.exists():
        schemes[str(described)] = {"quant_method": "modelopt"} | read_json(described)
    declared = {where: scheme for where, scheme in schemes.items() if scheme}
    for where, scheme in declared.items():
        if not isinstance(scheme, dict):
            raise CheckpointError(f"{where}: {scheme!r}; expected an object")
        method, inner = str(scheme.get("quant_method", "unknown")), scheme.get("quantization")
        facts: dict[str, Any] = scheme | (inner if isinstance(inner, dict) else {})
        facts.setdefault("quantization_status", "compressed")
        if method not in READ:
            raise CheckpointError(f"{where}: the weights are quantized ({method}); {REMEDY}")
        for key, allowed in READ[method].items():
            if (value := facts.get(key)) not in allowed:
                told = f"{key} is {value!r} ({method}); expected {' or '.join(allowed)}"
                raise CheckpointError(f"{where}: {told}; {REMEDY}")
        # 2:4 packing, and rotations of the activations
        for key in ("sparsity_config", "transform_config") if method == "compressed-tensors" else ():
            if facts.get(key) not in (None, {}) and facts[key].get("format") != "dense":
                raise CheckpointError(f"{where}: has a {key}, which is not applied here; {REMEDY}")
    return bool(declared)


def _pair_up(stored: Mapping[str, _Part]) -> dict[str, _Weight]:
    """Weights by the name that a model knows them by; scales of activations are left out."""
    weights: dict[str, _Weight] = {}

    def add(name: str, weight: _Weight) -> None:
        if name in weights:
            raise CheckpointError(f"{weight.values.path}: {name} is stored packed and plain; expected one of them")
        weights[name] = weight

    for name, values in stored.items():
        module, _, kind = name.rpartition(".")
        scale = stored.get(f"{module}.weight_scale")
        if kind == "weight_packed" or (kind == "weight" and values.dtype == "U8"):
            divides = kind == "weight_packed"
            overall = stored.get(f"{module}.{'weight_global_scale' if divides else 'weight_scale_2'}")
            add(f"{module}.weight", _nvfp4(values, scale, overall, divides))
        elif kind == "weight" and values.dtype == "F8_E4M3":
            add(name, _fp8(values, scale))
    used = {part.name for weight in weights.values() for part in weight.parts}
    scaled = {name.rpartition(".")[0] for name in weights}
    scaled |= {module.rpartition(".")[0] for module in scaled}  # the attention whose projections they are
    for name, values in stored.items():
        module, _, kind = name.rpartition(".")
        if name not in used and not (kind in ACTIVATION_SCALES and module in scaled):
            add(name, _Weight(values))
    return weights


def _fp8(values: _Part, scale: _Part | None) -> _Weight:
    rows = values.shape[0] if len(values.shape) == 2 else None
    if scale is None or rows is None or scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        found = "none" if scale is None else f"shape {scale.shape}"
        raise CheckpointError(
            f"{values.path}: {values.name} is F8_E4M3 {values.shape} and its weight_scale has {found}; "
            f"expected one number, or one for each row; {REMEDY}"
        )
    return _Weight(values, _float(scale))


def _nvfp4(values: _Part, scale: _Part | None, overall: _Part | None, divides: bool) -> _Weight:
    wanted = (*values.shape[:-1], 2 * values.shape[-1] // BLOCK) if values.shape else ()
    fits = len(values.shape) == 2 and 2 * values.shape[-1] % BLOCK == 0 and values.dtype == "U8"
    if scale is None or overall is None or not fits or scale.shape != wanted or scale.dtype != "F8_E4M3":
        raise CheckpointError(
            f"{values.path}: {values.name} is {values.dtype} {values.shape} without the scales of NVFP4; expected "
            f"weight_scale F8_E4M3 {wanted} and weight_scale_2 or, where it is packed, weight_global_scale; {REMEDY}"
        )
    if math.prod(overall.shape) != 1:
        raise CheckpointError(f"{overall.path}: {overall.name} has the shape {overall.shape}; expected one number")
    return _Weight(values, scale, _float(overall), divides)


def _float(scale: _Part) -> _Part:
    if scale.dtype not in FLOAT_TYPES:
        raise CheckpointError(f"{scale.path}: {scale.name} is stored as {scale.dtype}; expected a float")
    return scale
