from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from training.model import TrainableCheckpoint, mean_pool


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8, 32])
def test_mean_pool_equals_the_naive_loop(ratio: int) -> None:
    torch.manual_seed(0)
    lengths = [1, 5, 8, 11]
    states = torch.randn(4, 11, 6)
    mask = torch.tensor([[int(t < n) for t in range(11)] for n in lengths])
    pooled, pooled_mask = mean_pool(states, mask, ratio)
    for i, n in enumerate(lengths):
        groups = [states[i, s : min(s + ratio, n)].mean(0) for s in range(0, n, ratio)]
        assert pooled_mask[i].tolist() == [int(k < len(groups)) for k in range(pooled.shape[1])]
        torch.testing.assert_close(pooled[i, : len(groups)], torch.stack(groups))


def test_mean_pool_by_hand() -> None:
    states = torch.tensor([[[1.0], [3.0], [10.0], [99.0]]])
    pooled, mask = mean_pool(states, torch.tensor([[1, 1, 1, 0]]), 2)
    assert pooled[0, :, 0].tolist() == [2.0, 10.0]
    assert mask.tolist() == [[1, 1]]


def test_encode_keeps_the_order_and_does_not_depend_on_chunks(tiny: Callable[[int], TrainableCheckpoint]) -> None:
    checkpoint = tiny(0)
    rows = [[7, 8, 9, 10], [11], [12, 13], [7, 9, 11, 13, 15]]
    with torch.inference_mode():
        states, mask = checkpoint.encode(rows, chunk=2)
        whole, _ = checkpoint.encode(rows, chunk=9)
        assert mask.sum(1).tolist() == [4, 1, 2, 5]
        for i, row in enumerate(rows):
            alone, _ = checkpoint.encode([row])
            torch.testing.assert_close(states[i, : len(row)], alone[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(states[i, : len(row)], whole[i, : len(row)], rtol=1e-4, atol=1e-5)


def test_margins_equal_the_whole_model_and_ignore_batch_mates(tiny: Callable[[int], TrainableCheckpoint]) -> None:
    checkpoint = tiny(0)
    passages, prompts = [[7, 8, 9], [10, 11, 12, 13, 14]], [[4, 8, 5, 9, 5], [4, 8, 5]]
    yes, no = checkpoint.answers
    with torch.inference_mode():
        states, mask = checkpoint.encode(passages)
        margins = checkpoint.margins(prompts, states, mask)
        for i in range(2):
            logits = checkpoint.model(
                input_ids=torch.tensor([passages[i]]), decoder_input_ids=torch.tensor([prompts[i]])
            ).logits[0, -1]
            assert float(margins[i]) == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
