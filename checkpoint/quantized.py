"""Tensors as files store them, 8- and 4-bit floats with their scales included, read as plain numbers.

Two writers' layouts are read, by the names of the tensors. A module `m` with a weight of shape (out, in) has

    FP8, both           m.weight F8_E4M3 (out, in); m.weight_scale one number, or one per row
                        weight = m.weight * m.weight_scale
    NVFP4, modelopt     m.weight U8 (out, in / 2); m.weight_scale F8_E4M3 (out, in / 16); m.weight_scale_2 one number
                        weight = e2m1(m.weight) * m.weight_scale * m.weight_scale_2
    NVFP4,              m.weight_packed U8 (out, in / 2); m.weight_scale as above; m.weight_global_scale one number
    compressed-tensors  weight = e2m1(m.weight_packed) * m.weight_scale / m.weight_global_scale

A byte of NVFP4 holds two e2m1 numbers, the earlier in its low half. Sources: NVIDIA Model Optimizer's unified
Hugging Face checkpoint (docs/source/deployment/3_unified_hf.rst) and NVFP4QTensor; compressed-tensors'
float-quantized and nvfp4-pack-quantized compressors; vLLM's modelopt and compressed_tensors loaders.

Every other scheme is an error: its weights would load as numbers of another meaning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
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


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """One tensor as a file holds it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it

    def rows(self, first: int, last: int) -> Tensor:
        # Each call has its own mapping: pages of a mapping count as ours for as long as it lives.
        with _opened(self.path) as shard:
            try:
                part = cast(Any, shard)
                return cast(Tensor, part.get_slice(self.name)[first:last] if self.shape else part.get_tensor(self.name))
            except SafetensorError as exc:
                raise CheckpointError(f"{self.path}: tensor {self.name} cannot be read ({exc})") from exc


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight as a model uses it, with the scales that were stored for it."""

    values: _StoredTensor
    scale: _StoredTensor | None = None
    global_scale: _StoredTensor | None = None
    divides: bool = False  # by the global scale

    @property
    def quantized(self) -> bool:
        return self.scale is not None

    def check_format(self) -> None:
        """Raises CheckpointError where a weight is stored in a format that says nothing without its scales."""
        if not self.quantized and self.values.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{self.values.path}: {self.values.name} is stored as {self.values.dtype}; "
                f"expected one of {sorted(FLOAT_TYPES)}; {REMEDY}"
            )

    @property
    def parts(self) -> list[_StoredTensor]:
        return [part for part in (self.values, self.scale, self.global_scale) if part is not None]

    @property
    def shape(self) -> tuple[int, ...]:
        if self.global_scale is None:
            return self.values.shape
        return (*self.values.shape[:-1], 2 * self.values.shape[-1])

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) as stored, or in float32 where they were quantized."""
        values = self.values.rows(first, last)
        if self.scale is None:
            return values
        if self.global_scale is None:
            one = math.prod(self.scale.shape) == 1
            scale = self.scale.rows(0, 1) if one else self.scale.rows(first, last)
            return values.float() * scale.float().reshape(-1, 1)
        codes = torch.stack([values & 0xF, values >> 4], dim=-1).flatten(-2)  # (rows, in)
        scales = self.scale.rows(first, last).float().repeat_interleave(BLOCK, dim=-1)
        overall = self.global_scale.rows(0, 1).float().reshape(())
        weight: Tensor = _E2M1[codes.long()] * scales
        return weight.div_(overall) if self.divides else weight.mul_(overall)

    def chunks(self) -> Iterator[Tensor]:
        """Consecutive rows, at most CHUNK_BYTES (as float32) at a time."""
        if not self.shape:
            yield self.rows(0, 1).reshape(1)
            return
        step = max(1, CHUNK_BYTES // max(4 * math.prod(self.shape[1:]), 1))
        for first in range(0, self.shape[0], step):
            yield self.rows(first, min(first + step, self.shape[0]))


def read_weights(directory: Path, files: Iterable[Path]) -> tuple[str, dict[str, Weight]]:
    """The scheme of a checkpoint's weights, "" where they are plain, and the weights by name; reads no numbers."""
    found: dict[str, _StoredTensor] = {}
    for path in files:
        with _opened(path) as shard:
            for name in shard.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                if name in found:
                    raise CheckpointError(
                        f"{directory}: {name} is stored in {found[name].path.name} and in {path.name}; "
                        "expected each tensor once"
                    )
                part = shard.get_slice(name)
                found[name] = _StoredTensor(path, name, tuple(part.get_shape()), str(part.get_dtype()))
    scheme = _declared_scheme(directory)
    return scheme, _pair_up(found) if scheme else {name: Weight(one) for name, one in found.items()}


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({exc})") from exc


def _declared_scheme(directory: Path) -> str:
    """`modelopt` or `compressed-tensors` where the checkpoint declares that its weights are quantized, else ""."""
    path, described = directory / "config.json", directory / HF_QUANT_CONFIG
    config = read_json(path, optional=True)
    schemes = {f"{path}: {key}": config.get(key) for key in ("quantization_config", "compression_config")}
    if described.exists():
        schemes[str(described)] = {"quant_method": "modelopt"} | read_json(described)
    methods = [_checked_scheme(where, scheme) for where, scheme in schemes.items() if scheme]
    return methods[-1] if methods else ""


def _checked_scheme(where: str, scheme: Any) -> str:
    if not isinstance(scheme, dict):
        raise CheckpointError(f"{where}: {scheme!r}; expected an object")
    method = str(scheme.get("quant_method", "unknown"))
    inner = scheme.get("quantization")
    facts = scheme | inner if isinstance(inner, dict) else scheme

    if method not in READ:
        raise CheckpointError(f"{where}: the weights are quantized ({method}); {REMEDY}")
    for key, allowed in READ[method].items():
        value = facts.get(key, "compressed" if key == "quantization_status" else None)
        if value not in allowed:
            raise CheckpointError(f"{where}: {key} is {value!r} ({method}); expected {' or '.join(allowed)}; {REMEDY}")
    if method != "compressed-tensors":
        return "modelopt"
    for key in ("sparsity_config", "transform_config"):  # 2:4 packing, and rotations of the activations
        if facts.get(key) not in (None, {}) and facts[key].get("format") != "dense":
            raise CheckpointError(f"{where}: has a {key}, which is not applied here; {REMEDY}")
    return method


def _pair_up(found: Mapping[str, _StoredTensor]) -> dict[str, Weight]:
    """Weights by the name that a model knows them by; scales of activations are left out."""
    weights: dict[str, Weight] = {}

    def add(name: str, weight: Weight) -> None:
        if name in weights:
            raise CheckpointError(f"{weight.values.path}: {name} is stored packed and plain; expected one of them")
        weights[name] = weight

    for name, stored in found.items():
        module, _, kind = name.rpartition(".")
        scale = found.get(f"{module}.weight_scale")
        if kind == "weight_packed" or (kind == "weight" and stored.dtype == "U8"):
            divides = kind == "weight_packed"
            overall = found.get(f"{module}.{'weight_global_scale' if divides else 'weight_scale_2'}")
            add(f"{module}.weight", _packed(stored, scale, overall, divides))
        elif kind == "weight" and stored.dtype == "F8_E4M3":
            add(name, _scaled(stored, scale))
    used = {part.name for weight in weights.values() for part in weight.parts}
    scaled = {name.rpartition(".")[0] for name in weights}
    scaled |= {module.rpartition(".")[0] for module in scaled}  # the attention whose projections they are
    for name, stored in found.items():
        module, _, kind = name.rpartition(".")
        if name not in used and not (kind in ACTIVATION_SCALES and module in scaled):
            add(name, Weight(stored))
    return weights


def _scaled(values: _StoredTensor, scale: _StoredTensor | None) -> Weight:
    """An FP8 weight whose scale fits."""
    rows = values.shape[0] if len(values.shape) == 2 else None
    if scale is None or rows is None or scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        found = "none" if scale is None else f"shape {scale.shape}"
        raise CheckpointError(
            f"{values.path}: {values.name} is F8_E4M3 {values.shape} and its weight_scale has {found}; "
            f"expected one number, or one for each row; {REMEDY}"
        )
    return Weight(values, _float(scale))


def _packed(values: _StoredTensor, scale: _StoredTensor | None, overall: _StoredTensor | None, divides: bool) -> Weight:
    """An NVFP4 weight whose scales fit."""
    wanted = (*values.shape[:-1], 2 * values.shape[-1] // BLOCK) if values.shape else ()
    fits = len(values.shape) == 2 and 2 * values.shape[-1] % BLOCK == 0 and values.dtype == "U8"
    if scale is None or overall is None or not fits or scale.shape != wanted or scale.dtype != "F8_E4M3":
        raise CheckpointError(
            f"{values.path}: {values.name} is {values.dtype} {values.shape} without the scales of NVFP4; expected "
            f"weight_scale F8_E4M3 {wanted} and weight_scale_2 or, where it is packed, weight_global_scale; {REMEDY}"
        )
    if math.prod(overall.shape) != 1:
        raise CheckpointError(f"{overall.path}: {overall.name} has the shape {overall.shape}; expected one number")
    return Weight(values, scale, _float(overall), divides)


def _float(scale: _StoredTensor) -> _StoredTensor:
    if scale.dtype not in FLOAT_TYPES:
        raise CheckpointError(f"{scale.path}: {scale.name} is stored as {scale.dtype}; expected a float")
    return scale
