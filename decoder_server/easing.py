"""What a request is read at, given what it asked for and what is under way: degrade's policy on measured figures.

Does not know where plans come from, nor what is done with them.
"""

from __future__ import annotations

import time

from decoder_server import degrade
from decoder_server.admission import Admission
from decoder_server.batcher import Batcher
from decoder_server.plan import Plan
from decoder_server.request import Degraded


class Easing:
    """Of one model's queue. Only touched from the event loop."""

    def __init__(self, batcher: Batcher, admission: Admission, queue_share: float) -> None:
        """
        Args:
            queue_share: of what the queue may hold, before requests are read coarser.
        """
        self._batcher = batcher
        self._admission = admission
        self._queue_share = queue_share

    def ease(
        self, asked: Plan, num_candidates: int, num_prompt_tokens: int, deadline: float | None
    ) -> tuple[Plan, Degraded | None]:
        """What is read; and what was asked and why, if that was more. Before the first pass nothing is known."""
        if not self._batcher.pace.known:
            return asked, None
        plans = degrade.options(asked)
        estimates = [self._estimate(read, num_candidates, num_prompt_tokens) for read in plans]
        seconds_left = None if deadline is None else deadline - time.monotonic()
        share = self._queue_share * self._admission.limit_tokens
        chosen, reason = degrade.choose(estimates, seconds_left, self._admission.num_tokens, share)
        if chosen == 0:
            return asked, None
        if asked.cascade:
            return plans[chosen], Degraded(reason, 0, asked.stages)
        return plans[chosen], Degraded(reason, asked.first.compression_ratio)

    def _estimate(self, read: Plan, num_candidates: int, num_prompt_tokens: int) -> degrade.Estimate:
        reads = [(num, self._admission.states(ratio)) for num, ratio in read.reads(num_candidates)]
        num_tokens = sum(num * (num_prompt_tokens + num_states) for num, num_states in reads)
        num, num_states = reads[0]
        ahead = self._admission.tokens_ahead(num_tokens) / self._batcher.counts.drain_rate
        own = self._batcher.pace.seconds(num * num_prompt_tokens, num * num_states)
        return degrade.Estimate(num_tokens, ahead + own)
