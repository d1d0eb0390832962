"""What a sweep shows, in sentences: what was measured, what was chosen and why, its cost, and what the data can tell.

The terminal, the page, the JSON document and the chosen file all take their sentences from here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from operator import itemgetter
from statistics import median
from typing import Any

from preread_edge.outputs import human_bytes
from tuning import EvaluationError
from tuning.config import Limits
from tuning.metrics import HEADLINE
from tuning.sweep.report import SweepReport, SweepRow

_FEW_QUERIES = 10  # with fewer, resampling them shows next to nothing of what other queries would
_BEST = {"bytes": "the smallest", "latency": "the fastest", "quality": f"the best in {HEADLINE}"}


@dataclass(frozen=True)
class Choice:
    """`row` keeps all limits, or is the nearest to doing so."""

    row: SweepRow
    broken: dict[str, float]  # by limit that it does not keep: value over limit, less 1; a loss in points of a percent
    explanation: str  # its values over those limits
    num_within: int = 0  # configurations that keep all limits

    @classmethod
    def among(cls, limits: Limits, rows: Sequence[SweepRow]) -> "Choice":
        """The preferred that keeps all limits, or whose worst excess is least. Raises EvaluationError without rows."""
        if not rows:
            raise EvaluationError("no configuration could be measured; the notes say why")
        ranked: list[tuple[tuple[float, ...], Choice]] = []
        for row in rows:
            loss = row.quality.loss.high if limits.sure else row.quality.loss.mean
            size, broken, told = row.size.bytes_per_passage, dict[str, float](), []
            if limits.max_loss is not None and loss > limits.max_loss:
                broken["max_loss"] = (loss - limits.max_loss) * 100
                up_to = "up to " if limits.sure else ""
                told.append(f"it loses {up_to}{loss:.2%}, expected at most {limits.max_loss:.2%}")
            if limits.max_bytes is not None and size > limits.max_bytes:
                broken["max_bytes"] = size / max(limits.max_bytes, 1e-9) - 1
                told.append(f"{size:,.0f} bytes a passage, expected at most {limits.max_bytes:,.0f}")
            if (most := limits.max_latency_seconds) is not None:
                assert row.timing is not None  # the command refuses such a limit where nothing is timed
                p99 = row.timing.p99_seconds
                if p99 > most:
                    broken["max_latency"] = p99 / max(most, 1e-9) - 1
                    told.append(f"p99 {p99 * 1000:.1f} ms, expected at most {most * 1000:g} ms")
            p50 = row.timing.p50_seconds if row.timing is not None else 0.0
            keys = {"bytes": size, "latency": p50, "quality": -row.quality.headline}
            excess, first = max(broken.values(), default=-1.0), keys.pop(limits.decides_by)
            order = (excess, first, keys.get("quality", 0.0), *keys.values())
            ranked.append((order, cls(row, broken, "; ".join(told))))
        num_within = sum(not one.broken for _, one in ranked)
        return replace(min(ranked, key=itemgetter(0))[1], num_within=num_within)


@dataclass(frozen=True)
class SweepSummary:
    """Of a report, and of the choice within limits; None where no limit is given."""

    report: SweepReport
    limits: Limits
    choice: Choice | None

    @property
    def sentences(self) -> list[str]:
        return [self.measured, self.outcome, *([self.cost] if self.cost else []), *self.cautions]

    @property
    def measured(self) -> str:
        one = self.report
        judged = f"judged by {self._reference} itself" if one.taught else "judged"
        return (
            f"Measured: {one.model} on {one.num_queries:,} {judged} queries of {one.collection} "
            f"({one.num_passages:,} passages, {one.first_stage_name}'s best {one.settings.top_k} per query), "
            f"{len(one.rows)} configurations, on {one.machine}."
        )

    @property
    def outcome(self) -> str:
        """What was chosen and why; or why nothing was."""
        if self.choice is None:
            return "Nothing is chosen: no limit was given (--max-loss 1%, --max-bytes 8KiB, --max-latency 50ms)."
        choice, one, limits = self.choice, self.choice.row.configuration, "; ".join(self._limits())
        if choice.broken:
            return f"No configuration keeps the limits ({limits}); the nearest is {one.name}: {choice.explanation}."
        how = "in stages" if one.reading.is_cascade else "at ratio"
        among = f"{choice.num_within} of {len(self.report.rows)} configurations keep the limits ({limits})"
        return (
            f"Chosen: stored at ratio {one.stored_ratio} as {one.codec}, read {how} {one.reading}. {among}; "
            f"of these it is {_BEST[self.limits.decides_by]}."
        )

    @property
    def cost(self) -> str:
        """What the chosen configuration loses, saves and takes; empty where none is chosen."""
        if self.choice is None or self.choice.broken:
            return ""
        row, one = self.choice.row, self.report
        size, whole = row.size.bytes_per_passage, one.reference_size.bytes_per_passage
        told = (
            f"It {row.quality.change_words} of {HEADLINE} against {self._reference} "
            f"(95% interval: {row.quality.range_words}) and takes {human_bytes(size)} per passage, "
            f"{whole / size:.1f} times less than the {human_bytes(whole)} of uncompressed states"
        )
        if row.timing is None:
            return f"{told}."
        finest = [
            other.timing.p50_seconds
            for other in one.rows
            if other.timing is not None and other.configuration.reading.ratios == [one.reference_ratio]
        ]
        instead = f" instead of {1000 * min(finest):.1f} ms when read at {one.reference_ratio}" if finest else ""
        p50, top_k = 1000 * row.timing.p50_seconds, one.settings.top_k
        return f"{told}. A rerank of {top_k} takes {p50:.1f} ms (p50){instead}."

    @property
    def cautions(self) -> list[str]:
        """What these queries cannot tell, and how the reference compares with the first stage."""
        return [self._precision_told, *([self._first_stage_told] if not self.report.taught else [])]

    @property
    def is_uncertain(self) -> bool:
        """Whether the cautions speak against relying on the choice."""
        return self.half_width is None or self.tells_max_loss is False or self._position["position"] == "below"

    @cached_property
    def half_width(self) -> float | None:
        """Of the 95% interval of the change in nDCG@10: of the choice, else the median; None: too few queries."""
        rows = self.report.rows if self.choice is None else [self.choice.row]
        if self.report.num_queries < _FEW_QUERIES or not rows:
            return None
        return median((row.quality.loss.high - row.quality.loss.low) / 2 for row in rows)

    @property
    def tells_max_loss(self) -> bool | None:
        """Whether the choice's interval lies on one side of --max-loss; None without such a limit."""
        if self.choice is None or self.limits.max_loss is None:
            return None
        loss = self.choice.row.quality.loss
        return self.half_width is not None and not loss.low <= self.limits.max_loss < loss.high

    @property
    def num_queries_needed(self) -> int | None:
        """How many queries narrow the interval to --max-loss, to two digits: it shrinks with their square root."""
        if not self.half_width or not self.limits.max_loss:
            return None
        exact = ceil(self.report.num_queries * (self.half_width / self.limits.max_loss) ** 2)
        step: int = 10 ** max(0, len(str(exact)) - 2)
        return max(self.report.num_queries, -(-exact // step) * step)

    def to_json(self) -> dict[str, Any]:
        return {
            "sentences": self.sentences,
            "half_width": self.half_width,
            "tells_max_loss": self.tells_max_loss,
            "num_queries_needed": self.num_queries_needed,
            "reference_against_first_stage": None if self.report.taught else self._position,
        }

    @property
    def _reference(self) -> str:
        return f"r = {self.report.reference_ratio}"

    def _limits(self) -> Iterator[str]:
        limits = self.limits
        if limits.max_loss is not None:
            end = ", even at the worse end of its interval" if limits.sure else ""
            yield f"a loss of at most {100 * limits.max_loss:g}%{end}"
        if limits.max_bytes is not None:
            yield f"at most {human_bytes(limits.max_bytes)} per passage"
        if limits.max_latency_seconds is not None:
            yield f"p99 at most {1000 * limits.max_latency_seconds:g} ms"

    @property
    def _precision_told(self) -> str:
        queries = f"{self.report.num_queries:,} {'query' if self.report.num_queries == 1 else 'queries'}"
        if self.half_width is None:
            return f"{queries} cannot tell a loss from a gain: use at least {_FEW_QUERIES}, better hundreds."
        points = f"±{100 * self.half_width:.2g} points"
        if (most := self.limits.max_loss) is None or self.choice is None:
            return (
                f"{queries} tell a change in {HEADLINE} to {points} (95% interval, the median of the configurations)."
            )
        percent, words = f"{100 * most:g}%", self.choice.row.quality.range_words
        if self.tells_max_loss:
            side = "more" if self.choice.broken and self.choice.row.quality.loss.low > most else "no more"
            return f"{queries} tell that it loses {side} than {percent}: the 95% interval is {points}, {words}."
        needed = f" (about {self.num_queries_needed:,})" if self.num_queries_needed else ""
        remedy = f"use more queries{needed}" if self.limits.sure else f"use --sure or more queries{needed}"
        return f"{queries} cannot tell {percent}: the 95% interval is {points}, {words}; {remedy}."

    @property
    def _position(self) -> dict[str, Any]:
        one = self.report
        change = one.first_stage.change[HEADLINE] if one.first_stage.change is not None else None
        lead = -change.mean if change is not None else 0.0
        position = "above" if lead > 0 else "below" if lead < 0 else "level"
        return {"position": position, "significant": change is not None and change.significant}

    @property
    def _first_stage_told(self) -> str:
        one, position = self.report, self._position["position"]
        means = f"{HEADLINE} {one.reference.headline:.3f} against {one.first_stage.headline:.3f}"
        where = "level with" if position == "level" else position
        told = f"The reference {self._reference} lies {where} the first stage {one.first_stage_name} ({means})"
        if not self._position["significant"]:
            told += ", by less than these queries can tell" if position != "level" else ""
        if position == "below":
            told += "; losses against it say little: is this the right checkpoint and instruction for these passages?"
        return told if position == "below" else f"{told}."
