"""Margins of windows to outcomes of candidates. Pure; knows no queue and no store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from decoder_server.backend import Item
from decoder_server.passages import Found
from decoder_server.request import Outcome, Status
from decoder_server.ticket import Scored


def ranked(outcomes: Iterable[Outcome], top_n: int) -> list[Outcome]:
    """Scored ones best first, ties by index, at most `top_n` (0: all); then the others in request order.

    In a cascade whoever reached a later stage comes before all that did not.
    """
    every = sorted(outcomes, key=lambda o: o.index)
    scored = sorted((o for o in every if o.margin is not None), key=lambda o: (-len(o.stages), -(o.margin or 0.0)))
    return (scored[:top_n] if top_n else scored) + [o for o in every if o.margin is None]


def unscored(found: Found) -> Outcome:
    """The outcome of a candidate without states."""
    candidate = found.candidate
    return Outcome(candidate.index, candidate.passage_id or "", found.status, message=found.message, empty=found.empty)


@dataclass(slots=True)
class _Pending:
    found: Found
    items: Sequence[Item]
    scored: list[Scored] = field(default_factory=list)


class Tally:
    """Candidates whose windows are being scored; the best window of a passage counts."""

    def __init__(self, activate: Callable[[float], float], num_prompt_tokens: int) -> None:
        """
        Args:
            activate: a margin's score.
            num_prompt_tokens: what of an item's tokens is not the passage's.
        """
        self._activate = activate
        self._num_prompt_tokens = num_prompt_tokens
        self._pending: dict[int, _Pending] = {}

    def expect(self, found: Found, items: Sequence[Item]) -> None:
        self._pending[found.candidate.index] = _Pending(found, items)

    def add(self, scored: Sequence[Scored]) -> list[Outcome]:
        """Takes margins; returns the candidates that are complete now."""
        complete = []
        for one in scored:
            pending = self._pending[one.index]
            pending.scored.append(one)
            if len(pending.scored) == len(pending.items):
                complete.append(self._outcome(self._pending.pop(one.index)))
        return complete

    def _outcome(self, pending: _Pending) -> Outcome:
        found = pending.found
        states = found.states
        if states is not None:
            # A ratio may be far above the passage's length: its one state stands for no more tokens than there are.
            num_tokens = states.num_states * min(states.compression_ratio, states.num_tokens)
        else:
            num_tokens = sum(max(0, item.num_tokens - self._num_prompt_tokens) for item in pending.items)
        outcome = Outcome(
            index=found.candidate.index,
            passage_id=found.candidate.passage_id or "",
            status=found.status,
            num_states=states.num_states if states is not None else 0,
            compression_ratio=states.compression_ratio if states is not None else 0,
            truncated=any(item.truncated for item in pending.items),
            num_passage_tokens=num_tokens,
        )
        # With one window unknown the best is unknown too.
        bad = next((one for one in pending.scored if not math.isfinite(one.margin)), None)
        if bad is not None:
            return replace(outcome, status=Status.FAILED, message=bad.error)
        margin = max(one.margin for one in pending.scored)
        return replace(outcome, margin=margin, score=self._activate(margin))
