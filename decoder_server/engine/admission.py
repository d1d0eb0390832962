"""Load control: which requests join the queue, and which are scored coarser than requested because of it.

A request reserves its estimated cost: its states are fetched once it is admitted, and the estimate learns from them.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from decoder_server.engine.plan import Plan
from decoder_server.engine.scheduler import SchedulerStats
from preread.errors import Overloaded
from preread.values import Degraded

# Before anything was fetched; and the weight of a new passage in the running mean afterwards.
FIRST_PASSAGE_TOKENS, LEARNING_RATE = 256.0, 0.1
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.05, 120.0
# Share of the time left that a response may be expected to take: the rest is for the errors of the estimate.
DEADLINE_SHARE = 0.8


@dataclass(slots=True, eq=False)
class _Reservation:
    """The tokens of one admitted request; gives them back as its candidates finish, stage by stage."""

    admission: "Admission"
    left: list[int]  # candidates of each stage
    each: list[float]  # tokens of one of them

    @property
    def num_tokens(self) -> float:
        return sum(left * each for left, each in zip(self.left, self.each, strict=True))

    def finished(self, num_candidates: int, stage: int = 0) -> None:
        self.left[stage] -= num_candidates
        self.admission.num_tokens -= num_candidates * self.each[stage]


class Admission:
    """The bounds of one model's queue. Only touched from the event loop."""

    def __init__(self, stats: SchedulerStats, max_requests: int, max_tokens: int, max_seconds: float = 0.0) -> None:
        self.num_tokens = 0.0
        self.num_rejected = 0
        self._reservations: set[_Reservation] = set()
        self._stats = stats
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._max_seconds = max_seconds  # of work at the measured rate; 0: no such limit
        self._passage_tokens = FIRST_PASSAGE_TOKENS

    @property
    def num_requests(self) -> int:
        return len(self._reservations)

    @contextmanager
    def admit(self, reads: Sequence[tuple[int, int]], num_prompt_tokens: int) -> Iterator[_Reservation]:
        """Reserves a request's tokens, by the candidates and ratio of each stage; Overloaded where there is no room.

        A request larger than the whole queue is admitted when the queue is empty: it never could be otherwise.
        """
        each = [num_prompt_tokens + self._states(ratio) for _, ratio in reads]
        reservation = _Reservation(self, [num for num, _ in reads], each)
        num_tokens, limit = reservation.num_tokens, self._max_queued_tokens
        if (num := self.num_requests) >= self._max_requests:
            raise self._rejection(f"{num} requests wait; the limit is {self._max_requests}", self.num_tokens / num)
        excess = self.num_tokens + num_tokens - limit
        if self.num_requests and excess > 0:
            message = f"about {self.num_tokens:.0f} tokens wait and this request has about {num_tokens:.0f}; "
            raise self._rejection(f"{message}the limit is {limit:.0f}", min(excess, self.num_tokens))
        self.num_tokens += num_tokens
        self._reservations.add(reservation)
        try:
            yield reservation
        finally:
            for stage, left in enumerate(reservation.left):
                reservation.finished(left, stage)
            self._reservations.discard(reservation)

    def degrade(
        self,
        plan: Plan,
        num_candidates: int,
        num_prompt_tokens: int,  # of each query
        deadline: float | None,
        queue_share: float,
        num_queries: int = 1,
    ) -> tuple[Plan, Degraded | None]:
        """The plan, or a coarser one: it would miss its `deadline`, or more than its share of the `queue` is in use."""
        if not self._stats.knows_pass_time:  # before the first pass
            return plan, None
        plans = plan.coarser()
        estimates = []  # tokens over all stages; seconds until the (first stage's) response, the queue included
        for one in plans:
            reads = [(num, self._states(ratio)) for num, ratio in one.reads(num_candidates, num_queries)]
            num_tokens = sum(num * (num_prompt_tokens + num_states) for num, num_states in reads)
            # When the machine is shared equally, so much is computed before a request of this size is done.
            ahead = sum(min(num_tokens, other.num_tokens) for other in self._reservations)
            num, num_states = reads[0]
            own_seconds = self._stats.pass_seconds(num * num_prompt_tokens, num * num_states)
            estimates.append((num_tokens, ahead / self._stats.drain_rate + own_seconds))
        options, last = list(enumerate(estimates)), len(plans) - 1
        by_deadline = by_queue = 0  # the first that each pressure lets pass, else the last
        if deadline is not None:
            seconds_left = DEADLINE_SHARE * (deadline - time.monotonic())
            by_deadline = next((i for i, (_, seconds) in options if seconds <= seconds_left), last)
        if self.num_tokens > 0:  # a single request keeps no other waiting
            limit = queue_share * self._max_queued_tokens
            by_queue = next((i for i, (num_tokens, _) in options if self.num_tokens + num_tokens <= limit), last)
        chosen = max(by_deadline, by_queue)
        reason = "deadline" if by_deadline >= by_queue else "queue"
        return plans[chosen], Degraded(reason, *plan.summary) if chosen else None

    def learn(self, num_tokens: int) -> None:
        """A passage of this many tokens was fetched."""
        self._passage_tokens += LEARNING_RATE * (num_tokens - self._passage_tokens)

    @property
    def _max_queued_tokens(self) -> float:
        """The configured tokens, or those the model computes in the configured time, if fewer."""
        rate = self._stats.drain_rate
        return min(self._max_tokens, rate * self._max_seconds) if rate and self._max_seconds else self._max_tokens

    def _states(self, ratio: int) -> float:
        """Expected states of one candidate; tokens, where the model reads text."""
        return max(1.0, self._passage_tokens / max(1, ratio))

    def _rejection(self, message: str, tokens_ahead: float) -> Overloaded:
        self.num_rejected += 1
        seconds = tokens_ahead / rate if (rate := self._stats.drain_rate) else 1.0
        return Overloaded(f"the queue is full: {message}", min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS))
