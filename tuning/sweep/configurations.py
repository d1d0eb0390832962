"""What is swept: a stored ratio, a codec, and how the stored states are read, at one ratio or in stages.

Pure values. Does not know states, margins or costs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from preread.client.stages import Stage, format_stages


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
