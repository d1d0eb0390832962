"""Which queries a configuration wins and loses against the reference, and which passages moved. Computes no measure."""

from __future__ import annotations

from dataclasses import dataclass

from tuning.metrics import HEADLINE
from tuning.sweep.result import Row, SweepReport
from tuning.trec import Run

NUM_SHOWN = 5
NUM_MOVED = 3
MAX_TEXT_CHARACTERS = 280


@dataclass(frozen=True)
class Moved:
    """A passage and its places, from 1, in the reference's order and in this one."""

    passage_id: str
    text: str
    grade: int
    before: int
    after: int


@dataclass(frozen=True)
class Example:
    """One query, its nDCG@10 with the reference and here, and what moved."""

    query_id: str
    text: str
    before: float
    after: float
    moved: list[Moved]


@dataclass(frozen=True)
class Examples:
    """The queries that changed most, the most changed first."""

    row: Row
    losses: list[Example]
    wins: list[Example]
    num_lost: int
    num_won: int
    num_same: int


def examples_of(report: SweepReport, row: Row) -> Examples:
    """Of one configuration."""
    before = report.reference.per_query[HEADLINE]
    after = row.quality.per_query[HEADLINE]
    change = {q: float(b - a) for q, a, b in zip(report.query_ids, before, after, strict=True)}
    values = {q: (float(a), float(b)) for q, a, b in zip(report.query_ids, before, after, strict=True)}
    order = sorted(change, key=lambda q: (change[q], q))
    lost = [q for q in order if change[q] < 0]
    won = [q for q in reversed(order) if change[q] > 0]

    def example(query_id: str) -> Example:
        moved = _moved(report, query_id, report.reference.run, row.quality.run)
        return Example(query_id, report.queries.get(query_id, ""), *values[query_id], moved)

    return Examples(
        row,
        [example(q) for q in lost[:NUM_SHOWN]],
        [example(q) for q in won[:NUM_SHOWN]],
        len(lost),
        len(won),
        len(order) - len(lost) - len(won),
    )


def shown_rows(report: SweepReport, chosen: Row | None, most: int = 12) -> list[Row]:
    """The chosen one first, then both fronts from small to large."""
    on = zip(report.rows, report.on_size_front(), report.on_latency_front(), strict=True)
    fronts = sorted((row for row, small, fast in on if small or fast), key=lambda row: row.size.bytes_per_passage)
    rows = [row for row in fronts if row is not chosen]
    return ([chosen] if chosen is not None else []) + rows[:most]


def _moved(report: SweepReport, query_id: str, before: Run, after: Run) -> list[Moved]:
    """The relevant candidates that changed places, and who stands first now."""
    places = [{p: place for place, (p, _) in enumerate(run.get(query_id, []), 1)} for run in (before, after)]
    grades = report.qrels.get(query_id, {})

    def entry(p: str) -> Moved:
        text = " ".join(report.passages.get(p, "").split())
        short = text if len(text) <= MAX_TEXT_CHARACTERS else text[: MAX_TEXT_CHARACTERS - 1] + "…"
        return Moved(p, short, grades.get(p, 0), places[0][p], places[1][p])

    relevant = [entry(p) for p in places[1] if grades.get(p, 0) > 0]
    changed = sorted((one for one in relevant if one.before != one.after), key=lambda one: -abs(one.after - one.before))
    changed = changed[:NUM_MOVED]
    first = next(iter(places[1]), None)
    if first is not None and all(one.passage_id != first for one in changed):
        changed.append(entry(first))
    return changed
