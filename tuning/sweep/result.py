"""What a sweep found, as values and as JSON. How it comes about is tuning.sweep.tune, how it looks table and page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tuning.bootstrap import Difference
from tuning.report import lists_on_one_line, share_json
from tuning.sweep.choice import Choice, Limits, front
from tuning.sweep.configurations import Configuration
from tuning.sweep.quality import Quality
from tuning.sweep.settings import SweepSettings
from tuning.sweep.sizes import Size
from tuning.sweep.timing import Timing
from tuning.trec import Qrels, write_qrels, write_run

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Indexing:
    """One-off cost of the whole collection on this machine, in seconds; None: not measured."""

    encoder_seconds: float | None  # the same for every configuration
    codec_seconds: float | None  # encoding states to codes
    training_seconds: float  # the codec's
    store_seconds: float | None  # writing, codes included

    @property
    def seconds(self) -> float | None:
        """All of it."""
        if self.encoder_seconds is None or self.store_seconds is None:
            return None
        return self.encoder_seconds + self.training_seconds + self.store_seconds


@dataclass(frozen=True)
class Row:
    """One configuration, measured."""

    configuration: Configuration
    quality: Quality
    size: Size
    timing: Timing | None
    indexing: Indexing


@dataclass(frozen=True)
class SweepReport:
    """Everything a table, a page and a choice are made of."""

    collection: str
    checkpoint: str
    fingerprint: str
    dtype: str
    device: str
    hardware: dict[str, Any]
    instruction: str
    settings: SweepSettings
    reference_ratio: int  # 1, or what the stored states came at
    taught: bool  # the reference's own ranking is the judgement
    first_stage_name: str
    num_queries: int
    num_passages: int
    num_candidates: int  # pairs
    mean_tokens: float  # of a passage
    notes: list[str]
    first_stage: Quality
    reference: Quality
    rows: list[Row]
    query_ids: list[str]
    qrels: Qrels = field(repr=False)
    queries: dict[str, str] = field(repr=False)
    passages: dict[str, str] = field(repr=False)  # texts of candidates, where there are any

    @property
    def timed(self) -> bool:
        """Every configuration was."""
        return bool(self.rows) and all(row.timing is not None for row in self.rows)

    @property
    def model(self) -> str:
        """The checkpoint's name without the folder it lies in; a hub id is one as it is."""
        return Path(self.checkpoint).name if Path(self.checkpoint).is_dir() else self.checkpoint

    @property
    def machine(self) -> str:
        """Where times come from, in a few words."""
        threads = self.hardware["threads"]
        where = self.hardware.get("gpu") if self.device != "cpu" else None
        where = where or f"{self.hardware['processor']}, {threads} thread{'s' * (threads != 1)}"
        return f"{where}, {self.dtype}"

    @property
    def codecs(self) -> list[str]:
        """Those that were measured."""
        return list(dict.fromkeys(row.configuration.codec for row in self.rows))

    def on_size_front(self) -> list[bool]:
        return front([(row.size.bytes_per_passage, row.quality.headline) for row in self.rows])

    def on_latency_front(self) -> list[bool]:
        if any(row.timing is None for row in self.rows):
            return [False] * len(self.rows)
        return front([(row.timing.p50_seconds, row.quality.headline) for row in self.rows if row.timing is not None])

    def to_json(self, limits: Limits, choice: Choice | None) -> str:
        """One JSON document; with the same seed only `hardware` and what lies under `timing` and `indexing` differ."""
        small, fast = self.on_size_front(), self.on_latency_front()
        plain = ("collection", "checkpoint", "fingerprint", "dtype", "device", "hardware", "instruction")
        counts = ("num_queries", "num_passages", "num_candidates", "mean_tokens", "reference_ratio", "taught")
        document: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in plain + counts},
            "settings": asdict(self.settings),
            "notes": self.notes,
            "query_ids": self.query_ids,
            "first_stage": {"name": self.first_stage_name, "quality": _quality_json(self.first_stage)},
            "reference": {"quality": _quality_json(self.reference)},
            "limits": asdict(limits),
            "choice": _choice_json(choice) if choice is not None else None,
            "configurations": [
                _row_json(row) | {"on_size_front": on_size, "on_latency_front": on_latency}
                for row, on_size, on_latency in zip(self.rows, small, fast, strict=True)
            ],
        }
        return lists_on_one_line(json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)) + "\n"

    def write_runs(self, folder: Path) -> list[Path]:
        """TREC files: the judgements, and a run for the first stage, the reference and each configuration."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "qrels.txt"]
        write_qrels(paths[0], self.qrels)
        runs = {"first-stage": self.first_stage, "reference": self.reference}
        for name, quality in (runs | {row.configuration.file_stem: row.quality for row in self.rows}).items():
            paths.append(folder / f"{name}.run")
            write_run(paths[-1], quality.run, tag=f"preread-{name}")
        return paths


def _row_json(row: Row) -> dict[str, Any]:
    one = row.configuration
    return {
        "name": one.name,
        "stored_ratio": one.stored_ratio,
        "codec": one.codec,
        "stages": [asdict(stage) for stage in one.stages],
        "quality": _quality_json(row.quality),
        "size": asdict(row.size),
        "timing": asdict(row.timing) if row.timing is not None else None,
        "indexing": asdict(row.indexing),
    }


def _quality_json(quality: Quality) -> dict[str, Any]:
    measures: dict[str, Any] = {}
    for name, interval in quality.measures.items():
        measures[name] = asdict(interval)
        if quality.change is not None and quality.kept is not None:
            measures[name]["change"] = _change_json(quality.change[name])
            measures[name]["kept"] = share_json(quality.kept[name])
    return {
        "measures": measures,
        "per_query": {name: [_number(v) for v in values.tolist()] for name, values in quality.per_query.items()},
    }


def _change_json(change: Difference) -> dict[str, Any]:
    return asdict(change) | {"significant": change.significant}


def _choice_json(choice: Choice) -> dict[str, Any]:
    return {"name": choice.row.configuration.name, "keeps_all_limits": not choice.broken, "broken": choice.broken}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 6) if value == value else None
