"""What is swept: a stored ratio, a codec, and how the stored states are read, at one ratio or in stages.

Pure values. Does not know states, margins or costs.

What a sweep is asked to do; checked once, passed down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cache.codecs import Codec
from cache.errors import CodecError
from preread.types import Stage, format_stages, parse_stages
from tuning import EvaluationError
from tuning.metrics import NUM_RESAMPLES
from tuning.report import COARSEST


@dataclass(frozen=True, slots=True)
class Unit:
    """States stored at one ratio in one codec and read at one ratio: what margins are computed of."""

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
        """A name for its run file: `r4-SQ8-read8`."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", f"r{self.stored_ratio}-{self.codec}-read{self.reading}")

    def units(self) -> list[Unit]:
        """The margins it needs, by stage."""
        return [Unit(self.stored_ratio, self.codec, stage.compression_ratio) for stage in self.stages]


def grid(
    stored_ratios: Sequence[int],
    codecs: Sequence[str],
    read_ratios: Sequence[int],
    cascades: Iterable[tuple[Stage, ...]],
) -> list[Configuration]:
    """Every combination that can be: a read ratio is a multiple of the stored one."""
    readings = [(Stage(ratio),) for ratio in sorted(read_ratios)] + list(cascades)
    return [
        Configuration(stored, codec, stages)
        for stored in sorted(stored_ratios)
        for codec in codecs
        for stages in readings
        if all(stage.compression_ratio % stored == 0 for stage in stages)
    ]


def units_of(configurations: Iterable[Configuration]) -> list[Unit]:
    """Each unit once, so that those of one stored ratio and codec follow one another."""
    found = {unit for one in configurations for unit in one.units()}
    codecs = {codec: place for place, codec in enumerate(dict.fromkeys(one.codec for one in configurations))}
    return sorted(found, key=lambda unit: (unit.stored_ratio, codecs[unit.codec], unit.read_ratio))


COARSEST_STORED = 8  # of the default stored ratios: beyond, only bytes nobody counts are saved

FEW_SAMPLES = ("fallback", "refuse")


@dataclass(frozen=True)
class SweepSettings:
    """
    stored_ratios, codecs, read_ratios, cascades: what is combined; None stands for a default by checkpoint
    top_k: candidates per query
    overlap_k: how many of the top are compared with the reference's
    few_samples: for a codec with too few states to train on the default one stands in (`fallback`), or the sweep ends
    split, instruction, max_queries, min_grade: as in an evaluation
    seed: of the drawn queries, the training samples and the bootstrap
    timed_queries, rounds: how many queries are timed, how often each; 0 queries: nothing is timed

    Raises EvaluationError naming the setting.
    """

    stored_ratios: tuple[int, ...] | None = None
    codecs: tuple[str, ...] | None = None
    read_ratios: tuple[int, ...] | None = None
    cascades: tuple[tuple[Stage, ...], ...] | None = None
    top_k: int = 50
    overlap_k: int = 10
    few_samples: str = "fallback"
    split: bool = False
    instruction: str | None = None
    max_queries: int | None = None
    min_grade: int = 1
    seed: int = 0
    num_resamples: int = NUM_RESAMPLES
    timed_queries: int = 20
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("stored_ratios", "read_ratios"):
            ratios = getattr(self, name)
            if ratios is not None and (not ratios or min(ratios) < 1):
                raise EvaluationError(f"{name} is {ratios}; expected integers of at least 1")
            if ratios is not None and len(set(ratios)) != len(ratios):
                raise EvaluationError(f"{name} is {ratios}; expected each once")
        if self.codecs is not None and (not self.codecs or len(set(self.codecs)) != len(self.codecs)):
            raise EvaluationError(f"codecs is {self.codecs}; expected at least one, each once")
        if self.few_samples not in FEW_SAMPLES:
            raise EvaluationError(f"few_samples is {self.few_samples!r}; expected {' or '.join(FEW_SAMPLES)}")
        leasts = {"top_k": 1, "overlap_k": 1, "max_queries": 1, "min_grade": 1, "num_resamples": 100}
        leasts |= {"timed_queries": 0, "rounds": 1}
        for name, least in leasts.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluationError(f"{name} is {value}; expected at least {least}")

    def resolved(self, source_ratio: int, dim: int) -> SweepSettings:
        """The same with what None stands for, for states that come at `source_ratio`.

        Raises:
            EvaluationError: a stored ratio that the states cannot give, a read ratio that no stored one can.
            CodecError: a codec that FAISS does not know, or that does not fit `dim`.
        """
        stored = self.stored_ratios or tuple(
            source_ratio << i for i in range(max(1, (COARSEST_STORED // source_ratio).bit_length()))
        )
        for ratio in stored:
            if ratio % source_ratio:
                raise EvaluationError(
                    f"stored ratio is {ratio}; the states are at {source_ratio}, expected a multiple of it"
                )
        least = min(stored)
        read = self.read_ratios or tuple(least << i for i in range(max(1, (COARSEST // least).bit_length())))
        for ratio in read:
            if all(ratio % one for one in stored):
                raise EvaluationError(
                    f"read ratio is {ratio}; no stored ratio of {', '.join(map(str, sorted(stored)))} can give it"
                )
        cascades = self.cascades if self.cascades is not None else default_cascades(self.top_k)
        if self.cascades is not None:
            for stages in cascades:
                if not any(all(stage.compression_ratio % one == 0 for stage in stages) for one in stored):
                    shown = format_stages(stages)
                    raise EvaluationError(f"cascade is {shown}; no stored ratio of {stored} can give all its ratios")
        codecs = self.codecs or default_codecs(dim)
        for codec in codecs:
            Codec(codec, dim)
        return replace(self, stored_ratios=stored, read_ratios=read, cascades=cascades, codecs=codecs)

    def grid(self) -> list[Configuration]:
        """Every configuration; of resolved settings."""
        assert self.stored_ratios is not None
        assert self.codecs is not None
        assert self.read_ratios is not None
        assert self.cascades is not None
        return grid(self.stored_ratios, self.codecs, self.read_ratios, self.cascades)


def default_cascades(top_k: int) -> tuple[tuple[Stage, ...], ...]:
    """A few shapes, the counts as shares of the candidates; of 100, the first is the one KaLM-Reranker-V1 published."""
    most, some, few = top_k // 2, 2 * top_k // 5, top_k // 5
    if few < 1:
        return ()
    return tuple(map(parse_stages, (f"32:{few},2", f"32:{some},4", f"16:{few},1", f"32:{most},8:{few},1")))


def default_codecs(dim: int) -> tuple[str, ...]:
    """From exact to an eighth of a byte per number, where `dim` can be cut so."""
    codecs = ["Flat", "SQfp16", "SQ8", "B32,SQ4"]
    for share in (4, 8):
        try:
            Codec(f"PQ{dim // share}", dim)
        except CodecError:
            continue
        codecs.append(f"PQ{dim // share}")
    return tuple(codecs)
