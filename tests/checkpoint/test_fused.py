"""The fused gated linear computes the plain one."""

from __future__ import annotations

import pytest
import torch

from checkpoint.fused import _fused_gated_linear, _has_onednn_pointwise, _plain_gated_linear, gated_linear_for


@pytest.mark.skipif(not _has_onednn_pointwise(), reason="this torch build has no oneDNN pointwise operators")
@pytest.mark.parametrize("tokens", [1, 3, 257])
def test_fused_equals_plain_within_bfloat16(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 64, generator=generator)
    gate, up = torch.randn(2, 128, 64, generator=generator) / 8
    exact = _plain_gated_linear(x, gate, up)
    fused = _fused_gated_linear(x.bfloat16(), gate.bfloat16(), up.bfloat16()).float()
    plain = _plain_gated_linear(x.bfloat16(), gate.bfloat16(), up.bfloat16()).float()
    assert (fused - exact).abs().max() <= 1.5 * (plain - exact).abs().max()


def test_float32_takes_the_plain_form() -> None:
    assert gated_linear_for(torch.zeros(1)) is _plain_gated_linear
