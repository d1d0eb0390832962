"""The two tiers of one model.

    keys      per passage and read ratio: keys and values of its states in every layer
    prefixes  per passage, read ratio and beginning of a prompt: keys and values of that beginning in every layer

Pooled states have a tier of their own, in front of the store (cache/tier.py). Does not know how entries are computed.
"""

from __future__ import annotations

from decoder_server.tiers.budgets import TierBudgets
from decoder_server.tiers.tier import Tier


class Tiers:
    """Made by and for one loaded model, and gone with it: no entry outlives its weights or templates."""

    def __init__(self, budgets: TierBudgets) -> None:
        self.keys = Tier("keys", budgets.max_keys_bytes, budgets.form)
        self.prefixes = Tier("prefixes", budgets.max_prefix_bytes, budgets.form)

    @property
    def on(self) -> bool:
        return self.keys.on or self.prefixes.on

    def clear(self) -> None:
        self.keys.clear()
        self.prefixes.clear()

    def all(self) -> tuple[Tier, Tier]:
        return self.keys, self.prefixes
