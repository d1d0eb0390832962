"""KV and prefix cache: keys and values kept between forward passes, and the contexts of a batch made of them.

An entry is admitted at its second miss, and into a full cache only if it missed more often than the entry it evicts
(TinyLFU, as Moka does it). Everything that changes its value is in its key, and the caches go with the model.
"""

from array import array
from collections import Counter, defaultdict
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
MIN_MISSES, MAX_COUNTED_KEYS = 2, 1 << 17
ENTRY_OVERHEAD_BYTES = 1024  # Python objects and keys of an entry, generously
MIN_PREFIX_TOKENS = 4  # shorter prefixes are not worth an entry
# Scale of a row of zeros: far below any number a model computes, far above what a processor rounds to zero.
SMALLEST = 1e-20

_Prefix = tuple[tuple[int, ...], bytes]  # the very tokens, and the key of the states that they read
_Name = bytes | _Prefix | int  # a number is of one pair alone


@dataclass(frozen=True, slots=True, eq=False)
class StatePair:
    """A prompt and one window of a passage at its ratio; states stay encoded until their batch is made, if they can."""

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

    @property
    def identity(self) -> bytes:
        return array("q", [len(self.prompt.ids), *self.prompt.ids]).tobytes() + self.key if self.key else b""


def batch_states(pairs: Sequence[StatePair], device: torch.device, dtype: torch.dtype) -> Tensor:
    """States of all pairs in their order, (sum of num_states, dim): each row's own decoding to float32, converted.

    Each codec decodes all its passages in one call, or where it keeps numbers (Flat, SQfp16, SQbf16), torch converts.
    """
    if not pairs:
        return torch.empty((0, 0), device=device, dtype=dtype)
    kinds: dict[str | Codec, list[int]] = defaultdict(list)  # pairs whose states become numbers in one step
    for i, pair in enumerate(pairs):
        codec = pair.states.codec if isinstance(pair.states, Codes) else None
        kinds["float32" if codec is None else codec.number_format or codec].append(i)
    filled = [_numbers(kind, [pairs[i].states for i in at], device, dtype) for kind, at in kinds.items()]
    if len(filled) == 1:
        return filled[0]
    # Rows of a kind lie together: each is sent to where its pair is.
    ends = np.cumsum([pair.num_states for pair in pairs])
    batch = torch.empty((int(ends[-1]), filled[0].shape[1]), device=device, dtype=dtype)
    for at, rows in zip(kinds.values(), filled, strict=True):
        spans = [np.arange(ends[i] - pairs[i].num_states, ends[i]) for i in at]
        batch[torch.from_numpy(np.concatenate(spans)).to(device)] = rows
    return batch


def _numbers(
    kind: str | Codec, states: Sequence[NDArray[np.float32] | Codes], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Numbers of what a codec, or a number format, wrote: one pair's after another's."""
    dim = states[0].codec.dim if isinstance(states[0], Codes) else states[0].shape[1]
    rows = [one.rows if isinstance(one, Codes) else np.ascontiguousarray(one, "f4").view("u1") for one in states]
    form = torch.float32 if isinstance(kind, Codec) else getattr(torch, kind)
    # Pinned: in memory that a GPU reads directly.
    numbers = torch.empty((sum(map(len, rows)), dim), dtype=form, pin_memory=device.type == "cuda")
    if isinstance(kind, Codec):
        kind.decode_many(rows, out=numbers.numpy())
    else:
        np.concatenate(rows, out=numbers.view(torch.uint8).numpy())
    if device.type == "cpu" and (form, dtype) == (torch.float16, torch.bfloat16):
        numbers = numbers.float()  # in one step it takes five times as long: torch has no vector code for it
    # To the device first: a GPU is sent the narrow numbers, and converts them itself.
    return numbers.to(device).to(dtype)


_Entry = tuple[Tensor, Tensor | None]  # numbers; and of int8 their scales, float32 (num_layers, 2, rows, num_kv, 1)


class KVCache:
    """Keys and values (num_layers, 2, rows, num_kv, head) within a byte budget; for one thread, counters for any."""

    def __init__(self, name: str, max_bytes: int, form: str, dtype: torch.dtype = torch.float32) -> None:
        self.name = name
        self.max_bytes = max_bytes  # 0 disables the cache
        self.num_hits = self.num_misses = self.num_admitted = 0
        self._form = form  # of entries: auto, as computed; bfloat16; or int8 with one scale per row and head
        self._dtype = dtype  # in which entries are read
        self.entries: ByteBoundedCache[Hashable, _Entry] = ByteBoundedCache(
            max_bytes, lambda kv: ENTRY_OVERHEAD_BYTES + sum(part.nbytes for part in kv if part is not None)
        )
        self._misses: Moka[int, int] = Moka(MAX_COUNTED_KEYS, policy="lru")

    @property
    def num_bytes(self) -> int:
        return self.entries.num_bytes

    def get(self, key: Hashable) -> _Entry | None:
        """An entry, for `read`; a hit or a miss is counted."""
        if (entry := self.entries.get(key)) is not None:
            self.num_hits += 1
            return entry
        self.num_misses += 1
        digest = hash(key)
        self._misses.set(digest, (self._misses.get(digest) or 0) + 1)
        return None

    def read(self, entry: _Entry) -> Tensor:
        """Its keys and values: the very ones where they are kept in the dtype that they are read in."""
        numbers, scales = entry
        return (numbers if scales is None else numbers * scales).to(self._dtype)

    def admits(self, key: Hashable) -> bool:
        """Whether a missed entry should be kept once it is computed."""
        return self.max_bytes > 0 and (self._misses.get(hash(key)) or 0) >= MIN_MISSES

    def put(self, key: Hashable, kv: Tensor) -> _Entry | None:
        """Keeps a copy of keys and values, and returns it; None where it is over the budget. May evict it at once."""
        scales = None
        if self._form == "int8":
            # A scale per row and head: keys are normed, so a row's numbers are of one size; values of one row, nearly.
            scales = kv.abs().amax(-1, keepdim=True).float().clamp(min=SMALLEST) / 127
            numbers = (kv / scales).round().to(torch.int8)
        else:
            dtype = torch.bfloat16 if self._form == "bfloat16" else kv.dtype
            numbers = torch.empty(kv.shape, dtype=dtype, device=kv.device).copy_(kv)
        if not self.entries.put(key, (numbers, scales)):
            return None
        self.num_admitted += 1
        return numbers, scales

    def __contains__(self, key: Hashable) -> bool:  # counts nothing
        return self.entries.get(key) is not None


@dataclass(frozen=True, slots=True)
class _Needed:
    """Keys and values that a batch needs of one cache, by name, since pairs may share them."""

    cache: KVCache
    names: Sequence[_Name | None]  # per pair; None: nothing
    shared: set[_Name | None]  # of the names: needed under several prompts
    keep_all: bool = False  # else what the cache admits
    kv: dict[_Name | None, Tensor] = field(default_factory=dict)

    def admits(self, name: _Name | None) -> bool:
        if not self.cache.max_bytes or not isinstance(name, bytes | tuple):
            return False
        return name not in self.cache if self.keep_all else self.cache.admits(name)

    def is_worth(self, name: _Name | None) -> bool:
        """Whether to compute it before the pass: for several prompts, or to keep it."""
        return name in self.shared or self.admits(name)

    def missing(self) -> dict[_Name, int]:
        """Names that are not there, each with a pair that needs it."""
        return {name: i for i, name in enumerate(self.names) if name is not None and name not in self.kv}

    def computed(self, names: Iterable[_Name], kv: Tensor, lengths: list[int]) -> None:
        """Takes what was computed, end to end, and keeps what is worth it."""
        for name, part in zip(names, torch.split(kv, lengths, dim=2), strict=True):
            self.kv[name] = part
            if self.admits(name):
                self.cache.put(name, part)


_Pass = tuple[Tensor, Iterable[KeysValues], Layout]  # prompts' tokens less cached prefixes, packed; context; layout


class Contexts:
    """The caches of one decoder, and the contexts that its passes read. Used by one thread."""

    def __init__(self, decoder: Decoder, budgets: KvCacheConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.keys = KVCache("keys", budgets.max_keys_bytes, budgets.form, dtype)
        self.prefixes = KVCache("prefixes", budgets.max_prefix_bytes, budgets.form, dtype)
        self._decoder = decoder
        self._device = device
        self._dtype = dtype

    @torch.inference_mode()
    def passes(self, pairs: Sequence[StatePair]) -> list[tuple[list[int], _Pass]]:
        """Rows of the batch that share a forward pass, and its input: those with a cached prefix, and the others."""
        every = list(range(len(pairs)))
        passages, prefixes = both = self._needed(pairs)
        for needed in both:
            for name in needed.names if needed.cache.max_bytes else ():
                # Each pair counts, also one whose name another pair brought.
                if isinstance(name, bytes | tuple) and (entry := needed.cache.get(name)) and name not in needed.kv:
                    needed.kv[name] = needed.cache.read(entry)
        if not any(needed.kv or any(map(needed.is_worth, needed.names)) for needed in both):
            # Nothing is shared, and caches are disabled or cold: a layer's keys are made when the pass comes to it.
            layers = self._decoder.passage_kv(batch_states(pairs, self._device, self._dtype))
            return [(every, self._pass(pairs, [0] * len(pairs), layers))]
        self._compute(pairs, passages, prefixes)
        passes = []
        for cached in (True, False):
            if rows := [i for i in every if (prefixes.names[i] in prefixes.kv) is cached]:
                before = [prefixes.kv.get(prefixes.names[i]) for i in rows]
                own = [passages.kv[passages.names[i]] for i in rows]
                context = [kv for pair in zip(before, own, strict=True) for kv in pair if kv is not None]
                lengths = [0 if prefix is None else prefix.shape[2] for prefix in before]
                passes.append((rows, self._pass([pairs[i] for i in rows], lengths, _packed(context))))
        return passes

    @torch.inference_mode()
    def fill(self, pairs: Sequence[StatePair]) -> tuple[int, int]:
        """Pre-fills the caches, whatever they would admit; per cache, how many of the pairs it holds now."""
        self._compute(pairs, *self._needed(pairs, keep_all=True))
        return sum(pair.key in self.keys for pair in pairs), sum(_prefix(pair) in self.prefixes for pair in pairs)

    def _needed(self, pairs: Sequence[StatePair], *, keep_all: bool = False) -> tuple[_Needed, _Needed]:
        # A pair without a key shares with no other.
        keys: list[_Name | None] = [pair.key or i for i, pair in enumerate(pairs)]
        shared = _shared(keys, pairs)
        with_prefix = self.prefixes.max_bytes > 0
        names = [_prefix(pair) if with_prefix or pair.key in shared else None for pair in pairs]
        of_passages = _Needed(self.keys, keys, shared, keep_all)
        return of_passages, _Needed(self.prefixes, names, _shared(names, pairs), keep_all)

    def _compute(self, pairs: Sequence[StatePair], passages: _Needed, prefixes: _Needed) -> None:
        """Every passage that is missing, then, over passages, the prefixes that are worth it."""
        if missing := passages.missing():
            first = [pairs[i] for i in missing.values()]
            kv = _stacked(self._decoder.passage_kv(batch_states(first, self._device, self._dtype)))
            passages.computed(missing, kv, [pair.num_states for pair in first])
        if missing := {name: i for name, i in prefixes.missing().items() if prefixes.is_worth(name)}:
            tokens = [name[0] for name in missing if isinstance(name, tuple)]
            own = [passages.kv[passages.names[i]] for i in missing.values()]
            lengths = [len(ids) for ids in tokens]
            layout = Layout(lengths, [kv.shape[2] for kv in own], self._device)
            kv = _stacked(self._decoder.prompt_kv(self._ids(tokens), _packed(own), layout))
            prefixes.computed(missing, kv, lengths)

    def _pass(self, pairs: Sequence[StatePair], prefix_lengths: list[int], context: Iterable[KeysValues]) -> _Pass:
        left = [pair.prompt.ids[length:] for pair, length in zip(pairs, prefix_lengths, strict=True)]
        counts = [pair.num_states for pair in pairs]
        return self._ids(left), context, Layout([len(ids) for ids in left], counts, self._device, prefix_lengths)

    def _ids(self, prompts: Iterable[Sequence[int]]) -> Tensor:
        return torch.tensor(list(chain.from_iterable(prompts)), device=self._device)


def _shared(names: Sequence[_Name | None], pairs: Sequence[StatePair]) -> set[_Name | None]:
    """The names that pairs of several prompts have: equal passages under one prompt stay ties to the last bit."""
    prompts = Counter(name for name, _ in {(name, id(pair.prompt)) for name, pair in zip(names, pairs, strict=True)})
    return {name for name, num in prompts.items() if name is not None and num > 1}


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
