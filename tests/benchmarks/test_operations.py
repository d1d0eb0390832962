"""Operations counted from the shapes are the products that run: torch counts them while each variant scores."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.variants import VARIANTS, Candidates, Models
from checkpoint.synthetic import make_checkpoint

COUNT = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(make_checkpoint(tmp_path_factory.mktemp("operations")), "float32")


def linear(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Of oneDNN's products, which torch's counter does not know; a packed weight hides its shape."""
    return 2 * prod(x) * out_shape[-1]


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.mkldnn._linear_pointwise: linear,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("passage_tokens", "ratio"), [(40, 4), (301, 32)])
def test_counted_operations_are_the_ones_executed(
    models: Models, variant: str, passage_tokens: int, ratio: int
) -> None:
    candidates = Candidates(models, passage_tokens, ratio)
    VARIANTS[variant].prepare(candidates, COUNT)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad():
        VARIANTS[variant].score(candidates, COUNT)
    assert counter.get_total_flops() == COUNT * models.operations(variant, passage_tokens, ratio)
