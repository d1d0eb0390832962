"""What a sweep measured: rows, one for each configuration, and Pareto fronts, as values and TREC files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tuning.config import SweepSettings
from tuning.metrics import Quality
from tuning.sweep.costs import IndexingCost, Latency, StoredSize
from tuning.sweep.settings import Configuration
from tuning.trec import Qrels, write_runs


@dataclass(frozen=True)
class SweepRow:
    """One configuration, measured."""

    configuration: Configuration
    quality: Quality
    size: StoredSize
    timing: Latency | None
    indexing: IndexingCost


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, quality) points none beats: as cheap and better, or cheaper and as good; of equal ones the first."""
    on, best = [False] * len(points), float("-inf")
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[i][1] > best:
            on[i], best = True, points[i][1]
    return on


@dataclass(frozen=True)
class SweepReport:
    """Everything that a table, a page and a choice are made of."""

    collection: str
    checkpoint: str
    fingerprint: str
    dtype: str
    device: str
    hardware: dict[str, Any]
    instruction: str
    settings: SweepSettings
    reference_ratio: int  # 1, or the ratio of the stored states
    taught: bool  # the reference's ranking is the judgement
    first_stage_name: str
    num_queries: int
    num_passages: int
    num_candidates: int  # pairs
    mean_tokens: float  # of a passage
    reference_size: StoredSize  # were the reference's states stored as they are
    notes: list[str]
    first_stage: Quality
    reference: Quality
    rows: list[SweepRow]
    qrels: Qrels = field(repr=False)
    queries: dict[str, str] = field(repr=False)
    passages: dict[str, str] = field(repr=False)  # texts of candidates, where there are any

    @property
    def timed(self) -> bool:
        return bool(self.rows) and all(row.timing is not None for row in self.rows)

    @property
    def model(self) -> str:
        """The checkpoint's name without its parent folder; a hub id is one as it is."""
        return Path(self.checkpoint).name if Path(self.checkpoint).is_dir() else self.checkpoint

    @property
    def machine(self) -> str:
        threads = self.hardware["threads"]
        where = self.hardware.get("gpu") if self.device != "cpu" else None
        where = where or f"{self.hardware['processor']}, {threads} thread{'s' * (threads != 1)}"
        return f"{where}, {self.dtype}"

    @property
    def codecs(self) -> list[str]:
        return list(dict.fromkeys(row.configuration.codec for row in self.rows))

    @cached_property
    def marked(self) -> list[tuple[SweepRow, bool, bool]]:
        """Each row, whether it is on the front in bytes, and whether on that in latency: none is where none is timed"""
        smallest = front([(row.size.bytes_per_passage, row.quality.headline) for row in self.rows])
        times = [(row.timing.p50_seconds, row.quality.headline) for row in self.rows if row.timing is not None]
        fastest = front(times) if self.timed else [False] * len(self.rows)
        return list(zip(self.rows, smallest, fastest, strict=True))

    def write_runs(self, folder: Path) -> list[Path]:
        runs = {"first-stage": self.first_stage.run, "reference": self.reference.run}
        return write_runs(folder, self.qrels, runs | {r.configuration.file_stem: r.quality.run for r in self.rows})
