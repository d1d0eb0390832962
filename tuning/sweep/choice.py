"""The Pareto fronts, and the one configuration that keeps given limits. Pure functions of quality and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuning.errors import EvaluationError

if TYPE_CHECKING:
    from tuning.sweep.result import Row

PREFERENCES = ("bytes", "latency", "quality")


@dataclass(frozen=True)
class Limits:
    """None: no such limit.

    max_loss: share of the reference's nDCG@10 that may be lost
    sure: the worse end of the loss's 95% interval keeps the limit, not only its mean
    max_bytes: of a passage, in the mean
    max_latency_seconds: p99 of a rerank
    prefer: what decides among those that keep all limits; None: bytes where a loss is allowed, else quality
    """

    max_loss: float | None = None
    sure: bool = False
    max_bytes: float | None = None
    max_latency_seconds: float | None = None
    prefer: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_loss", "max_bytes", "max_latency_seconds"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise EvaluationError(f"{name} is {value}; expected at least 0")
        if self.prefer is not None and self.prefer not in PREFERENCES:
            raise EvaluationError(f"prefer is {self.prefer!r}; expected {', '.join(PREFERENCES)}")

    @property
    def given(self) -> bool:
        return any(one is not None for one in (self.max_loss, self.max_bytes, self.max_latency_seconds))

    @property
    def decides_by(self) -> str:
        """What decides among those that keep every limit."""
        return self.prefer or ("bytes" if self.max_loss is not None else "quality")

    def excess(self, row: Row) -> dict[str, float]:
        """By limit that `row` breaks, how far: the value over the limit, less 1; for a loss in points of a percent."""
        broken = {}
        if self.max_loss is not None:
            loss = row.quality.loss_bounds[1] if self.sure else row.quality.loss
            if loss > self.max_loss:
                broken["max_loss"] = (loss - self.max_loss) * 100
        if self.max_bytes is not None and row.size.bytes_per_passage > self.max_bytes:
            broken["max_bytes"] = row.size.bytes_per_passage / max(self.max_bytes, 1e-9) - 1
        if self.max_latency_seconds is not None:
            assert row.timing is not None  # tune() refuses such a limit where nothing is timed
            if row.timing.p99_seconds > self.max_latency_seconds:
                broken["max_latency"] = row.timing.p99_seconds / max(self.max_latency_seconds, 1e-9) - 1
        return broken


@dataclass(frozen=True)
class Choice:
    """`row` keeps all limits, or is the nearest to doing so and `broken` says which it does not."""

    row: Row
    broken: dict[str, float]


def choose(rows: Sequence[Row], limits: Limits) -> Choice:
    """Among those that keep every limit the preferred one; otherwise the one whose worst excess is least.

    Raises:
        EvaluationError: there is no configuration at all.
    """
    if not rows:
        raise EvaluationError("no configuration could be measured; the notes say why")

    def rank(row: Row) -> tuple[float, ...]:
        keys = {
            "bytes": row.size.bytes_per_passage,
            "latency": row.timing.p50_seconds if row.timing is not None else 0.0,
            "quality": -row.quality.headline,
        }
        return (keys.pop(limits.decides_by), keys.get("quality", 0.0), *keys.values())

    broken = [(row, limits.excess(row)) for row in rows]
    kept = [row for row, excess in broken if not excess]
    if kept:
        return Choice(min(kept, key=rank), {})
    row, excess = min(broken, key=lambda one: (max(one[1].values()), rank(one[0])))
    return Choice(row, excess)


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, quality) points no other beats: none is as cheap and better, or cheaper and as good.

    Of equal points the first is on it.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    on = [False] * len(points)
    best = float("-inf")
    for i in order:
        if points[i][1] > best:
            on[i], best = True, points[i][1]
    return on
