"""Checks of a request, and its plan: the ratio, or the stages of a cascade, that its candidates are scored at. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from decoder_server.config import DecoderConfig
from preread.errors import InvalidRequest, Path
from preread.values import MAX_NUMBER, MAX_QUERIES, RerankRequest, Stage, stages_problem
from preread_edge.access import MAX_NAME_CHARS

TEXT_RATIO = 0  # of a model that reads text
MAX_RATIO = 32  # the coarsest that models are trained for


@dataclass(frozen=True, slots=True)
class Plan:
    """At least one stage. Without `cascade` there is exactly one, and every candidate is scored in it, or none."""

    stages: tuple[Stage, ...]
    cascade: bool = False

    @property
    def base_ratio(self) -> int:
        """The ratio that states are fetched at: every stage's is a multiple of it."""
        return math.gcd(*(stage.compression_ratio for stage in self.stages))

    @property
    def summary(self) -> tuple[int, tuple[Stage, ...]]:
        """The one ratio and no stages; or 0 and those of a cascade."""
        return (0, self.stages) if self.cascade else (self.stages[0].compression_ratio, ())

    def reads(self, num_candidates: int, num_queries: int = 1) -> list[tuple[int, int]]:
        """Per stage, how many candidates it scores at most, each as often as queries do, and its ratio."""
        counts = accumulate((stage.keep for stage in self.stages[:-1]), min, initial=num_candidates)
        stages = zip(counts, self.stages, strict=True)
        return [(count * num_queries, stage.compression_ratio) for count, stage in stages]

    def coarser(self) -> "list[Plan]":
        """This plan, then coarser ones: a cascade without its last stages, then ratios doubled up to MAX_RATIO."""
        plans = [Plan(self.stages[:n], self.cascade) for n in range(len(self.stages), 0, -1)]
        ratio = self.stages[0].compression_ratio
        while 0 < 2 * ratio <= MAX_RATIO:
            ratio *= 2
            plans.append(Plan((Stage(ratio),), self.cascade))
        return plans


def fitted(stages: Sequence[Stage], stored_ratio: int) -> tuple[Stage, ...]:
    """Stages as a collection can give them: each at the next multiple of its ratio, of equal ones the later one."""
    by_ratio: dict[int, Stage] = {}
    for stage in stages:
        ratio = min(math.ceil(stage.compression_ratio / stored_ratio), MAX_NUMBER // stored_ratio) * stored_ratio
        by_ratio[ratio] = Stage(ratio, stage.keep)
    return tuple(by_ratio.values())


def plan(request: RerankRequest, limits: DecoderConfig, stored_ratio: int | None, model_ratio: int) -> Plan:
    """The ratio or stages of a request, else the server's; raises InvalidRequest.

    A request's one ratio is a demand, and rejected where the collection cannot give it. All else is a plan over
    whatever is stored, and `fitted`.

    `stored_ratio` is the collection's; None: there is none, only texts that come with the request. `model_ratio` is the
    model's default for such texts; TEXT_RATIO: it reads text.
    """
    if model_ratio == TEXT_RATIO:
        if num_stages := len(request.stages):
            raise InvalidRequest("stages", f"{num_stages} of them", "none: this model reads text, at no ratio")
        return Plan((Stage(TEXT_RATIO),))
    stored = stored_ratio or 1
    if ratio := request.compression_ratio:
        if ratio % stored:
            expected = f"a multiple of {stored}, the ratio that collection {request.collection!r} is stored at"
            raise InvalidRequest("compression_ratio", ratio, expected)
        return Plan((Stage(ratio),))
    if stages := fitted(request.stages or limits.stages, stored):
        return Plan((Stage(stages[-1].compression_ratio),)) if request.one_ratio else Plan(stages, cascade=True)
    if limits.read_ratio:
        return Plan(fitted((Stage(limits.read_ratio),), stored))
    return Plan((Stage(stored_ratio or model_ratio),))


def check(request: RerankRequest, limits: DecoderConfig, queries: Sequence[str] | None = None) -> None:
    """Checks everything that needs neither tokenizer nor store; InvalidRequest for the first field out of range.

    `queries` are those of a call of many, in place of the request's own.
    """
    asked: dict[str | Path, str] = {"query": request.query}
    if queries is not None:
        if not 1 <= len(queries) <= MAX_QUERIES:
            raise InvalidRequest("queries", f"{len(queries)} of them", f"1..{MAX_QUERIES}")
        if request.query:
            raise InvalidRequest("request.query", request.query[:100], "none: queries has them")
        asked = {("queries", i): query for i, query in enumerate(queries)}
    for field, query in asked.items():
        if not query:
            raise InvalidRequest(field, "", "a query that is not empty")
    most = limits.max_query_bytes
    for field, text in (asked | {"instruction": request.instruction or ""}).items():
        # A character is at most four bytes: most texts need no encoding to be known short.
        if len(text) * 4 > most and len(text.encode()) > most:
            raise InvalidRequest(field, f"{len(text.encode())} bytes long", f"at most {most} bytes")
    if request.collection is not None and len(request.collection) > MAX_NAME_CHARS:
        raise InvalidRequest("collection", request.collection[:MAX_NAME_CHARS], "the name of a collection or alias")
    num_candidates = len(request.candidates)
    if not 1 <= num_candidates <= limits.max_candidates:
        raise InvalidRequest("candidates", f"{num_candidates} of them", f"1..{limits.max_candidates}")
    if request.top_n < 0:
        raise InvalidRequest("top_n", request.top_n, "0 (all) or more")
    ratio = request.compression_ratio
    if ratio is not None and ratio < 1:
        raise InvalidRequest("compression_ratio", ratio, "0 (the stored ratio) or more")
    if request.stages and ratio:
        raise InvalidRequest("compression_ratio", ratio, "0: compression_ratio and stages are mutually exclusive")
    if request.stages and (problem := stages_problem(request.stages)):
        raise InvalidRequest(*problem)
    for i, candidate in enumerate(request.candidates):
        if candidate.problem or candidate.text is not None:
            continue
        if candidate.passage_id is None:
            raise InvalidRequest(("candidates", i), "empty", "a passage_id, a text, or both")
        if request.collection is None:
            raise InvalidRequest("collection", "", f"one: the candidate at index {i} has an id and no text")
