"""Which candidates of one request are read on, stage by stage, and what each ends with. Pure; knows no queue.

A passage that cannot be among those that go on any more is let go at once, states and all: what is
held of a thousand candidates is what may still be read.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import replace

from decoder_server.passages import Found
from decoder_server.plan import Plan
from decoder_server.request import Candidate, Outcome, StageScore, Status

NOT_REACHED = "the deadline came before it was scored"


class Sieve:
    """The best `keep` of what it was given, by margin, ties by index."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._heap: list[tuple[float, int]] = []  # (margin, -index), the worst first

    def add(self, index: int, margin: float) -> int | None:
        """The index that is out now, this one or another; None while there is room."""
        if len(self._heap) < self._keep:
            heapq.heappush(self._heap, (margin, -index))
            return None
        return -heapq.heappushpop(self._heap, (margin, -index))[1]

    def best(self) -> list[int]:
        """Indexes, best first."""
        return [-negative for _, negative in sorted(self._heap, reverse=True)]


class Contest:
    """One request's candidates under its plan. A plan of one stage settles each as it is scored."""

    def __init__(self, plan: Plan, candidates: Iterable[Candidate]) -> None:
        self.stage = 0
        self.any_scored = False
        self._plan = plan
        self._unread = {candidate.index: candidate for candidate in candidates}  # no outcome yet
        self._left = len(self._unread)  # outcomes that the present stage still owes
        self._sieve = self._new_sieve()
        self._found: dict[int, Found] = {}  # states at the base ratio of what may go on
        self._reached: dict[int, Outcome] = {}  # how far those came that are not settled

    @property
    def ratio(self) -> int:
        """What the present stage reads at."""
        return self._plan.stages[self.stage].compression_ratio

    @property
    def is_last_stage(self) -> bool:
        return self.stage == len(self._plan.stages) - 1

    @property
    def stage_over(self) -> bool:
        return self._left == 0

    def hold(self, found: Found) -> None:
        """States at the base ratio, as they were fetched: a later stage may need them."""
        if not self.is_last_stage:
            self._found[found.candidate.index] = found

    def scored(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """Takes the present stage's outcomes; returns the candidates that are settled by them: read on by nobody."""
        settled: list[Outcome] = []
        for outcome in outcomes:
            self._left -= 1
            self._unread.pop(outcome.index, None)
            before = self._reached.pop(outcome.index, None)
            if outcome.margin is None:
                self._found.pop(outcome.index, None)
                # Finer states that could not be read do not undo what coarser ones said.
                settled.append(outcome if before is None else replace(before, message=outcome.message))
                continue
            self.any_scored = True
            settled += self._entered(self._with_stages(outcome, before))
        return settled

    def advance(self) -> list[Found]:
        """After a stage: what the next one reads, best first; empty when there is none, and all is settled."""
        best = [] if self.is_last_stage or not self._reached else self._sieve.best()
        found = [self._found[index] for index in best]
        if found:
            self.stage += 1
            self._left = len(found)
            self._sieve = self._new_sieve()
            if self.is_last_stage:
                self._found.clear()
        return found

    def stop(self) -> list[Outcome]:
        """Settles what is not: each as far as it came."""
        unread = [
            Outcome(candidate.index, candidate.passage_id or "", Status.FAILED, message=NOT_REACHED)
            for candidate in self._unread.values()
        ]
        reached = list(self._reached.values())
        self._unread.clear()
        self._reached.clear()
        self._found.clear()
        self._left = 0
        return [*reached, *unread]

    def _entered(self, outcome: Outcome) -> list[Outcome]:
        if self.is_last_stage:
            return [outcome]
        self._reached[outcome.index] = outcome
        out = self._sieve.add(outcome.index, outcome.margin or 0.0)
        if out is None:
            return []
        self._found.pop(out)
        return [self._reached.pop(out)]

    def _with_stages(self, outcome: Outcome, before: Outcome | None) -> Outcome:
        if not self._plan.cascade or outcome.margin is None or outcome.score is None:
            return outcome
        score = StageScore(outcome.compression_ratio, outcome.margin, outcome.score, outcome.num_states)
        return replace(outcome, stages=(*(before.stages if before is not None else ()), score))

    def _new_sieve(self) -> Sieve:
        return Sieve(self._plan.stages[self.stage].keep)
