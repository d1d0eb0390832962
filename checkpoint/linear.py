"""Matrix products with weights laid out once as the machine reads them. Knows torch's operators, not the model.

On a CPU oneDNN multiplies blocked weights. Handed plain ones it re-orders them on every call, which
costs a tenth of a large batch and most of a small one; so they are re-ordered here, at load. The
operators are the ones torch.compile emits, pinned with torch by constraints.txt; a build or device
without them multiplies plain weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class Linear:
    """x Wᵀ."""

    def __init__(self, weight: Tensor) -> None:
        """
        Args:
            weight: (out, in); not held where it is re-ordered.
        """
        self.out_features, self.in_features = weight.shape
        self.packed = weight.device.type == "cpu" and _has_onednn(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.packed:
            return F.linear(x, self.weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return product


class GatedLinear:
    """gelu(x Gᵀ) · (x Uᵀ), the first half of an MLP.

    oneDNN applies gelu and product while the matrix product's tile is still in cache; torch's own
    tanh over bfloat16 would cost more than it.
    """

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self.gate, self.up = Linear(gate), Linear(up)

    def __call__(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out)."""
        if not self.gate.packed:
            return F.gelu(self.gate(x), approximate="tanh").mul_(self.up(x))
        linear = torch.ops.mkldnn._linear_pointwise
        gated = linear(x, self.gate.weight, None, "gelu", [], "tanh")
        fused: Tensor = linear.binary(x, gated, self.up.weight, None, "mul")
        return fused


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether this build's operators do what they are used for here, tried on a product that is exact."""
    if dtype not in (torch.float32, torch.bfloat16) or not cast(Any, torch.backends.mkldnn).is_available():
        return False
    x = torch.arange(32, dtype=dtype).view(4, 8) / 8
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(x)
        linear = torch.ops.mkldnn._linear_pointwise
        product = linear.binary(x, linear(x, weight, None, "gelu", [], "tanh"), weight, None, "mul")
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(product, F.gelu(x @ x.T, approximate="tanh") * (x @ x.T), rtol=0.02)
