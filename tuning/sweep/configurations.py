"""What is swept: a stored ratio, a codec, and how the stored states are read, at one ratio or in stages.

Pure values. Does not know states, margins or costs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tuning.errors import EvaluationError

_STAGE = re.compile(r"(?P<ratio>[1-9]\d{0,8})(?::(?P<keep>[1-9]\d{0,8}))?")


@dataclass(frozen=True, slots=True)
class Stage:
    """Read what came this far at `ratio`; the best `keep` go on to the next stage. None: nothing follows."""

    ratio: int
    keep: int | None = None

    def __str__(self) -> str:
        return f"{self.ratio}:{self.keep}" if self.keep is not None else str(self.ratio)


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
        return ",".join(map(str, self.stages))

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
        return [Unit(self.stored_ratio, self.codec, stage.ratio) for stage in self.stages]


def parse_stages(text: str) -> tuple[Stage, ...]:
    """`32:100,4:20,1:5` -> stages: read ratio, and how many go on. The last count may be left out.

    Raises:
        EvaluationError: another form, a ratio that is not finer than the one before, or a count that grows.
    """
    stages = []
    for part in text.split(","):
        match = _STAGE.fullmatch(part.strip())
        if match is None:
            raise EvaluationError(f"stages is {text!r}; expected RATIO:HOW-MANY-GO-ON,... such as 32:100,4:20,1:5")
        stages.append(Stage(int(match["ratio"]), int(match["keep"]) if match["keep"] else None))
    for before, after in pairwise(stages):
        if before.keep is None:
            raise EvaluationError(
                f"stages is {text!r}; expected after {before.ratio} how many go on, as in 32:100,4:20"
            )
        if after.ratio >= before.ratio:
            raise EvaluationError(f"stages is {text!r}; expected ratios that fall: {after.ratio} after {before.ratio}")
        if after.keep is not None and after.keep > before.keep:
            raise EvaluationError(f"stages is {text!r}; expected fewer to go on: {after.keep} after {before.keep}")
    return tuple(stages)


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
        if all(stage.ratio % stored == 0 for stage in stages)
    ]


def units_of(configurations: Iterable[Configuration]) -> list[Unit]:
    """Each unit once, so that those of one stored ratio and codec follow one another."""
    found = {unit for one in configurations for unit in one.units()}
    codecs = {codec: place for place, codec in enumerate(dict.fromkeys(one.codec for one in configurations))}
    return sorted(found, key=lambda unit: (unit.stored_ratio, codecs[unit.codec], unit.read_ratio))
