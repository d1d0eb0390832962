"""Costs told from a shape alone are those of the passes that preread makes, as torch counts them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import Checkpoint
from checkpoint.cost import decoder_flops, encoder_flops, kv_bytes, num_parameters
from decoder_server.config import NO_KV_CACHES
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair
from encoder_worker.encoder import Encoder

NUM_STATES = 50


@pytest.fixture(scope="module")
def opened(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint)


def linear(*shapes: object, **_: object) -> int:
    """oneDNN's product (rows, in) by (out, in), which torch does not count; a second input stands between."""
    first, *_, weight = (one for one in shapes if isinstance(one, torch.Size) and len(one) == 2)
    return 2 * first[0] * first[1] * weight[0]


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: linear}) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("num_tokens", "rel"), [(8, 0.02), (256, 0.2)])
def test_encoding(opened: Checkpoint, num_tokens: int, rel: float) -> None:
    """Sliding layers take blocks of 128 queries, which see more than their windows, of 8 tokens here."""
    encoder = Encoder(opened, device="cpu", dtype="float32")
    real = counted(lambda: encoder.encode([[5] * num_tokens], 4))
    assert encoder_flops(opened.encoder_config, num_tokens) == pytest.approx(real, rel=rel)


def test_scoring_with_and_without_the_passages_keys_and_values(opened: Checkpoint) -> None:
    backend = FbnlBackend(opened, device="cpu", dtype="float32", budgets=NO_KV_CACHES)
    states = np.full((NUM_STATES, opened.dim), 0.5, dtype=np.float32)
    pair = StatePair(backend.prompt("Why is the sky blue?"), states)
    kept: list[torch.Tensor] = []
    of_passage = counted(lambda: kept.extend(chain(*backend._decoder.passage_kv(torch.from_numpy(states)))))
    whole, num_tokens = counted(lambda: backend.score([pair])), len(pair.prompt.ids)
    config = opened.decoder_config
    assert decoder_flops(config, NUM_STATES, num_tokens) == pytest.approx(whole, rel=0.02)
    assert decoder_flops(config, NUM_STATES, num_tokens, cached=True) == pytest.approx(whole - of_passage, rel=0.02)
    assert kv_bytes(config, NUM_STATES, 4) == sum(one.nbytes for one in kept)


def test_parameters_are_those_that_are_loaded(opened: Checkpoint) -> None:
    loaded = opened.encoder_tensors(torch.float32)
    assert num_parameters("encoder", opened.encoder_config) == sum(one.numel() for one in loaded.values())
