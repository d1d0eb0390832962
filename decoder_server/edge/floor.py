"""Requests of texts alone: each has a score, or the request fails. For edges whose clients know no status.

Clients of the HTTP and TEI dialects pair scores with documents by position or by count, so a document that is left
out of an answer gives every later one another's score. A request with ids has a status per candidate instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NoReturn

from preread.errors import DeadlineExceeded, InvalidRequest, Unavailable
from preread.types import Candidate, Result, Summary

# An empty text is not read, by no model, and has these in every request. The margin is below every margin of a real
# model: its sigmoid is 0 in float32, and exp(500), which a client may compute of it, is still a finite float64.
FLOOR_SCORE, FLOOR_MARGIN = 0.0, -500.0


def texts_alone(candidates: Sequence[Candidate]) -> bool:
    """Whether no candidate of a request has an id."""
    return all(candidate.passage_id is None for candidate in candidates)


def every_scored(
    outcomes: Sequence[Result], summary: Summary, where: Callable[[int], str], *, encodes_on_demand: bool
) -> list[Result]:
    """The scored outcomes, best first, and behind them the empty texts at the floor, in request order.

    Args:
        outcomes: an engine's, of texts alone.
        where: what the caller calls the candidate at an index.

    Raises:
        InvalidRequest, Unavailable, DeadlineExceeded: names the first text without a score.
    """
    for outcome in outcomes:
        if outcome.margin is None and not outcome.empty:
            fail(outcome, summary, where(outcome.index), encodes_on_demand=encodes_on_demand)
    floor = [dataclasses.replace(o, margin=FLOOR_MARGIN, score=FLOOR_SCORE) for o in outcomes if o.empty]
    return [outcome for outcome in outcomes if outcome.margin is not None] + floor


def fail(outcome: Result, summary: Summary, field: str, *, encodes_on_demand: bool) -> NoReturn:
    """Raises why a request fails for this candidate, which has no score."""
    message = outcome.message
    if outcome.status == "too_long" or outcome.empty:
        raise InvalidRequest(field, outcome.status, f"a text that can be scored ({message})")
    if outcome.status == "missing" and not encodes_on_demand:
        raise Unavailable(f"{field}: {message}; start the server with --encoder-address, or without --no-encoder")
    if outcome.status == "missing":
        expected = f"an id that is stored, or a text and on_miss encode ({message})"
        raise InvalidRequest(field, outcome.status, expected)
    if summary.stopped_early:
        raise DeadlineExceeded(f"{field}: {message}")
    raise Unavailable(f"{field} could not be scored: {message}")
