"""What a request is read at: one ratio for all its candidates, or stages. Pure; knows no store and no queue.

A request says so itself, or the server has a default. A default that a collection cannot give, because
it is stored coarser, moves to the next ratio that it can; the answer says which ratio was read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from decoder_server.config import DecoderConfig
from preread.errors import InvalidRequest, Path
from preread.types import Candidate, RerankRequest, Stage, stages_problem

MAX_NAME_CHARS = 128  # as cache.names has it; a longer one is not even looked up
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
            _check(("stages", i, "compression_ratio"), stage.compression_ratio, stored, request.collection)
        return Plan(request.stages, cascade=True)
    if request.compression_ratio:
        _check(("compression_ratio",), request.compression_ratio, stored, request.collection)
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


def _check(field: Path, ratio: int, stored: int, collection: str | None) -> None:
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


@dataclass(frozen=True, slots=True)
class Indexed:
    """A candidate and its position in the request."""

    index: int
    passage_id: str | None
    text: str | None
    problem: str = ""


def indexed(candidates: Sequence[Candidate]) -> list[Indexed]:
    return [Indexed(i, one.passage_id, one.text, one.problem) for i, one in enumerate(candidates)]


def distinct(candidates: Sequence[Candidate]) -> dict[Indexed, list[int]]:
    """The first candidate of each kind, and the indexes of all of that kind.

    A passage that a request names twice is scored once, which also makes it a tie to the last bit.
    """
    groups: dict[Candidate, list[Indexed]] = {}
    for one in indexed(candidates):
        groups.setdefault(candidates[one.index], []).append(one)
    return {same[0]: [one.index for one in same] for same in groups.values()}


def check(request: RerankRequest, limits: DecoderConfig) -> None:
    """Checks what can be checked without tokenizer and store.

    Raises:
        InvalidRequest: the first field that is out of range.
    """
    if not request.query:
        raise InvalidRequest("query", "", "a query that is not empty")
    _check_bytes("query", request.query, limits.max_query_bytes)
    _check_bytes("instruction", request.instruction or "", limits.max_query_bytes)
    if request.collection is not None and len(request.collection) > MAX_NAME_CHARS:
        raise InvalidRequest("collection", request.collection[:MAX_NAME_CHARS], "the name of a collection or alias")
    num_candidates = len(request.candidates)
    if not 1 <= num_candidates <= limits.max_candidates:
        raise InvalidRequest("candidates", f"{num_candidates} of them", f"1..{limits.max_candidates}")
    if request.top_n < 0:
        raise InvalidRequest("top_n", request.top_n, "0 (all) or more")
    if request.compression_ratio is not None and request.compression_ratio < 1:
        raise InvalidRequest("compression_ratio", request.compression_ratio, "0 (the stored ratio) or more")
    _check_stages(request)
    for index, candidate in enumerate(request.candidates):
        if candidate.problem:
            continue
        if candidate.passage_id is None and candidate.text is None:
            raise InvalidRequest(("candidates", index), "empty", "a passage_id, a text, or both")
        if request.collection is None and candidate.text is None:
            expected = f"the collection that holds candidates[{index}], which has an id and no text"
            raise InvalidRequest("collection", "", expected)


def _check_stages(request: RerankRequest) -> None:
    if not request.stages:
        return
    if request.compression_ratio:
        expected = "0: compression_ratio and stages are mutually exclusive"
        raise InvalidRequest("compression_ratio", request.compression_ratio, expected)
    problem = stages_problem(request.stages)
    if problem is not None:
        raise InvalidRequest(*problem)


def _check_bytes(field: str, text: str, limit: int) -> None:
    # A character is at most four bytes: most texts need no encoding to be known short.
    if len(text) * 4 > limit and len(text.encode()) > limit:
        raise InvalidRequest(field, f"{len(text.encode())} bytes long", f"at most {limit} bytes")
