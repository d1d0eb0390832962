"""What the pairs of a batch need of one kind, by name, since pairs may share it. Does not know how it is computed.

What a pass needs of its pairs: keys and values of passages and of prompt beginnings, kept ones or computed.

A passage that several pairs of a batch share is computed once, and so is a beginning of a prompt over it; batches come
one after the other, so nothing is ever computed twice at the same time. What the tiers want is kept on the way. Does
not know where states come from, nor queues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from decoder_server.models.fbnl.batch_states import StatePair
from decoder_server.models.fbnl.decoder import Decoder, KeysValues
from decoder_server.models.fbnl.kv_cache import Tier, Tiers
from decoder_server.models.fbnl.layout import Layout

Beginning = tuple[tuple[int, ...], bytes]  # the very tokens, and the key of the states that they read
Name = bytes | Beginning | int  # a number names what is its pair's alone


@dataclass(frozen=True, slots=True)
class Needed:
    """Of one batch and one tier. Keys and values are (num_layers, 2, rows, num_kv, head)."""

    tier: Tier
    names: Sequence[Name | None]  # per pair; None: it needs nothing of this kind
    keep_all: bool = False  # else what the tier wants
    there: dict[Name | None, Tensor] = field(default_factory=dict)

    def look_up(self, dtype: torch.dtype) -> None:
        """Takes what the tier holds."""
        for name in self.names if self.tier.on else ():
            if name is None or isinstance(name, int):
                continue
            kept = self.tier.get(name)  # each pair asks, also for what another brought
            if kept is not None and name not in self.there:
                self.there[name] = kept.read(dtype)

    @property
    def of_use(self) -> bool:
        """Whether the tier gave anything, or wants anything."""
        return bool(self.there) or any(self.wanted(name) for name in self.names)

    def wanted(self, name: Name | None) -> bool:
        """Whether it is to be kept once it is computed."""
        if name is None or isinstance(name, int) or not self.tier.on:
            return False
        return not self.tier.holds(name) if self.keep_all else self.tier.wants(name)

    def missing(self) -> dict[Name, int]:
        """Names of what is not there, each with the first pair that needs it."""
        first: dict[Name, int] = {}
        for i, name in enumerate(self.names):
            if name is not None and name not in self.there:
                first.setdefault(name, i)
        return first

    def computed(self, name: Name, kv: Tensor) -> None:
        """It is there now; the tier keeps a copy of what it wants."""
        self.there[name] = kv
        if self.wanted(name):
            self.tier.put(name, kv)


# Shorter beginnings are not worth an entry.
MIN_PREFIX_TOKENS = 4

States = Callable[[Sequence[StatePair]], Tensor]  # of pairs, packed: (sum of num_states, dim)


@dataclass(frozen=True, slots=True)
class Part:
    """Pairs of a batch that share a pass."""

    rows: Sequence[int]  # of the batch
    token_ids: Tensor  # what is left to compute of their prompts, packed
    context: Iterable[KeysValues]
    layout: Layout


class Contexts:
    """Of one decoder and its tiers. Used by one thread."""

    def __init__(
        self, decoder: Decoder, tiers: Tiers, states: States, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._decoder = decoder
        self._tiers = tiers
        self._states = states
        self._device = device
        self._dtype = dtype

    @torch.inference_mode()
    def parts(self, pairs: Sequence[StatePair]) -> list[Part]:
        """The batch, ready for its passes: one for pairs on a beginning that is there, one for the others."""
        everyone = range(len(pairs))
        passages, beginnings = self._needed(pairs)
        passages.look_up(self._dtype)
        beginnings.look_up(self._dtype)
        if not passages.of_use and not beginnings.of_use:
            # Tiers that are off or cold: a layer's keys are made when the pass asks for them.
            return [self._part(pairs, everyone, [0] * len(pairs), self._decoder.passage_kv(self._states(pairs)))]
        self._compute_passages(pairs, passages)
        self._compute_beginnings(passages, beginnings)
        on_beginning = [name in beginnings.there for name in beginnings.names]
        parts = []
        for rows in ([i for i in everyone if on_beginning[i]], [i for i in everyone if not on_beginning[i]]):
            if rows:
                kept = [beginnings.there.get(beginnings.names[i]) for i in rows]
                lengths = [0 if prefix is None else prefix.shape[2] for prefix in kept]
                own = [passages.there[passages.names[i]] for i in rows]
                both = [kv for pair in zip(kept, own, strict=True) for kv in pair if kv is not None]
                parts.append(self._part(pairs, rows, lengths, _packed(both)))
        return parts

    @torch.inference_mode()
    def fill(self, pairs: Sequence[StatePair]) -> None:
        """Keeps what passes over these pairs would need, however rarely it was asked for."""
        passages, beginnings = self._needed(pairs, keep_all=True)
        self._compute_passages(pairs, passages)
        self._compute_beginnings(passages, beginnings)

    def holds(self, pair: StatePair) -> tuple[bool, bool]:
        """Whether the tiers hold the passage's keys, and the beginning of the prompt over it."""
        keys, prefixes = self._tiers.all()
        return keys.holds(pair.key), prefixes.holds(_beginning(pair))

    def _needed(self, pairs: Sequence[StatePair], *, keep_all: bool = False) -> tuple[Needed, Needed]:
        keys, prefixes = self._tiers.all()
        # Who has no key shares with nobody.
        passages = Needed(keys, [pair.key or i for i, pair in enumerate(pairs)], keep_all)
        return passages, Needed(prefixes, [_beginning(pair) if prefixes.on else None for pair in pairs], keep_all)

    def _compute_passages(self, pairs: Sequence[StatePair], passages: Needed) -> None:
        missing = passages.missing()
        if not missing:
            return
        first = [pairs[i] for i in missing.values()]
        kv = _stacked(self._decoder.passage_kv(self._states(first)))
        for name, part in zip(missing, torch.split(kv, [pair.num_states for pair in first], dim=2), strict=True):
            passages.computed(name, part)

    def _compute_beginnings(self, passages: Needed, beginnings: Needed) -> None:
        missing = {name: i for name, i in beginnings.missing().items() if beginnings.wanted(name)}
        if not missing:
            return
        tokens = [name[0] for name in missing if isinstance(name, tuple)]
        own = [passages.there[passages.names[i]] for i in missing.values()]
        lengths = [len(ids) for ids in tokens]
        layout = Layout(lengths, [kv.shape[2] for kv in own], self._device)
        ids = torch.tensor(list(chain.from_iterable(tokens)), device=self._device)
        kv = _stacked(self._decoder.prompt_kv(ids, _packed(own), layout))
        for name, part in zip(missing, torch.split(kv, lengths, dim=2), strict=True):
            beginnings.computed(name, part)

    def _part(
        self, pairs: Sequence[StatePair], rows: Sequence[int], prefix_lengths: list[int], context: Iterable[KeysValues]
    ) -> Part:
        left = [pairs[i].prompt.ids[length:] for i, length in zip(rows, prefix_lengths, strict=True)]
        ids = torch.tensor(list(chain.from_iterable(left)), device=self._device)
        counts = [pairs[i].num_states for i in rows]
        layout = Layout([len(prompt) for prompt in left], counts, self._device, prefix_lengths)
        return Part(rows, ids, context, layout)


def _beginning(pair: StatePair) -> Beginning | None:
    length = pair.prompt.prefix_length
    return (tuple(pair.prompt.ids[:length]), pair.key) if pair.key and length >= MIN_PREFIX_TOKENS else None


def _stacked(layers: Iterable[KeysValues]) -> Tensor:
    """(num_layers, 2, rows, num_kv, head)."""
    return torch.stack([torch.stack(kv) for kv in layers])


def _packed(parts: Sequence[Tensor]) -> list[KeysValues]:
    """Contexts end to end, by layer."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)
    return [(layer[0], layer[1]) for layer in whole]
