"""The gated half of an MLP as fused as the machine allows. Knows torch's operators, not the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

GatedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]


def gated_linear_for(weight: Tensor) -> GatedLinear:
    """gelu(x gateT) * (x upT) for weights of this kind.

    On a CPU in bfloat16 oneDNN applies gelu and product while the matrix product's tile is still in
    cache; torch's own bfloat16 tanh costs more than the product it follows. The operators are the
    ones torch.compile emits, pinned with torch by constraints.txt; a build without them gets the
    plain form.
    """
    fused = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _has_onednn_pointwise()
    return _fused_gated_linear if fused else _plain_gated_linear


def _plain_gated_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """(tokens, dim), (inner, dim), (inner, dim) -> (tokens, inner)."""
    return F.gelu(F.linear(x, gate), approximate="tanh").mul_(F.linear(x, up))


def _fused_gated_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    gated = linear(x, gate, None, "gelu", [], "tanh")
    fused: Tensor = linear.binary(x, gated, up, None, "mul")
    return fused


def _has_onednn_pointwise() -> bool:
    if not cast(Any, torch.backends.mkldnn).is_available():
        return False
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    try:
        return torch.allclose(_fused_gated_linear(x, x, x), _plain_gated_linear(x, x, x), rtol=0.02)
    except (AttributeError, RuntimeError):
        return False
