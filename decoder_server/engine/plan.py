"""What a request is read at: one ratio for all its candidates, or stages. Pure; knows no store and no queue.

A request says so itself, or the server has a default. A default that a collection cannot give, because
it is stored coarser, moves to the next ratio that it can; the answer says which ratio was read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from decoder_server.errors import InvalidRequest
from decoder_server.request import RerankRequest
from preread.types import Stage

TEXT_RATIO = 0  # what a model that reads text reads at


@dataclass(frozen=True, slots=True)
class Plan:
    """At least one stage. Without `cascade` there is exactly one, and it answers for every candidate or not at all."""

    stages: tuple[Stage, ...]
    cascade: bool = False

    @property
    def base_ratio(self) -> int:
        """What states are fetched at: every stage's ratio is a multiple of it."""
        return math.gcd(*(stage.compression_ratio for stage in self.stages))

    @property
    def first(self) -> Stage:
        return self.stages[0]

    def reads(self, num_candidates: int) -> list[tuple[int, int]]:
        """Per stage, how many passages it reads at most, and at which ratio."""
        counts = [num_candidates]
        for stage in self.stages[:-1]:
            counts.append(min(counts[-1], stage.keep))
        return [(count, stage.compression_ratio) for count, stage in zip(counts, self.stages, strict=True)]


def plain(ratio: int) -> Plan:
    return Plan((Stage(ratio),))


@dataclass(frozen=True, slots=True)
class Defaults:
    """What is read when a request does not say: stages where there are any, else a ratio, else the stored one."""

    compression_ratio: int | None = None
    stages: tuple[Stage, ...] = ()


def plan(request: RerankRequest, defaults: Defaults, stored_ratio: int | None, model_ratio: int) -> Plan:
    """
    Args:
        stored_ratio: the collection's; None: there is none, only texts that come with the request.
        model_ratio: what the model reads such texts at, where nobody says.

    Raises:
        InvalidRequest: a ratio that the collection cannot give.
    """
    stored = stored_ratio or 1
    if request.stages:
        for i, stage in enumerate(request.stages):
            _check(f"stages[{i}].compression_ratio", stage.compression_ratio, stored, request.collection)
        return Plan(request.stages, cascade=True)
    if request.compression_ratio:
        _check("compression_ratio", request.compression_ratio, stored, request.collection)
        return plain(request.compression_ratio)
    if defaults.stages:
        stages = _fitted(defaults.stages, stored)
        return plain(stages[-1].compression_ratio) if request.one_ratio else Plan(stages, cascade=True)
    if defaults.compression_ratio:
        return plain(_next_multiple(defaults.compression_ratio, stored))
    return plain(stored_ratio or model_ratio)


def text_plan(request: RerankRequest) -> Plan:
    """For a model that reads text: it takes the same requests and has no ratio, but cannot read in stages.

    Raises:
        InvalidRequest: the request has stages.
    """
    if request.stages:
        raise InvalidRequest("stages", f"{len(request.stages)} of them", "none: this model reads text, at no ratio")
    return plain(TEXT_RATIO)


def _check(field: str, ratio: int, stored: int, collection: str | None) -> None:
    if ratio % stored:
        expected = f"a multiple of {stored}, the ratio that collection {collection!r} is stored at"
        raise InvalidRequest(field, ratio, expected)


def _next_multiple(ratio: int, stored: int) -> int:
    return -(-ratio // stored) * stored


def _fitted(stages: Sequence[Stage], stored: int) -> tuple[Stage, ...]:
    """Stages at ratios the collection can give; two that fall together become one, which keeps what the later keeps."""
    fitted: list[Stage] = []
    for stage in stages:
        at = replace(stage, compression_ratio=_next_multiple(stage.compression_ratio, stored))
        if fitted and fitted[-1].compression_ratio == at.compression_ratio:
            fitted[-1] = at
        else:
            fitted.append(at)
    return tuple(fitted)
