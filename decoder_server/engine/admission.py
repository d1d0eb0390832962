"""Who may join the queue: bounded by requests and by tokens, with an honest word on when to come back.

A request reserves what it will cost by estimate, because its states are read only after it is
admitted; the estimate learns from the passages seen. Does not know the order of work.

What a request is read at, given what it asked for and what is under way: degrade's policy on measured figures.

Does not know where plans come from, nor what is done with them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from decoder_server.engine import degrade
from decoder_server.engine.plan import Plan
from decoder_server.engine.scheduler import BatchCounts, Batcher
from preread.errors import Overloaded
from preread.types import Degraded

# Before anything was seen. The weight of a new mean in the running one afterwards.
FIRST_PASSAGE_TOKENS = 256.0
LEARNING_RATE = 0.1
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.05, 120.0


class Place:
    """One admitted request; gives its tokens back as its candidates finish, stage by stage."""

    def __init__(self, admission: Admission, stages: Sequence[tuple[int, float]]) -> None:
        """
        Args:
            stages: how many candidates each reads, and tokens of one of them.
        """
        self.num_tokens = sum(num_candidates * each for num_candidates, each in stages)
        self._admission = admission
        self._each = [each for _, each in stages]
        self._left = [num_candidates for num_candidates, _ in stages]

    @property
    def num_left_tokens(self) -> float:
        """What is still to be computed, by estimate."""
        return sum(left * each for left, each in zip(self._left, self._each, strict=True))

    def finished(self, num_candidates: int, stage: int = 0) -> None:
        self._left[stage] -= num_candidates
        self._admission.num_tokens -= num_candidates * self._each[stage]

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        for stage, left in enumerate(self._left):
            self.finished(left, stage)
        self._admission.left(self)


class Admission:
    """The bounds of one model's queue. Only touched from the event loop."""

    def __init__(self, counts: BatchCounts, *, max_requests: int, max_tokens: int, max_seconds: float = 0.0) -> None:
        """
        Args:
            max_seconds: of work at the measured rate; 0: no such limit.
        """
        self.num_requests = 0
        self.num_tokens = 0.0
        self.num_refused = 0
        self._counts = counts
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._max_seconds = max_seconds
        self._passage_tokens = FIRST_PASSAGE_TOKENS
        self._places: set[Place] = set()

    def states(self, ratio: int) -> float:
        """Of one candidate, as far as one can tell before it is read; of a model that reads text, tokens."""
        return max(1.0, self._passage_tokens / max(1, ratio))

    def admit(
        self, num_candidates: int, num_prompt_tokens: int, ratio: int, later: Sequence[tuple[int, int]] = ()
    ) -> Place:
        """A place in the queue, to be used as a context manager.

        A request larger than the whole queue is admitted when nothing else is there: it could
        never be otherwise.

        Args:
            later: how many candidates each further stage reads, and at which ratio.

        Raises:
            Overloaded: no room.
        """
        stages = [(num, num_prompt_tokens + self.states(r)) for num, r in ((num_candidates, ratio), *later)]
        place = Place(self, stages)
        num_tokens = place.num_tokens
        if self.num_requests >= self._max_requests:
            mean_tokens = self.num_tokens / self.num_requests
            raise self._refusal(f"{self.num_requests} requests wait; the limit is {self._max_requests}", mean_tokens)
        limit = self.limit_tokens
        excess = self.num_tokens + num_tokens - limit
        if self.num_requests and excess > 0:
            message = (
                f"about {self.num_tokens:.0f} tokens wait and this request has about {num_tokens:.0f}; "
                f"the limit is {limit:.0f}"
            )
            raise self._refusal(message, min(excess, self.num_tokens))
        self.num_requests += 1
        self.num_tokens += num_tokens
        self._places.add(place)
        return place

    def left(self, place: Place) -> None:
        """Its request ended."""
        self.num_requests -= 1
        self._places.discard(place)

    def tokens_ahead(self, num_tokens: float) -> float:
        """What is computed before a request of this size is done, when the machine is shared equally."""
        return sum(min(num_tokens, place.num_left_tokens) for place in self._places)

    @property
    def limit_tokens(self) -> float:
        """What may wait: the tokens configured, or those the model reads in the time configured, if fewer."""
        rate = self._counts.drain_rate
        return min(self._max_tokens, rate * self._max_seconds) if rate and self._max_seconds else self._max_tokens

    def learn(self, num_tokens: int) -> None:
        """A passage of this many tokens was read."""
        self._passage_tokens += LEARNING_RATE * (num_tokens - self._passage_tokens)

    def _refusal(self, message: str, tokens_to_wait_for: float) -> Overloaded:
        self.num_refused += 1
        rate = self._counts.drain_rate
        seconds = tokens_to_wait_for / rate if rate else 1.0
        return Overloaded(f"the queue is full: {message}", min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS))


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
