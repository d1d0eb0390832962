"""What the pairs of a batch need of one kind, by name, since pairs may share it. Does not know how it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decoder_server.tiers.tier import Tier

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
