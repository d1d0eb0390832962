"""What every dialect asks in the end, and what it hears: a Question, an Answer.

Reads the fields that mean the same everywhere, ours among them; a dialect adds its own. Knows no paths.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from decoder_server.errors import InvalidRequest, Refused
from decoder_server.floor import texts_alone
from decoder_server.http.fields import HALF_A_PAIR, Fields, is_utf8
from decoder_server.request import Candidate, OnMiss, Outcome, RerankRequest, Summary
from preread.client.stages import Stage, format_stages, parse_stages

# Whose values are read one by one; other fields are only looked at where a dialect knows them.
LISTS = ("documents", "texts", "passages", "input", "pairs", "text_1", "text_2", "passage_ids", "stages")
MAX_POSITIONS_SHOWN = 500
_CANDIDATE = re.compile(r"^candidates\b(?:\[(\d+)\])?")

ON_MISS = tuple(on_miss.value for on_miss in OnMiss)


@dataclass(frozen=True, slots=True)
class Question:
    """A request for the engine, and what the edge itself has to do about it."""

    request: RerankRequest
    candidates_field: str = "documents"  # what this dialect calls the candidates
    max_tokens_per_doc: int | None = None  # inline texts are cut there
    keep_end: bool = False  # inline texts over the model's limit lose their beginning
    refuse_truncated: bool = False  # rather an error than a score of part of a text
    return_margins: bool = False
    positions: tuple[int, ...] = ()  # of the candidates among the caller's; empty: as they are here

    @property
    def texts_alone(self) -> bool:
        """No candidate has an id: each gets a score, or the request fails."""
        return texts_alone(self.request.candidates)

    def position(self, index: int) -> int:
        """Where the caller put a candidate."""
        return self.positions[index] if self.positions else index

    def where(self, index: int) -> str:
        """The caller's name of a candidate."""
        return f"{self.candidates_field}[{self.position(index)}]"

    def renamed(self, error: InvalidRequest | Refused) -> InvalidRequest | Refused:
        """The engine speaks of candidates; a dialect has its own word."""

        def own(text: str) -> str:
            return _CANDIDATE.sub(lambda m: self.where(int(m[1])) if m[1] else self.candidates_field, text, count=1)

        if isinstance(error, Refused):
            return Refused(error.reason, own(error.subject), own(str(error)))
        return InvalidRequest(own(error.field), error.value, error.expected)

    def replace(self, **changes: Any) -> Question:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Answer:
    """The engine's answer: scored outcomes best first, at most top_n; the others in request order."""

    question: Question
    scored: list[Outcome]
    unscored: list[Outcome]
    summary: Summary
    request_id: str
    cut: tuple[int, ...] = ()  # indexes of the candidates that were read in part, those beyond top_n too
    empty: tuple[int, ...] = ()  # of those that have the floor of all scores

    @property
    def num_tokens(self) -> int:
        """What was read for it: the query once per candidate, and passages in whole states."""
        return self.summary.num_scored * self.summary.num_query_tokens + self.summary.num_passage_tokens

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.num_tokens, "total_tokens": self.num_tokens}

    def warnings(self) -> list[str]:
        """One line per candidate that is not in the ranking, is there without being read, or was read in part."""
        where = self.question.where
        lines = [f"{where(o.index)} was not scored ({o.status.value}): {o.message}" for o in self.unscored]
        lines += [f"{where(index)} is empty: it has the lowest score of all and was not read" for index in self.empty]
        lines += [f"{where(index)} was cut: its score is that of a part" for index in self.cut]
        if self.summary.stopped_early:
            lines = ["the deadline came before the last stage was through", *lines]
        if self.summary.degraded is not None:
            lines = [f"read at {self.read} in place of {self.asked} ({self.summary.degraded.reason})", *lines]
        return ["the query was truncated", *lines] if self.summary.query_truncated else lines

    @property
    def read(self) -> str:
        """The ratio that was read, or the stages; "" for a model that reads text."""
        return _read(self.summary.compression_ratio, self.summary.stages)

    @property
    def asked(self) -> str:
        """What would have been read, had the server not been under pressure."""
        degraded = self.summary.degraded
        return self.read if degraded is None else _read(degraded.compression_ratio, degraded.stages)

    def headers(self) -> dict[str, str]:
        """What dialects have no field for."""
        headers = {"x-preread-read": self.read} if self.read else {}
        if self.summary.degraded is not None:
            headers |= {"x-preread-degraded": self.summary.degraded.reason, "x-preread-asked": self.asked}
        return headers | ({"x-preread-stopped-early": "true"} if self.summary.stopped_early else {})

    def results(self, score_name: str) -> list[dict[str, Any]]:
        """`index` and the score under its name; `id` where there is one, `margin` and more where it was asked for."""
        results: list[dict[str, Any]] = []
        for outcome in self.scored:
            result: dict[str, Any] = {"index": outcome.index, score_name: outcome.score}
            if outcome.passage_id:
                result["id"] = outcome.passage_id
            if self.question.return_margins:
                result |= _details(outcome, cut=outcome.index in self.cut)
            results.append(result)
        return results


def shown(positions: Iterable[int]) -> str:
    """A header's list of positions; the first of very many, since a header has to fit."""
    every = sorted(positions)
    return ",".join([*map(str, every[:MAX_POSITIONS_SHOWN]), *(["..."] if len(every) > MAX_POSITIONS_SHOWN else [])])


def _details(outcome: Outcome, *, cut: bool) -> dict[str, Any]:
    """With return_margins: the margin, and what was read for it."""
    details: dict[str, Any] = {"margin": outcome.margin}
    if cut:
        details["truncated"] = True
    if outcome.compression_ratio:
        details["compression_ratio"] = outcome.compression_ratio
    if outcome.stages:
        details["stages"] = [dataclasses.asdict(stage) for stage in outcome.stages]
    return details


def _read(ratio: int, stages: Sequence[Stage]) -> str:
    return format_stages(stages) if stages else str(ratio or "")


Ask = Callable[[Question], Awaitable[Answer]]


def question(
    body: Fields, candidates_field: str, *, top: str = "top_n", return_text: str = "return_documents"
) -> Question:
    """The fields all dialects share.

    Args:
        top, return_text: what this dialect calls them.

    Raises:
        InvalidRequest: the first field that cannot be read.
    """
    on_miss = body.word("on_miss", ON_MISS)
    request = RerankRequest(
        query=body.needed_text("query"),
        candidates=candidates(body, candidates_field),
        instruction=body.text("instruction"),
        collection=body.text("collection") or None,
        top_n=body.count(top) or 0,
        compression_ratio=body.count("compression_ratio") or None,
        on_miss=OnMiss(on_miss) if on_miss is not None else None,
        return_text=body.flag(return_text) or False,
        model=body.text("model") or "",
        stages=_stages(body),
    )
    return Question(
        request,
        candidates_field,
        max_tokens_per_doc=body.count("max_tokens_per_doc") or None,
        return_margins=body.flag("return_margins") or False,
    )


def check_counts(body: Fields, limit: int) -> None:
    """Before any of them is read.

    Raises:
        InvalidRequest: a list longer than any request's.
    """
    for name in LISTS:
        value = body.get(name)
        if isinstance(value, list) and len(value) > limit:
            raise InvalidRequest(name, f"{len(value)} of them", f"1..{limit}")


def _stages(body: Fields) -> tuple[Stage, ...]:
    """`"32:100, 4:20, 1"`, or a list of objects; what does not fit together the engine refuses."""
    value = body.get("stages")
    if isinstance(value, str):
        try:
            return parse_stages(value) if value else ()
        except ValueError as exc:
            raise InvalidRequest("stages", value[:100], f"RATIO:KEEP, RATIO:KEEP, RATIO ({exc})") from None
    parts = [Fields(item, f"stages[{i}].", f"stages[{i}]") for i, item in enumerate(body.items("stages") or ())]
    return tuple(Stage(part.count("compression_ratio") or 0, part.count("keep") or 0) for part in parts)


def candidates(body: Fields, field: str) -> tuple[Candidate, ...]:
    """Texts, or objects with `text`, `id` or both; `passage_ids` beside them, or alone."""
    items, ids = body.items(field), body.texts("passage_ids")
    if items is None and ids is None:
        raise InvalidRequest(field, "absent", "a list of texts, or passage_ids and a collection")
    if items is None:
        items = [None] * len(ids or ())
    if not items:
        raise InvalidRequest(field, "empty", "at least one")
    if ids is not None and len(ids) != len(items):
        raise InvalidRequest("passage_ids", f"{len(ids)} of them", f"{len(items)}, one for each of {field}")
    found = tuple(_candidate(i, item, f"{field}[{i}]", ids[i] if ids else "") for i, item in enumerate(items))
    bad = next((candidate for candidate in found if candidate.problem), None)
    if bad is not None and texts_alone(found):  # there is no status to say it in
        raise InvalidRequest(f"{field}[{bad.index}]", *HALF_A_PAIR)
    return found


def _candidate(index: int, item: object, where: str, passage_id: str) -> Candidate:
    """The candidate; one whose text UTF-8 cannot hold has a problem, and no text."""
    if item is None and passage_id:
        return Candidate(index, passage_id, None)
    if isinstance(item, str):
        text: str | None = item
    else:
        fields = Fields(item, f"{where}.", where)
        text, passage_id = fields.raw_text("text"), passage_id or fields.text("id") or ""
        if text is None and not passage_id:
            raise InvalidRequest(where, "an object without text", "a string, or an object with text, id or both")
    if text is not None and not is_utf8(text):
        value, expected = HALF_A_PAIR
        return Candidate(index, passage_id or None, None, problem=f"the text is {value}; expected {expected}")
    return Candidate(index, passage_id or None, text)
