"""Tiers change what a pass costs and never what it says: margins stay those of a pass that keeps nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cache.collection import Collection, StoredPassage
from cache.manifest import Manifest
from cache.open import open_store
from cache.states import PassageStates, text_digest
from checkpoint import Checkpoint
from decoder_server.config import KvCacheConfig
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import MIN_MISSES, KVCache, StatePair

MIB = 1 << 20
QUERIES = ("What is the capital of China?", "gravity", "A passage is read once, and the states are kept")
INSTRUCTIONS = (None, "Find what explains the query.", "Find what contradicts the query.")
# The largest difference of margins from a pass that keeps nothing; random weights' margins spread over some units.
TOLERANCE = {"auto": 1e-5, "bfloat16": 0.03, "int8": 0.15}
PLENTY = 4 * MIB


def kv(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 2, rows, 2, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(tiny)


def made(checkpoint: Checkpoint, budgets: KvCacheConfig) -> FbnlBackend:
    return FbnlBackend(checkpoint, device="cpu", dtype="float32", budgets=budgets)


def batches(backend: FbnlBackend, num: int, seed: int = 0) -> Iterator[list[StatePair]]:
    """Pairs of a few passages and prompts, some asked for far more often than others, some without a key."""
    rng = np.random.default_rng(seed)
    passages = [rng.standard_normal((n, backend.checkpoint.dim)).astype(np.float32) for n in rng.integers(1, 30, 12)]
    prompts = [backend.prompt(query, instruction) for query in QUERIES for instruction in INSTRUCTIONS]
    for _ in range(num):
        chosen = np.minimum(rng.geometric(0.25, size=int(rng.integers(1, 9))) - 1, len(passages) - 1)
        yield [
            StatePair(prompts[rng.integers(len(prompts))], passages[i], False, bytes([i]) if i != 3 else b"")
            for i in chosen
        ]


@pytest.mark.parametrize("form", ["auto", "bfloat16", "int8"])
def test_what_is_kept_comes_back_within_its_format(form: str) -> None:
    numbers = kv(7)
    numbers[0, 0, 3] = 0  # a row of zeros has no largest number
    cache = KVCache("keys", MIB, form)
    entry = cache.put("a", numbers)
    assert entry is not None
    read = cache.read(entry)
    largest = numbers.abs().amax(-1, keepdim=True)
    bound = {"auto": 0.0, "bfloat16": 2**-8 * numbers.abs(), "int8": largest / 127 / 2 + 1e-6}[form]
    assert ((read - numbers).abs() <= bound).all()


def test_int8_and_bfloat16_take_the_bytes_they_say() -> None:
    numbers, num_bytes = kv(32), {}
    for form in ("auto", "bfloat16", "int8"):
        cache = KVCache("keys", MIB, form)
        cache.put("a", numbers)
        num_bytes[form] = cache.num_bytes - 1024  # of an entry besides its tensors
    assert num_bytes["auto"] == numbers.nbytes
    assert num_bytes["bfloat16"] == numbers.nbytes // 2
    assert num_bytes["int8"] == numbers.nbytes // 4 + numbers.nbytes // 16  # and a scale per 16


def test_an_entry_is_wanted_from_its_second_asking_on() -> None:
    tier = KVCache("keys", MIB, "auto")
    for asking in range(1, 4):
        assert tier.get("a") is None
        assert tier.admits("a") is (asking >= MIN_MISSES)
    assert not tier.admits("b")
    tier.put("a", kv(3))
    assert tier.get("a") is not None
    assert (tier.num_hits, tier.num_misses, tier.num_admitted) == (1, 3, 1)


def test_a_tier_stays_within_its_bytes_and_keeps_what_is_asked_for_often() -> None:
    tier = KVCache("keys", 300_000, "auto")
    for i in range(25):  # frequencies are counted from a tier half full on
        tier.put(i, kv(10))
    assert tier.num_bytes > 150_000
    for i in range(100, 300):
        assert tier.get(i % 4) is not None  # one of the four that are asked for all the time
        tier.get(i)
        tier.put(i, kv(10))
        assert tier.num_bytes <= 300_000
    assert not all(i in tier for i in range(100, 300))
    assert tier.put("too large", kv(2000)) is None


def test_a_tier_has_hardly_more_than_its_bytes_in_memory() -> None:
    """What counts is what is alive, whether or not anybody asks for the number of bytes."""
    tier = KVCache("keys", 20 * (kv(7).nbytes + 1024), "auto")
    kept = []
    for i in range(100):
        entry = tier.put(i, kv(7))
        assert entry is not None
        kept.append(weakref.ref(entry[0]))
        del entry
        assert sum(numbers() is not None for numbers in kept) <= 20 + 5  # and what is just leaving


def test_a_tier_without_a_budget_wants_nothing() -> None:
    tier = KVCache("keys", 0, "auto")
    for _ in range(3):
        tier.get("a")
    assert not tier.admits("a")


@pytest.mark.parametrize(
    "budgets",
    [
        KvCacheConfig(PLENTY, PLENTY),
        KvCacheConfig(PLENTY, 0),
        KvCacheConfig(0, PLENTY),
        KvCacheConfig(40_000, 150_000),  # of a handful of entries: they come and go all the time
        KvCacheConfig(PLENTY, PLENTY, "bfloat16"),
        KvCacheConfig(PLENTY, PLENTY, "int8"),
    ],
    ids=["both", "keys", "prefixes", "hardly any room", "bfloat16", "int8"],
)
def test_margins_are_those_of_a_pass_that_keeps_nothing(
    checkpoint: Checkpoint, fbnl: FbnlBackend, budgets: KvCacheConfig
) -> None:
    backend = made(checkpoint, budgets)
    for batch in batches(backend, 60):
        np.testing.assert_allclose(backend.score(batch), fbnl.score(batch), atol=TOLERANCE[budgets.form], rtol=0)
    keys, prefixes = backend.caches
    assert bool(keys.num_hits) is bool(keys.max_bytes)
    assert bool(prefixes.num_hits) is bool(prefixes.max_bytes)
    assert keys.num_bytes <= budgets.max_keys_bytes
    assert prefixes.num_bytes <= budgets.max_prefix_bytes


def test_filling_makes_the_next_pass_a_hit(checkpoint: Checkpoint, fbnl: FbnlBackend) -> None:
    backend = made(checkpoint, KvCacheConfig(PLENTY, PLENTY))
    rng = np.random.default_rng(2)
    passages = [rng.standard_normal((n, checkpoint.dim)).astype(np.float32) for n in (1, 7, 12)]
    warmed = [StatePair(backend.prompt("any"), states, False, bytes([i])) for i, states in enumerate(passages)]
    assert backend.fill(warmed) == (3, 3)
    assert [tier.num_misses for tier in backend.caches] == [0, 0]  # no access yet
    asked = [StatePair(backend.prompt("never asked before"), pair.states, False, pair.key) for pair in warmed]
    np.testing.assert_allclose(backend.score(asked), fbnl.score(asked), atol=1e-5, rtol=0)
    assert [(tier.num_hits, tier.num_misses) for tier in backend.caches] == [(3, 0)] * 2


def test_a_beginning_serves_its_own_tokens_only(checkpoint: Checkpoint, fbnl: FbnlBackend) -> None:
    """A query of the same instruction hits; another instruction, passage or ratio does not."""
    backend = made(checkpoint, KvCacheConfig(PLENTY, PLENTY))
    rng = np.random.default_rng(1)
    states = rng.standard_normal((9, checkpoint.dim)).astype(np.float32)
    _, prefixes = backend.caches

    def hits(pair: StatePair) -> bool:
        before = prefixes.num_hits
        np.testing.assert_allclose(backend.score([pair]), fbnl.score([pair]), atol=1e-5, rtol=0)
        return prefixes.num_hits > before

    backend.fill([StatePair(backend.prompt(QUERIES[0], INSTRUCTIONS[1]), states, False, b"p")])
    assert hits(StatePair(backend.prompt(QUERIES[1], INSTRUCTIONS[1]), states, False, b"p"))
    assert not hits(StatePair(backend.prompt(QUERIES[1], INSTRUCTIONS[2]), states, False, b"p"))
    assert not hits(StatePair(backend.prompt(QUERIES[1], INSTRUCTIONS[1]), states[:4], False, b"p at another ratio"))


def test_a_passage_that_requests_share_is_computed_once(checkpoint: Checkpoint) -> None:
    """Two queries of one batch over one passage: its states are read once, and its beginning is computed once."""
    backend = made(checkpoint, KvCacheConfig(PLENTY, PLENTY))
    states: NDArray[np.float32] = np.ones((5, checkpoint.dim), dtype=np.float32)
    backend.score([StatePair(backend.prompt(query), states, False, b"p") for query in QUERIES])
    keys, prefixes = backend.caches
    assert (keys.num_admitted, keys.entries.num_entries) == (1, 1)
    assert (prefixes.num_admitted, prefixes.entries.num_entries) == (1, 1)


def test_equal_texts_under_two_ids_are_computed_once(checkpoint: Checkpoint) -> None:
    """What is stored of a text has one key under any id, and in any collection of one identity."""
    backend = made(checkpoint, KvCacheConfig(PLENTY, PLENTY))
    store = open_store("memory:equal-texts")
    identity = "1" * 32
    shard, other = (
        Collection.create(store, Manifest.of(checkpoint.identity, collection=name, compression_ratio=4, identity=one))
        for name, one in (("shard", identity), ("other", "2" * 32))
    )
    merged = Manifest.of(checkpoint.identity, collection="merged", compression_ratio=4, identity=identity)
    states = np.random.default_rng(2).standard_normal((3, checkpoint.dim)).astype(np.float32)
    passage = PassageStates(states, (12,), 4, False, text_digest("one text"))
    for collection in (shard, Collection.create(store, merged), other):
        collection.put_many([StoredPassage("a", passage, "one text"), StoredPassage("b", passage, "one text")])
    num_entries = []
    for name, passage_id in (("shard", "a"), ("shard", "b"), ("merged", "a"), ("other", "a")):
        (found,) = Collection.open(store, name).get_many([passage_id])
        assert isinstance(found, PassageStates)
        backend.fill(backend.pairs(backend.prompt(QUERIES[0]), [found])[0])
        num_entries.append([tier.entries.num_entries for tier in backend.caches])
    assert num_entries == [[1, 1]] * 3 + [[2, 2]]
    store.close()


def test_models_share_nothing(checkpoint: Checkpoint) -> None:
    """Entries belong to the weights and templates that computed them: another loaded model begins with none."""
    budgets = KvCacheConfig(PLENTY, PLENTY)
    one, other = made(checkpoint, budgets), made(checkpoint, budgets)
    pair = next(batches(one, 1))[:1]
    one.fill(pair)
    assert [tier.entries.num_entries for tier in one.caches] == [1, 1]
    assert [tier.entries.num_entries for tier in other.caches] == [0, 0]


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"max_keys_bytes": -1}, "max_keys_bytes is -1; expected at least 0"),
        ({"max_prefix_bytes": -5}, "max_prefix_bytes is -5; expected at least 0"),
        ({"form": "fp4"}, "form is 'fp4'; expected auto, bfloat16, int8"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(budgets: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KvCacheConfig(**budgets)  # type: ignore[arg-type]  # that is the point
