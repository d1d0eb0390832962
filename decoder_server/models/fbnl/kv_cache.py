"""KV and prefix cache: keys and values kept between forward passes, and the contexts of a batch made of them.

    keys      per passage and ratio: keys and values of its states in every layer
    prefixes  per passage, ratio and instruction: keys and values of the prompt's prefix over that passage

A passage that several pairs of a batch share is computed once, and so is a prefix over it; batches come one after the
other, so nothing is computed twice at the same time. An entry is admitted at its second miss, and into a full cache
only if it missed more often than the entry it evicts (TinyLFU, as Moka does it). Everything that changes an entry's
value is in its key, and the caches go with the model that made them, so entries never go stale.

States that are needed for it are decoded for the whole batch: where a codec keeps numbers (Flat, SQfp16, SQbf16), one
copy of bytes and one conversion by torch, or none; other codecs decode all passages of the batch in one call.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from moka_py import Moka
from numpy.typing import NDArray
from torch import Tensor

from cache.codecs import Codec
from cache.read_cache import ByteBoundedCache
from cache.states import Codes
from checkpoint import TokenizedPrompt
from decoder_server.config import KvCacheConfig
from decoder_server.models.fbnl.decoder import Decoder, KeysValues, Layout

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

_NUMBER_FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class StatePair:
    """A prompt and one window of a passage, at the ratio it is scored at.

    States that need no pooling stay encoded until their batch is assembled.
    """

    prompt: TokenizedPrompt
    states: NDArray[np.float32] | Codes  # (num_states, dim)
    truncated: bool = False
    key: bytes = b""  # names the states; empty: nothing computed of them is kept

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.ids)

    @property
    def num_states(self) -> int:
        return len(self.states)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.ids) + len(self.states)


@dataclass
class _Kind:
    """Pairs whose states become numbers in one step."""

    dim: int
    dtype: torch.dtype  # the numbers' format before the model's
    codec: Codec | None  # decodes them; None: they are numbers
    parts: list[NDArray[np.uint8]] = field(default_factory=list)  # bytes, a row per state
    places: list[int] = field(default_factory=list)  # in the batch


def batch_states(pairs: Sequence[StatePair], device: torch.device, dtype: torch.dtype) -> Tensor:
    """States of all pairs in their order, (sum of num_states, dim) of `dtype` on `device`.

    Passages of several codecs, and numbers next to codes, may share a batch. Every row equals its own decoding to
    float32, converted.
    """
    kinds = _kinds(pairs)
    if not kinds:
        return torch.empty((0, 0), device=device, dtype=dtype)
    filled = [_converted(_numbers(kind, device.type == "cuda"), device, dtype) for kind in kinds]
    if len(filled) == 1:
        return filled[0]
    # Rows of a kind lie together: each is sent to where its pair is.
    ends = np.cumsum([pair.num_states for pair in pairs])
    batch = torch.empty((int(ends[-1]), kinds[0].dim), device=device, dtype=dtype)
    for kind, rows in zip(kinds, filled, strict=True):
        spans = [np.arange(ends[i] - pairs[i].num_states, ends[i]) for i in kind.places]
        batch[torch.from_numpy(np.concatenate(spans)).to(device)] = rows
    return batch


def _kinds(pairs: Sequence[StatePair]) -> list[_Kind]:
    kinds: dict[str | Codec, _Kind] = {}
    for i, pair in enumerate(pairs):
        states = pair.states
        if isinstance(states, Codes):
            number_format, rows = states.codec.number_format, states.rows
            codec = None if number_format else states.codec
            name: str | Codec = number_format or states.codec
            kind = kinds.get(name) or _Kind(states.codec.dim, _NUMBER_FORMATS.get(number_format, torch.float32), codec)
        else:
            name, rows = "float32", np.ascontiguousarray(states, dtype=np.float32).view(np.uint8)
            kind = kinds.get(name) or _Kind(states.shape[1], torch.float32, None)
        kind.parts.append(rows)
        kind.places.append(i)
        kinds[name] = kind
    return list(kinds.values())


def _converted(numbers: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type == "cpu" and (numbers.dtype, dtype) == (torch.float16, torch.bfloat16):
        numbers = numbers.float()  # in one step it takes five times as long: torch has no vector code for it
    # To the device first: a GPU is sent the narrow numbers, and converts them itself.
    return numbers.to(device).to(dtype)


def _numbers(kind: _Kind, pinned: bool) -> Tensor:
    """The kind's states in its own format, one pair after another; `pinned`: in memory that a GPU reads directly."""
    num_states = sum(map(len, kind.parts))
    numbers = torch.empty((num_states, kind.dim), dtype=kind.dtype, pin_memory=pinned)
    if kind.codec is not None:
        kind.codec.decode_many(kind.parts, out=numbers.numpy())
    else:
        np.concatenate(kind.parts, out=numbers.view(torch.uint8).numpy())
    return numbers


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
class _PassInput:
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

    def __init__(self, decoder: Decoder, budgets: KvCacheConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.keys = KVCache("keys", budgets.max_keys_bytes, budgets.form)
        self.prefixes = KVCache("prefixes", budgets.max_prefix_bytes, budgets.form)
        self._decoder = decoder
        self._device = device
        self._dtype = dtype

    @torch.inference_mode()
    def parts(self, pairs: Sequence[StatePair]) -> list[_PassInput]:
        """The batch, ready for its passes: one for pairs with a cached prefix, one for the others."""
        every = range(len(pairs))
        passages, prefixes = self._needed(pairs)
        passages.look_up(self._dtype)
        prefixes.look_up(self._dtype)
        if not passages.useful and not prefixes.useful:
            # Caches that are disabled or cold: a layer's keys are made when the pass comes to it.
            return [
                self._part(
                    pairs,
                    every,
                    [0] * len(pairs),
                    self._decoder.passage_kv(batch_states(pairs, self._device, self._dtype)),
                )
            ]
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
        kv = _stacked(self._decoder.passage_kv(batch_states(first, self._device, self._dtype)))
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
    ) -> _PassInput:
        left = [pairs[i].prompt.ids[length:] for i, length in zip(rows, prefix_lengths, strict=True)]
        ids = torch.tensor(list(chain.from_iterable(left)), device=self._device)
        counts = [pairs[i].num_states for i in rows]
        layout = Layout([len(prompt) for prompt in left], counts, self._device, prefix_lengths)
        return _PassInput(rows, ids, context, layout)


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
