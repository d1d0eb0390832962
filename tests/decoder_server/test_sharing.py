"""Pairs of one passage under several prompts: a batch keeps them together, and a pass computes what they share once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from decoder_server.config import KvCacheConfig
from decoder_server.engine.scheduler import split_by_length
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair

PLENTY = KvCacheConfig(max_keys_bytes=1 << 26, max_prefix_bytes=1 << 26)


@pytest.mark.parametrize("budgets", [KvCacheConfig(max_keys_bytes=0, max_prefix_bytes=0), PLENTY])
def test_a_pass_computes_a_passage_and_the_prefix_over_it_once(fbnl, encoding, texts, budgets: KvCacheConfig) -> None:
    """By operations: each query adds to a pass what it would on a hot cache, the tokens after the prefix."""
    prompts = [fbnl.prompt(f"query {i}") for i in range(10, 42)]
    assert len({prompt.num_tokens for prompt in prompts}) == 1
    states = encoding.encode(texts["p5"], 4).states

    def operations(backend: FbnlBackend, num: int) -> int:
        pairs = [StatePair(prompt, states, False, b"p5") for prompt in prompts[:num]]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backend.score(pairs)
        return counter.get_total_flops()

    hot = fbnl.with_caches(PLENTY)
    hot.fill([StatePair(prompts[0], states, False, b"p5")])
    each = operations(hot, 2) - operations(hot, 1)
    counts = [operations(fbnl.with_caches(budgets), num) for num in (2, 3, 32)]
    assert counts[1] - counts[0] == each
    assert counts[2] - counts[0] == 30 * each
    if not budgets.max_keys_bytes:
        assert counts[2] < 32 * operations(fbnl, 1) / 2


def test_one_query_alone_shares_nothing(fbnl) -> None:
    """Equal passages under one prompt stay ties to the last bit."""
    prompt = fbnl.prompt("what is read once?")
    states = np.random.default_rng(0).standard_normal((9, 64), dtype=np.float32)
    pairs = [StatePair(prompt, states, False, key) for key in (b"a", b"a", b"b")]
    assert len(set(fbnl.score(pairs).tolist())) == 1


def test_pairs_of_a_passage_stay_together_in_batches_by_length(fbnl) -> None:
    """Eight prompts of about one length and one of five times that, over passages of equal length."""
    prompts = [fbnl.prompt("no " * n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 400)]
    rng = np.random.default_rng(0)
    passages = {bytes([i]): rng.standard_normal((20, 64), dtype=np.float32) for i in range(1, 7)}
    pairs = [StatePair(prompt, states, False, key) for prompt in prompts for key, states in passages.items()]
    batches = split_by_length(pairs, 2000)
    assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
    long = {i for i, pair in enumerate(pairs) if pair.num_prompt_tokens == prompts[-1].num_tokens}
    assert all(long.isdisjoint(batch) or long.issuperset(batch) for batch in batches)
    short = Counter(key for batch in batches for key in {pairs[i].key for i in batch if i not in long})
    assert set(short.values()) == {1}
    assert max(sum(pairs[i].num_tokens for i in batch) for batch in batches) <= 2000
    alone = pairs[:6]  # one prompt: nothing is shared, and lengths alone decide
    assert split_by_length(alone) == [list(range(6))]
