"""How long the model takes: seconds per prompt token and per state, learned from its passes. Pure arithmetic.

They differ by far (a state only feeds keys and values, a prompt token runs through every layer), and
what a coarser ratio saves is states: one rate for both would promise too much.
"""

from __future__ import annotations

import math

# Weight of the passes before, at each new one: the last hundred or so count.
MEMORY = 0.99
# How much, of the data's own scale, speaks for one rate for both as long as passes do not tell them apart.
PRIOR = 1e-3


class Pace:
    """Least squares of seconds over (prompt tokens, states), older passes fading."""

    def __init__(self) -> None:
        self._pp = self._ps = self._ss = self._pt = self._st = 0.0
        self._tokens = self._seconds = 0.0

    def learn(self, num_prompt_tokens: int, num_states: int, seconds: float) -> None:
        """One pass."""
        p, s, t = float(num_prompt_tokens), float(num_states), seconds
        # Every pass counts by its share, not by its square: a batch twice as large is no four times the evidence.
        weight = 1.0 / max(1.0, p + s)
        self._pp = MEMORY * self._pp + weight * p * p
        self._ps = MEMORY * self._ps + weight * p * s
        self._ss = MEMORY * self._ss + weight * s * s
        self._pt = MEMORY * self._pt + weight * p * t
        self._st = MEMORY * self._st + weight * s * t
        self._tokens = MEMORY * self._tokens + p + s
        self._seconds = MEMORY * self._seconds + t

    @property
    def known(self) -> bool:
        """Whether there was any pass."""
        return self._tokens > 0

    def seconds(self, num_prompt_tokens: float, num_states: float) -> float:
        """What so much would take, by itself; 0 before the first pass."""
        per_prompt_token, per_state = self._rates()
        return num_prompt_tokens * per_prompt_token + num_states * per_state

    def _rates(self) -> tuple[float, float]:
        if not self.known:
            return 0.0, 0.0
        mean = self._seconds / self._tokens
        prior = PRIOR * (self._pp + self._ss)
        pp, ss = self._pp + prior, self._ss + prior
        pt, st = self._pt + prior * mean, self._st + prior * mean
        determinant = pp * ss - self._ps * self._ps
        a, b = (pt * ss - st * self._ps) / determinant, (st * pp - pt * self._ps) / determinant
        if b < 0:  # noise: the other alone explains it
            a, b = pt / pp, 0.0
        elif a < 0:
            a, b = 0.0, st / ss
        return (a, b) if math.isfinite(a) and math.isfinite(b) else (mean, mean)
