"""Products with packed weights are the plain ones, for any number of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from checkpoint.layers import GatedLinear, Linear

# Of float32: what summing in another order moves; of bfloat16: half a unit in the last place of the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 257])
def test_products_are_the_plain_ones(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 64, generator=generator).to(dtype)
    gate, up = (torch.randn(2, 128, 64, generator=generator) / 8).to(dtype)
    torch.testing.assert_close(Linear(up)(x).float(), x.float() @ up.float().T, atol=TOLERANCE[dtype], rtol=0.01)
    exact = F.gelu(x.float() @ gate.float().T, approximate="tanh") * (x.float() @ up.float().T)
    found = GatedLinear(gate, up)(x).float()
    plain = (F.gelu(F.linear(x, gate), approximate="tanh") * F.linear(x, up)).float()
    assert (found - exact).abs().max() <= max(1.5 * (plain - exact).abs().max().item(), TOLERANCE[torch.float32])


def test_leading_axes_are_rows() -> None:
    x, weight = (torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in ((2, 5, 16), (8, 16)))
    torch.testing.assert_close(Linear(weight)(x).shape, (2, 5, 8))
