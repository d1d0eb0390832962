"""Margins of windows to outcomes of candidates. Pure; knows no queue and no store."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from decoder_server.passages import Found
from decoder_server.request import Outcome, Status
from decoder_server.ticket import Scored


def sigmoid(margin: float) -> float:
    """P(yes) of a margin, in float32, without overflow for any finite margin."""
    x = np.float32(margin)
    if x >= 0:
        return float(np.float32(1) / (np.float32(1) + np.exp(-x)))
    return float(np.exp(x) / (np.float32(1) + np.exp(x)))


def ranked(outcomes: Iterable[Outcome], top_n: int) -> list[Outcome]:
    """Scored ones best first, ties by index, at most `top_n` (0: all); then the others in request order."""
    every = sorted(outcomes, key=lambda o: o.index)
    scored = sorted((o for o in every if o.margin is not None), key=lambda o: -(o.margin or 0.0))
    return (scored[:top_n] if top_n else scored) + [o for o in every if o.margin is None]


def unscored(found: Found) -> Outcome:
    """The outcome of a candidate without states."""
    return Outcome(found.candidate.index, found.candidate.passage_id or "", found.status, message=found.message)


@dataclass(slots=True)
class _Pending:
    found: Found
    num_windows: int
    scored: list[Scored] = field(default_factory=list)


class Tally:
    """Candidates whose windows are being scored; the best window of a passage counts."""

    def __init__(self) -> None:
        self._pending: dict[int, _Pending] = {}

    def expect(self, found: Found, num_windows: int) -> None:
        self._pending[found.candidate.index] = _Pending(found, num_windows)

    def add(self, scored: Sequence[Scored]) -> list[Outcome]:
        """Takes margins; returns the candidates that are complete now."""
        complete = []
        for one in scored:
            pending = self._pending[one.index]
            pending.scored.append(one)
            if len(pending.scored) == pending.num_windows:
                complete.append(_outcome(self._pending.pop(one.index)))
        return complete


def _outcome(pending: _Pending) -> Outcome:
    found = pending.found
    states = found.states
    assert states is not None
    outcome = Outcome(
        index=found.candidate.index,
        passage_id=found.candidate.passage_id or "",
        status=found.status,
        num_states=states.num_states,
        compression_ratio=states.compression_ratio,
        truncated=states.truncated,
    )
    # With one window unknown the best is unknown too.
    bad = next((one for one in pending.scored if not math.isfinite(one.margin)), None)
    if bad is not None:
        return replace(outcome, status=Status.FAILED, message=bad.error)
    margin = max(one.margin for one in pending.scored)
    return replace(outcome, margin=margin, score=sigmoid(margin))
