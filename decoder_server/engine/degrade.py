"""Under pressure a request may be read coarser than asked: which plan it gets, and why. Pure.

Two pressures. `deadline`: the answer is not expected in time. `queue`: with this request more would
wait than a share of what may. A plan holds for all candidates of a request, so that scores compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from decoder_server.engine.plan import Plan
from preread.types import Stage

MAX_RATIO = 32  # the coarsest that models are trained for
# Of the time left, what the answer may be expected to take: the rest is for what estimates leave out.
DEADLINE_SHARE = 0.8

DEADLINE, QUEUE = "deadline", "queue"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one plan costs."""

    num_tokens: float  # over all stages
    seconds: float  # until there is an answer, those who come first included; of a cascade one of its first stage


def options(plan: Plan) -> list[Plan]:
    """The plan, then coarser ones: each ratio doubled up to MAX_RATIO; of a cascade first the last stages left out."""
    shorter = [Plan(plan.stages[:n], plan.cascade) for n in range(len(plan.stages), 0, -1)]
    ratio, coarser = plan.first.compression_ratio, []
    while 0 < 2 * ratio <= MAX_RATIO:
        ratio *= 2
        coarser.append(Plan((Stage(ratio),), plan.cascade))
    return shorter + coarser


def choose(
    estimates: Sequence[Estimate],
    seconds_left: float | None,
    num_queued_tokens: float,
    max_queued_tokens: float,
) -> tuple[int, str]:
    """The first option that both pressures let pass, else the last; and which of them it was, "" for option 0.

    Args:
        estimates: of the options, in their order.
        seconds_left: until the deadline; None: there is none.
        num_queued_tokens: of requests that are under way.
        max_queued_tokens: what may be under way, this request included, before requests are read coarser.
    """
    by_deadline = 0
    if seconds_left is not None:
        by_deadline = _first(estimate.seconds <= DEADLINE_SHARE * seconds_left for estimate in estimates)
    by_queue = 0
    if num_queued_tokens > 0:  # a request alone is nobody's burden
        by_queue = _first(num_queued_tokens + estimate.num_tokens <= max_queued_tokens for estimate in estimates)
    chosen = max(by_deadline, by_queue)
    if chosen == 0:
        return 0, ""
    return chosen, DEADLINE if by_deadline >= by_queue else QUEUE


def _first(fits: Iterable[bool]) -> int:
    """The first that fits, else the last."""
    last = 0
    for last, one in enumerate(fits):
        if one:
            return last
    return last
