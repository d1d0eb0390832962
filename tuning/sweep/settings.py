"""The grid of a sweep: a stored ratio, a codec, and how stored states are read, at one ratio or in stages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from cache.codecs import Codec
from cache.errors import CodecError
from preread.types import Stage, format_stages, parse_stages
from tuning import EvaluationError
from tuning.report import COARSEST, MeasuringSettings, doublings

_COARSEST_STORED = 8  # of the default stored ratios: coarser ones hardly save any more bytes
_FEW_SAMPLES = ("fallback", "refuse")


@dataclass(frozen=True, slots=True)
class Unit:
    """States stored at one ratio in one codec and read at one ratio: margins are computed per unit."""

    stored_ratio: int
    codec: str
    read_ratio: int


@dataclass(frozen=True, slots=True)
class Configuration:
    """One row of the report. `stages` has one entry where every candidate is read at one ratio."""

    stored_ratio: int
    codec: str
    stages: tuple[Stage, ...]

    @property
    def is_cascade(self) -> bool:
        return len(self.stages) > 1

    @property
    def reading(self) -> str:
        """`8`, or `32:20,4` for a cascade: the value of --read-ratio or --stages."""
        return format_stages(self.stages)

    @property
    def name(self) -> str:
        """For people: `4 SQ8 read 8`."""
        return f"{self.stored_ratio} {self.codec} read {self.reading}"

    @property
    def file_stem(self) -> str:
        """The stem of its run file: `r4-SQ8-read8`."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", f"r{self.stored_ratio}-{self.codec}-read{self.reading}")

    def units(self) -> list[Unit]:
        """The margins it needs, by stage."""
        return [Unit(self.stored_ratio, self.codec, stage.compression_ratio) for stage in self.stages]


def units_of(configurations: Iterable[Configuration]) -> list[Unit]:
    """Each unit once, so that those of one stored ratio and codec follow one another."""
    found = {unit for one in configurations for unit in one.units()}
    codecs = {codec: place for place, codec in enumerate(dict.fromkeys(one.codec for one in configurations))}
    return sorted(found, key=lambda unit: (unit.stored_ratio, codecs[unit.codec], unit.read_ratio))


@dataclass(frozen=True, kw_only=True)
class SweepSettings(MeasuringSettings):
    """
    stored_ratios, codecs, read_ratios, cascades: the grid; None stands for a default by checkpoint
    overlap_k: how many of the top are compared with the reference's
    few_samples: a codec with too few states to train on is replaced by the default (`fallback`), or the sweep ends
    timed_queries, rounds: how many queries are timed, how often each; 0 queries: nothing is timed
    """

    stored_ratios: tuple[int, ...] | None = None
    codecs: tuple[str, ...] | None = None
    read_ratios: tuple[int, ...] | None = None
    cascades: tuple[tuple[Stage, ...], ...] | None = None
    overlap_k: int = field(default=10, metadata={"least": 1})
    few_samples: str = "fallback"
    timed_queries: int = field(default=20, metadata={"least": 0})
    rounds: int = field(default=3, metadata={"least": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codecs is not None and (not self.codecs or len(set(self.codecs)) != len(self.codecs)):
            raise EvaluationError(f"codecs is {self.codecs}; expected at least one, each once")
        if self.few_samples not in _FEW_SAMPLES:
            raise EvaluationError(f"few_samples is {self.few_samples!r}; expected {' or '.join(_FEW_SAMPLES)}")

    def resolved(self, source_ratio: int, dim: int) -> SweepSettings:
        """The same with the defaults that None stands for, for states that come at `source_ratio`.

        Raises:
            EvaluationError: a stored ratio that the states cannot give, a read ratio that no stored one can.
            CodecError: a codec that FAISS does not know, or that does not fit `dim`.
        """
        stored = self.stored_ratios or doublings(source_ratio, _COARSEST_STORED)
        for ratio in stored:
            if ratio % source_ratio:
                raise EvaluationError(
                    f"stored ratio is {ratio}; the states are at {source_ratio}, expected a multiple of it"
                )
        read = self.read_ratios or doublings(min(stored), COARSEST)
        for ratio in read:
            if all(ratio % one for one in stored):
                raise EvaluationError(
                    f"read ratio is {ratio}; no stored ratio of {', '.join(map(str, sorted(stored)))} can give it"
                )
        for stages in self.cascades or ():
            if not any(_can_give(one, stages) for one in stored):
                shown = format_stages(stages)
                raise EvaluationError(f"cascade is {shown}; no stored ratio of {stored} can give all its ratios")
        cascades = self.cascades if self.cascades is not None else _default_cascades(self.top_k)
        codecs = self.codecs or _default_codecs(dim)
        for codec in codecs:
            Codec(codec, dim)
        return replace(self, stored_ratios=stored, read_ratios=read, cascades=cascades, codecs=codecs)

    def grid(self) -> list[Configuration]:
        """Every combination that can be, of resolved settings: a read ratio is a multiple of the stored one."""
        readings = [(Stage(ratio),) for ratio in sorted(self.read_ratios or ())] + list(self.cascades or ())
        return [
            Configuration(stored, codec, stages)
            for stored in sorted(self.stored_ratios or ())
            for codec in self.codecs or ()
            for stages in readings
            if _can_give(stored, stages)
        ]


def _can_give(stored: int, stages: Sequence[Stage]) -> bool:
    return all(stage.compression_ratio % stored == 0 for stage in stages)


def _default_cascades(top_k: int) -> tuple[tuple[Stage, ...], ...]:
    """A few shapes, the counts as shares of the candidates; of 100, the first is the one KaLM-Reranker-V1 published."""
    most, some, few = top_k // 2, 2 * top_k // 5, top_k // 5
    if few < 1:
        return ()
    return tuple(map(parse_stages, (f"32:{few},2", f"32:{some},4", f"16:{few},1", f"32:{most},8:{few},1")))


def _default_codecs(dim: int) -> tuple[str, ...]:
    """From exact to an eighth of a byte per number, where `dim` can be cut so."""
    codecs = ["Flat", "SQfp16", "SQ8", "B32,SQ4"]
    for share in (4, 8):
        try:
            Codec(f"PQ{dim // share}", dim)
        except CodecError:
            continue
        codecs.append(f"PQ{dim // share}")
    return tuple(codecs)
