"""KV and prefix cache: keys and values kept between forward passes, and the contexts of a batch made of them.

    keys      per passage and ratio: keys and values of its states in every layer
    prefixes  per passage, ratio and instruction: keys and values of the prompt's prefix over that passage

A passage that several pairs of a batch share is computed once, and so is a prefix over it; batches come one after the
other, so nothing is computed twice at the same time. An entry is admitted at its second miss, and into a full cache
only if it missed more often than the entry it evicts (TinyLFU, as Moka does it). Everything that changes an entry's
value is in its key, and the caches go with the model that made them, so entries never go stale.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from moka_py import Moka
from torch import Tensor

from cache.read_cache import ByteBoundedCache
from decoder_server.config import TierBudgets
from decoder_server.models.fbnl.batch_states import StatePair
from decoder_server.models.fbnl.decoder import Decoder, KeysValues
from decoder_server.models.fbnl.layout import Layout

# Misses that make an entry worth its copy, and keys whose misses are counted: a number each.
MIN_MISSES = 2
MAX_COUNTED_KEYS = 1 << 17
# Python objects and keys of an entry, generously.
ENTRY_OVERHEAD_BYTES = 1024
# Shorter prefixes are not worth an entry.
MIN_PREFIX_TOKENS = 4
# Scale of a row of zeros: far below any number a model computes, far above what a processor rounds to zero.
SMALLEST = 1e-20

_Prefix = tuple[tuple[int, ...], bytes]  # the very tokens, and the key of the states that they read
_Name = bytes | _Prefix | int  # a number is of one pair alone
_States = Callable[[Sequence[StatePair]], Tensor]  # of pairs, packed: (sum of num_states, dim)


@dataclass(frozen=True, slots=True, eq=False)
class StoredKV:
    """Keys and values of one entry: as computed, in bfloat16, or as int8 with one scale per row and head."""

    numbers: Tensor  # (num_layers, 2, rows, num_kv, head)
    scales: Tensor | None  # of int8, float32 (num_layers, 2, rows, num_kv, 1)

    @classmethod
    def of(cls, kv: Tensor, form: str) -> StoredKV:
        """A copy of keys and values, (num_layers, 2, rows, num_kv, head); `form` auto keeps them as they are."""
        if form != "int8":
            dtype = torch.bfloat16 if form == "bfloat16" else kv.dtype
            return cls(torch.empty(kv.shape, dtype=dtype, device=kv.device).copy_(kv), None)
        # A scale per row and head: keys are normed, so a row's numbers are of one size; values of one row, nearly.
        scales = kv.abs().amax(-1, keepdim=True).float().clamp(min=SMALLEST) / 127
        return cls((kv / scales).round().to(torch.int8), scales)

    @property
    def num_bytes(self) -> int:
        return self.numbers.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def read(self, dtype: torch.dtype) -> Tensor:
        """(num_layers, 2, rows, num_kv, head); the entry itself where it is kept in that dtype."""
        return self.numbers.to(dtype) if self.scales is None else (self.numbers * self.scales).to(dtype)


class KVCache:
    """Keys and values in memory within a byte budget. Written to by one thread; counters may be read from any."""

    def __init__(self, name: str, max_bytes: int, form: str) -> None:
        """
        Args:
            max_bytes: 0 disables the cache.
            form: of entries: auto, bfloat16 or int8.
        """
        self.name = name
        self.max_bytes = max_bytes
        self.num_hits = 0
        self.num_misses = 0
        self.num_admitted = 0
        self._form = form
        self._entries: ByteBoundedCache[Hashable, StoredKV] = ByteBoundedCache(
            max_bytes, lambda kv: kv.num_bytes + ENTRY_OVERHEAD_BYTES
        )
        self._misses: Moka[int, int] = Moka(MAX_COUNTED_KEYS, policy="lru")

    @property
    def enabled(self) -> bool:
        return self.max_bytes > 0

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return self._entries.num_bytes

    @property
    def num_entries(self) -> int:
        return self._entries.num_entries

    def get(self, key: Hashable) -> StoredKV | None:
        """The entry; a hit or a miss is counted."""
        entry = self._entries.get(key)
        if entry is not None:
            self.num_hits += 1
            return entry
        self.num_misses += 1
        digest = hash(key)
        self._misses.set(digest, (self._misses.get(digest) or 0) + 1)
        return None

    def admits(self, key: Hashable) -> bool:
        """Whether a missed entry should be kept once it is computed."""
        return self.enabled and (self._misses.get(hash(key)) or 0) >= MIN_MISSES

    def put(self, key: Hashable, kv: Tensor) -> StoredKV | None:
        """Keeps a copy of keys and values (num_layers, 2, rows, num_kv, head); None where it is over the budget.

        A full cache may evict it immediately, in favour of entries that are read more often.
        """
        entry = StoredKV.of(kv, self._form)
        if not self._entries.put(key, entry):
            return None
        self.num_admitted += 1
        return entry

    def __contains__(self, key: Hashable) -> bool:
        """Whether an entry is there now; counts nothing."""
        return self._entries.get(key) is not None

    def clear(self) -> None:
        """Drops entries and counted misses."""
        self._entries.clear()
        self._misses.clear()


@dataclass(frozen=True, slots=True)
class Part:
    """Pairs of a batch that share a forward pass."""

    rows: Sequence[int]  # of the batch
    token_ids: Tensor  # of their prompts, less the cached prefixes, packed
    context: Iterable[KeysValues]
    layout: Layout


@dataclass(frozen=True, slots=True)
class _Needed:
    """Keys and values that a batch needs of one cache, by name, since pairs may share them."""

    cache: KVCache
    names: Sequence[_Name | None]  # per pair; None: nothing
    keep_all: bool = False  # else what the cache admits
    kv: dict[_Name | None, Tensor] = field(default_factory=dict)  # (num_layers, 2, rows, num_kv, head) each

    def look_up(self, dtype: torch.dtype) -> None:
        for name in self.names if self.cache.enabled else ():
            if name is None or isinstance(name, int):
                continue
            entry = self.cache.get(name)  # each pair counts, also one whose name another pair brought
            if entry is not None and name not in self.kv:
                self.kv[name] = entry.read(dtype)

    @property
    def useful(self) -> bool:
        """Whether the cache holds or admits anything of it."""
        return bool(self.kv) or any(self.admits(name) for name in self.names)

    def admits(self, name: _Name | None) -> bool:
        if name is None or isinstance(name, int) or not self.cache.enabled:
            return False
        return name not in self.cache if self.keep_all else self.cache.admits(name)

    def missing(self) -> dict[_Name, int]:
        """Names that are not there, each with the first pair that needs it."""
        first: dict[_Name, int] = {}
        for i, name in enumerate(self.names):
            if name is not None and name not in self.kv:
                first.setdefault(name, i)
        return first

    def computed(self, name: _Name, kv: Tensor) -> None:
        self.kv[name] = kv
        if self.admits(name):
            self.cache.put(name, kv)


class Contexts:
    """The caches of one decoder, and the contexts that its passes read. Used by one thread."""

    def __init__(
        self, decoder: Decoder, budgets: TierBudgets, states: _States, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.keys = KVCache("keys", budgets.max_keys_bytes, budgets.form)
        self.prefixes = KVCache("prefixes", budgets.max_prefix_bytes, budgets.form)
        self._decoder = decoder
        self._states = states
        self._device = device
        self._dtype = dtype

    @torch.inference_mode()
    def parts(self, pairs: Sequence[StatePair]) -> list[Part]:
        """The batch, ready for its passes: one for pairs with a cached prefix, one for the others."""
        every = range(len(pairs))
        passages, prefixes = self._needed(pairs)
        passages.look_up(self._dtype)
        prefixes.look_up(self._dtype)
        if not passages.useful and not prefixes.useful:
            # Caches that are disabled or cold: a layer's keys are made when the pass comes to it.
            return [self._part(pairs, every, [0] * len(pairs), self._decoder.passage_kv(self._states(pairs)))]
        self._compute_passages(pairs, passages)
        self._compute_prefixes(passages, prefixes)
        cached = [name in prefixes.kv for name in prefixes.names]
        parts = []
        for rows in ([i for i in every if cached[i]], [i for i in every if not cached[i]]):
            if rows:
                before = [prefixes.kv.get(prefixes.names[i]) for i in rows]
                lengths = [0 if prefix is None else prefix.shape[2] for prefix in before]
                own = [passages.kv[passages.names[i]] for i in rows]
                both = [kv for pair in zip(before, own, strict=True) for kv in pair if kv is not None]
                parts.append(self._part(pairs, rows, lengths, _packed(both)))
        return parts

    @torch.inference_mode()
    def fill(self, pairs: Sequence[StatePair]) -> tuple[int, int]:
        """Pre-fills the caches, whatever they would admit; per cache, how many of the pairs it holds now."""
        passages, prefixes = self._needed(pairs, keep_all=True)
        self._compute_passages(pairs, passages)
        self._compute_prefixes(passages, prefixes)
        return sum(pair.key in self.keys for pair in pairs), sum(_prefix(pair) in self.prefixes for pair in pairs)

    def _needed(self, pairs: Sequence[StatePair], *, keep_all: bool = False) -> tuple[_Needed, _Needed]:
        # A pair without a key shares with no other.
        passages = _Needed(self.keys, [pair.key or i for i, pair in enumerate(pairs)], keep_all)
        names = [_prefix(pair) if self.prefixes.enabled else None for pair in pairs]
        return passages, _Needed(self.prefixes, names, keep_all)

    def _compute_passages(self, pairs: Sequence[StatePair], passages: _Needed) -> None:
        missing = passages.missing()
        if not missing:
            return
        first = [pairs[i] for i in missing.values()]
        kv = _stacked(self._decoder.passage_kv(self._states(first)))
        for name, part in zip(missing, torch.split(kv, [pair.num_states for pair in first], dim=2), strict=True):
            passages.computed(name, part)

    def _compute_prefixes(self, passages: _Needed, prefixes: _Needed) -> None:
        missing = {name: i for name, i in prefixes.missing().items() if prefixes.admits(name)}
        if not missing:
            return
        tokens = [name[0] for name in missing if isinstance(name, tuple)]
        own = [passages.kv[passages.names[i]] for i in missing.values()]
        lengths = [len(ids) for ids in tokens]
        layout = Layout(lengths, [kv.shape[2] for kv in own], self._device)
        ids = torch.tensor(list(chain.from_iterable(tokens)), device=self._device)
        kv = _stacked(self._decoder.prompt_kv(ids, _packed(own), layout))
        for name, part in zip(missing, torch.split(kv, lengths, dim=2), strict=True):
            prefixes.computed(name, part)

    def _part(
        self, pairs: Sequence[StatePair], rows: Sequence[int], prefix_lengths: list[int], context: Iterable[KeysValues]
    ) -> Part:
        left = [pairs[i].prompt.ids[length:] for i, length in zip(rows, prefix_lengths, strict=True)]
        ids = torch.tensor(list(chain.from_iterable(left)), device=self._device)
        counts = [pairs[i].num_states for i in rows]
        layout = Layout([len(prompt) for prompt in left], counts, self._device, prefix_lengths)
        return Part(rows, ids, context, layout)


def _prefix(pair: StatePair) -> _Prefix | None:
    length = pair.prompt.prefix_length
    return (tuple(pair.prompt.ids[:length]), pair.key) if pair.key and length >= MIN_PREFIX_TOKENS else None


def _stacked(layers: Iterable[KeysValues]) -> Tensor:
    """(num_layers, 2, rows, num_kv, head)."""
    return torch.stack([torch.stack(kv) for kv in layers])


def _packed(parts: Sequence[Tensor]) -> list[KeysValues]:
    """Contexts end to end, by layer."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)
    return [(layer[0], layer[1]) for layer in whole]
