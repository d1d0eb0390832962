"""The rerank request and response of every dialect: shared fields of a body, and all of a response but its shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast, get_args

from msgspec import UNSET, Meta, Struct, UnsetType

from decoder_server.edge.http.request import Count, Query, RawText, Schema, Switch, Text, Word, kind_of, read
from preread import values
from preread.errors import FailedPrecondition, InvalidRequest, Path, field_name

MAX_POSITIONS_SHOWN = 500


def _about(text: str) -> Meta:
    return Meta(description=text)


Flag = Switch | None
Size = Annotated[int, Meta(ge=0)]
Score = Annotated[float, Meta(ge=0, le=1)]
Top = Annotated[Count | None, _about("0, absent or more than there are: all")]


class _OnMiss(Word):
    words = get_args(values.OnMiss)


class _StageBody(Struct, forbid_unknown_fields=True):
    compression_ratio: Count | None = None
    keep: Count | None = None


class _Stages(tuple[values.Stage, ...]):
    """A cascade, `"32:100, 8:20, 4"` or a list of objects. Whether its stages fit together is the engine's to check."""

    _FIELDS: ClassVar[Schema] = {"compression_ratio": Count.schema, "keep": Count.schema}
    _STAGE: ClassVar[Schema] = {
        "type": "object",
        "required": ["compression_ratio"],
        "properties": _FIELDS,
        "additionalProperties": False,
    }
    schema: ClassVar[Schema] = {"anyOf": [Text.schema, {"type": "array", "items": _STAGE}]}

    @classmethod
    def read(cls, value: object) -> Self:
        if isinstance(value, list):
            stages = [read(_StageBody, stage, (i,)) for i, stage in enumerate(value)]
            return cls(values.Stage(int(stage.compression_ratio or 0), int(stage.keep or 0)) for stage in stages)
        if not isinstance(value, str):
            raise InvalidRequest((), kind_of(value), "a string or a list")
        try:
            return cls(values.parse_stages(value) if value else ())
        except ValueError as exc:
            raise InvalidRequest((), value[:100], f"RATIO:KEEP, RATIO:KEEP, RATIO ({exc})") from None


class _DocumentObject(Struct, kw_only=True):
    text: RawText | None = None
    title: RawText | None = None  # goes before the text, as where passages are indexed
    id: Text | None = None

    @property
    def joined(self) -> str | None:
        return None if self.text is None else values.join_title(self.title, self.text)


Documents = Annotated[list[str | _DocumentObject | None] | None, _about("May be absent if passage_ids are given")]


class RerankBody(Struct, kw_only=True):
    """Fields with one meaning in every dialect, which may rename `documents`, `top_n` and `return_documents`."""

    query: Query
    documents: Documents = None
    top_n: Top = None
    return_documents: Flag = None
    model: Annotated[Text | None, _about("A served name, or absent for the first")] = None
    instruction: Annotated[
        Text | None, _about("What to look for; absent or null: the model's default; empty: nothing")
    ] = None
    collection: Annotated[Text | None, _about("Collection or alias that ids refer to")] = None
    passage_ids: Annotated[list[Text] | None, _about("Ids of the texts, or ids alone in place of them")] = None
    compression_ratio: Annotated[
        Count | None, _about("A multiple of the stored ratio; 0 or absent: the server's default, else the stored one")
    ] = None
    stages: Annotated[
        _Stages | None,
        _about("A cascade: '32:100, 8:20, 4' scores all at ratio 32, the best 100 at 8, 20 of those at 4"),
    ] = None
    on_miss: Annotated[_OnMiss | None, _about("For ids that are not stored")] = None
    return_margins: Annotated[
        Flag, _about("Adds margin (yes-logit minus no-logit), compression_ratio and stages to each result")
    ] = None
    max_tokens_per_doc: Annotated[Count | None, _about("Texts are cut there")] = None

    def requests(self) -> list[DialectRequest]:
        """For the engine: one, or one per distinct query."""
        return [self.request()]

    @classmethod
    def pack(cls, responses: Sequence[DialectResponse]) -> Any:
        """The document that answers the body."""
        raise NotImplementedError  # every dialect has another document

    def request(
        self,
        field: str = "documents",  # what the dialect calls the candidates
        *,
        top_k: Count | None = None,  # the dialect's limit of results; None: top_n
        one_ratio: bool = False,
        **settings: Any,  # of DialectRequest
    ) -> DialectRequest:
        """The request for the engine."""
        if self.documents is None and self.passage_ids is not None:
            field = "passage_ids"
        top = self.top_n if top_k is None else top_k
        request = values.RerankRequest(
            query=str(self.query),
            candidates=self._candidates(field),
            instruction=None if self.instruction is None else str(self.instruction),
            collection=str(self.collection or "") or None,
            top_n=int(top or 0),
            compression_ratio=int(self.compression_ratio or 0) or None,
            on_miss=cast(values.OnMiss | None, self.on_miss and str(self.on_miss)),
            return_text=bool(self.return_documents),
            model=str(self.model or ""),
            stages=self.stages or (),
            one_ratio=one_ratio,
        )
        max_tokens = int(self.max_tokens_per_doc or 0) or None
        parsed = DialectRequest(request, field, max_tokens, bool(self.return_margins), **settings)
        bad = next((i for i, candidate in enumerate(request.candidates) if candidate.problem), None)
        if bad is not None and parsed.texts_alone:  # there is no status to say it in
            raise InvalidRequest(parsed.path_of(bad), *RawText.HALF_A_PAIR)
        return parsed

    def _candidates(self, field: str) -> tuple[values.Candidate, ...]:
        """Texts, or objects with `text`, `id` or both; `passage_ids` next to them, or alone."""
        items, ids = self.documents, self.passage_ids
        if items is None and ids is None:
            raise InvalidRequest(field, "absent", "a list of texts, or passage_ids and a collection")
        items = [None] * len(ids or ()) if items is None else items
        if not items:
            raise InvalidRequest(field, "empty", "at least one")
        if ids is not None and len(ids) != len(items):
            raise InvalidRequest("passage_ids", f"{len(ids)} of them", f"{len(items)}, one for each of {field}")
        candidates = []
        for i, item in enumerate(items):
            text, own_id = (item.joined, item.id) if isinstance(item, _DocumentObject) else (item, None)
            passage_id = (ids[i] if ids else "") or own_id or ""
            if text is None and not passage_id:
                if self.documents is None:
                    raise InvalidRequest((field, i), "", "the id of a passage")
                expected = "a string, or an object with text, id or both"
                raise InvalidRequest((field, i), "an object without text", expected)
            problem = ""
            if text is not None and not RawText.is_utf8(text):
                text, problem = None, "the text is {}; expected {}".format(*RawText.HALF_A_PAIR)
            candidates.append(values.Candidate(str(passage_id) or None, None if text is None else str(text), problem))
        return tuple(candidates)


class _StageScore(Struct):
    compression_ratio: Size
    margin: float
    score: Score
    num_states: Size


class Rank(Struct, kw_only=True):
    """One result; a dialect adds its score, and the text under its name."""

    index: Annotated[int, Meta(ge=0, description="Position in the request")]
    id: Annotated[str | UnsetType, _about("Where the request gave one")] = UNSET
    margin: Annotated[float | UnsetType, _about("With return_margins")] = UNSET
    compression_ratio: Annotated[int | UnsetType, _about("With return_margins: the ratio it was scored at")] = UNSET
    truncated: Annotated[bool | UnsetType, _about("With return_margins, where it was cut: true")] = UNSET
    found_in: Annotated[
        str | UnsetType, _about("With return_margins, where it was found by its text: the collection")
    ] = UNSET
    found_id: Annotated[str | UnsetType, _about("With return_margins: its id in that collection")] = UNSET
    stages: Annotated[
        list[_StageScore] | UnsetType, _about("With return_margins, of a cascade: every stage that scored it")
    ] = UNSET


class Usage(Struct, kw_only=True):
    """Tokens that were read."""

    prompt_tokens: Size | UnsetType = UNSET
    total_tokens: Size


R = TypeVar("R", bound=Rank)


@dataclass(frozen=True, slots=True)
class DialectRequest:
    """A request for the engine, and what the edge does around it."""

    request: values.RerankRequest
    candidates_field: str = "documents"  # the dialect's name of the candidates
    max_tokens_per_doc: int | None = None  # inline texts are cut there
    return_margins: bool = False
    keep_end: bool = False  # inline texts over the model's limit lose their beginning
    reject_truncated: bool = False  # an error instead of the score of a cut text
    raw_scores: bool = False  # margins in place of scores
    positions: tuple[int, ...] = ()  # of the candidates in the body; empty: their indexes

    @property
    def texts_alone(self) -> bool:
        """No candidate has an id: each gets a score, or the request fails."""
        return all(candidate.passage_id is None for candidate in self.request.candidates)

    def position(self, index: int) -> int:
        return self.positions[index] if self.positions else index

    def path_of(self, index: int) -> Path:
        """The place of a candidate in the body."""
        return (self.candidates_field, self.position(index))

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Errors of the engine, whose paths begin with `candidates`, in the words of the body."""
        try:
            yield
        except (InvalidRequest, FailedPrecondition) as exc:
            match exc.path:
                case ("candidates", int(index), *rest):
                    path = (*self.path_of(index), *rest)
                case ("candidates", *rest):
                    path = (self.candidates_field, *rest)
                case _:
                    raise
            if isinstance(exc, FailedPrecondition):
                raise FailedPrecondition(exc.reason, exc.subject, exc.said, path=path) from exc
            raise InvalidRequest(path, exc.value, exc.expected) from exc


@dataclass(frozen=True, slots=True)
class DialectResponse:
    """Scored results best first, at most top_n; the others in request order."""

    parsed: DialectRequest
    scored: list[values.Result]
    unscored: list[values.Result]
    summary: values.Summary
    request_id: str
    cut: tuple[int, ...] = ()  # indexes of the candidates that were cut, those beyond top_n too
    empty: tuple[int, ...] = ()  # of those at the floor of all scores

    @property
    def num_tokens(self) -> int:
        """Tokens read: the query once per candidate, and passages in whole states."""
        return self.summary.num_scored * self.summary.num_query_tokens + self.summary.num_passage_tokens

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=self.num_tokens, total_tokens=self.num_tokens)

    def warnings(self) -> list[str]:
        """One line per candidate that is not in the ranking, was not read, or was cut; those of the request first."""
        summary = self.summary
        lines = ["the query was truncated"] if summary.query_truncated else []
        if summary.degraded is not None:
            scored, requested = _ratio(summary), _ratio(summary.degraded)
            lines.append(f"scored at {scored} in place of {requested} ({summary.degraded.reason})")
        if summary.stopped_early:
            lines.append("the deadline ended the cascade before its last stage")

        def name(index: int) -> str:
            return field_name(self.parsed.path_of(index))

        lines += [f"{name(o.index)} was not scored ({o.status}): {o.message}" for o in self.unscored]
        lines += [f"{name(index)} is empty: it has the lowest score of all and was not read" for index in self.empty]
        return lines + [f"{name(index)} was cut: its score is that of a part" for index in self.cut]

    def ranks(self, kind: type[R], score: str, text: str = "") -> list[R]:
        """Results as the dialect's struct, with the names of its score and its text."""
        ranks, parsed = [], self.parsed
        for result in self.scored:
            fields: dict[str, Any] = {"index": parsed.position(result.index), "id": result.passage_id or UNSET}
            fields[score] = result.margin if parsed.raw_scores else result.score
            if text and parsed.request.return_text:
                fields[text] = result.text or UNSET
            if parsed.return_margins:
                fields |= {"margin": result.margin, "compression_ratio": result.compression_ratio or UNSET}
                fields["truncated"] = result.index in self.cut or UNSET
                fields |= {"found_in": result.found_in or UNSET, "found_id": result.found_id or UNSET}
                fields["stages"] = [_StageScore(**dataclasses.asdict(one)) for one in result.stages] or UNSET
            ranks.append(kind(**fields))
        return ranks

    @staticmethod
    def headers(responses: Sequence[DialectResponse]) -> dict[str, str]:
        """Headers for what dialects have no field for, over the requests of one body; a degraded one speaks for all."""
        chosen = next((response for response in responses if response.summary.degraded is not None), responses[-1])
        degraded = chosen.summary.degraded

        def positions(name: str) -> str:
            every = sorted(one.parsed.position(index) for one in responses for index in getattr(one, name))
            more = ["..."] if len(every) > MAX_POSITIONS_SHOWN else []  # of very many the first: a header has to fit
            return ",".join([*map(str, every[:MAX_POSITIONS_SHOWN]), *more])

        headers = {
            "x-preread-read": _ratio(chosen.summary),
            "x-preread-degraded": degraded.reason if degraded is not None else "",
            "x-preread-asked": _ratio(degraded) if degraded is not None else "",
            "x-preread-stopped-early": "true" if chosen.summary.stopped_early else "",
            "x-preread-query-truncated": "true" if any(one.summary.query_truncated for one in responses) else "",
            "x-preread-truncated": positions("cut"),
            "x-preread-empty": positions("empty"),
            "x-preread-lookup": _found([one.summary for one in responses]),
        }
        return {name: value for name, value in headers.items() if value}


def _found(of: Sequence[values.Summary]) -> str:
    """`97/100`: texts found stored, of those looked up; "" where none was looked up."""
    num_looked_up = sum(one.num_looked_up for one in of)
    return f"{sum(one.num_found for one in of)}/{num_looked_up}" if num_looked_up else ""


def _ratio(of: values.Summary | values.Degraded) -> str:
    """The ratio or the stages; "" for a model that reads text."""
    return values.format_stages(of.stages) if of.stages else str(of.compression_ratio or "")
