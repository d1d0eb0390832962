"""The grid of a sweep: a stored ratio, a codec, and how stored states are read, at one ratio or in stages."""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.errors import CodecError
from decoder_server.engine.plan import Plan
from preread.values import Stage, format_stages, parse_stages
from tuning import EvaluationError
from tuning.config import COARSEST, SweepSettings, doublings
from tuning.trec import order, rank

_COARSEST_STORED = 8  # of the default stored ratios: coarser ones hardly save any more bytes


@dataclass(frozen=True, slots=True)
class Reading:
    """How stored states are read: every candidate at one ratio, or in the stages of a cascade."""

    stages: tuple[Stage, ...]

    def __str__(self) -> str:
        """`8`, or `32:20,4` for a cascade: the value of --read-ratio or --stages."""
        return format_stages(self.stages)

    @property
    def is_cascade(self) -> bool:
        return len(self.stages) > 1

    @property
    def ratios(self) -> list[int]:
        return [stage.compression_ratio for stage in self.stages]

    def can_be_of(self, stored_ratio: int) -> bool:
        return all(ratio % stored_ratio == 0 for ratio in self.ratios)

    def num_read(self, num_candidates: int) -> list[int]:
        return [count for count, _ in Plan(self.stages, cascade=self.is_cascade).reads(num_candidates)]

    def order(self, margins: Sequence[NDArray[np.floating]]) -> NDArray[np.intp]:
        """Rows, best first; those that reached a later stage rank first. `margins`: (num_candidates,) per stage."""
        rows = order(margins[0])
        for before, own in zip(self.stages, margins[1:], strict=False):
            going = np.sort(rows[: before.keep])  # in candidate order, so that equal margins stay in it
            rows = np.concatenate([going[order(own[going])], rows[before.keep :]])
        return rows

    def ranking(self, candidates: Sequence[str], margins: Sequence[NDArray[np.floating]]) -> list[tuple[str, float]]:
        """A run's entry for one query. Margins of stages do not compare, so a cascade's scores count down to 1."""
        if not self.is_cascade:
            return rank(candidates, margins[0])
        rows = self.order(margins).tolist()
        return [(candidates[row], float(len(rows) - place)) for place, row in enumerate(rows)]


@dataclass(frozen=True, slots=True)
class Configuration:
    """One row of the report."""

    stored_ratio: int
    codec: str
    reading: Reading

    @property
    def name(self) -> str:
        """For people: `4 SQ8 read 8`."""
        return f"{self.stored_ratio} {self.codec} read {self.reading}"

    @property
    def file_stem(self) -> str:
        """The stem of its run file: `r4-SQ8-read8`."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", f"r{self.stored_ratio}-{self.codec}-read{self.reading}")

    @property
    def stored_as(self) -> tuple[int, str]:
        return self.stored_ratio, self.codec

    def units(self) -> list[Self]:
        """By stage, the configuration that reads at that ratio alone: margins are computed for each of these."""
        return [replace(self, reading=Reading((Stage(ratio),))) for ratio in self.reading.ratios]


def units_of(configurations: Iterable[Configuration]) -> list[Configuration]:
    """Each unit once, so that those of one stored ratio and codec follow one another."""
    found = {unit for one in configurations for unit in one.units()}
    codecs = {codec: place for place, codec in enumerate(dict.fromkeys(one.codec for one in configurations))}
    return sorted(found, key=lambda unit: (unit.stored_ratio, codecs[unit.codec], unit.reading.ratios))


def resolved(settings: SweepSettings, source_ratio: int, dim: int) -> SweepSettings:
    """With defaults for None, of states at `source_ratio`. EvaluationError, CodecError: a ratio, codec is unfit."""
    stored = settings.stored_ratios or doublings(source_ratio, _COARSEST_STORED)
    for ratio in stored:
        if ratio % source_ratio:
            at = f"the states are at {source_ratio}"
            raise EvaluationError(f"stored ratio is {ratio}; {at}, expected a multiple of it")
    read = settings.read_ratios or doublings(min(stored), COARSEST)
    known = ", ".join(map(str, sorted(stored)))
    for ratio in read:
        if all(ratio % one for one in stored):
            raise EvaluationError(f"read ratio is {ratio}; no stored ratio of {known} can give it")
    for reading in map(Reading, settings.cascades or ()):
        if not any(map(reading.can_be_of, stored)):
            raise EvaluationError(f"cascade is {reading}; no stored ratio of {known} can give all its ratios")
    cascades, codecs = settings.cascades, list(settings.codecs or ("Flat", "SQfp16", "SQ8", "B32,SQ4"))
    most, some, few = settings.top_k // 2, 2 * settings.top_k // 5, settings.top_k // 5
    if cascades is None:  # of 100 candidates, the first is the one that KaLM-Reranker-V1 published
        shapes = (f"32:{few},2", f"32:{some},4", f"16:{few},1", f"32:{most},8:{few},1") if few else ()
        cascades = tuple(map(parse_stages, shapes))
    for codec in codecs:
        Codec(codec, dim)
    for share in (4, 8) if settings.codecs is None else ():  # to an eighth of a byte per number, where `dim` can be cut
        with suppress(CodecError):
            codecs.append(Codec(f"PQ{dim // share}", dim).factory)
    return replace(settings, stored_ratios=stored, read_ratios=read, cascades=cascades, codecs=tuple(codecs))


def grid(settings: SweepSettings) -> list[Configuration]:
    """Every combination that can be, of resolved settings: a read ratio is a multiple of the stored one."""
    readings = [Reading((Stage(ratio),)) for ratio in sorted(settings.read_ratios or ())]
    readings += map(Reading, settings.cascades or ())
    return [
        Configuration(stored, codec, reading)
        for stored in sorted(settings.stored_ratios or ())
        for codec in settings.codecs or ()
        for reading in readings
        if reading.can_be_of(stored)
    ]
