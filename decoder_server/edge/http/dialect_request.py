"""The rerank request and response of every dialect: shared fields of a body, and all of a response but its shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast, get_args

from msgspec import UNSET, Meta, Struct, UnsetType

from decoder_server.edge.http.request import HALF_A_PAIR, Count, Query, RawText, Schema, Text, Word, kind_of, read
from preread.errors import FailedPrecondition, InvalidRequest, Path, field_name
from preread.values import Candidate, OnMiss, RerankRequest, Result, Stage, Summary, format_stages, parse_stages

MAX_POSITIONS_SHOWN = 500

Flag = bool | None
Size = Annotated[int, Meta(ge=0)]
Score = Annotated[float, Meta(ge=0, le=1)]
Top = Annotated[Count | None, Meta(description="0, absent or more than there are: all")]


class _OnMiss(Word):
    words = get_args(OnMiss)


class _StageBody(Struct):
    compression_ratio: Count | None = None
    keep: Count | None = None


class _Stages(tuple[Stage, ...]):
    """A cascade, `"32:100, 4:20, 1"` or a list of objects. Whether its stages fit together is the engine's to check."""

    _STAGE: ClassVar[Schema] = {
        "type": "object",
        "required": ["compression_ratio"],
        "properties": {"compression_ratio": Count.schema, "keep": Count.schema},
    }
    schema: ClassVar[Schema] = {"anyOf": [Text.schema, {"type": "array", "items": _STAGE}]}

    @classmethod
    def read(cls, value: object) -> Self:
        if isinstance(value, list):
            stages = read(list[_StageBody], value)
            return cls(Stage(int(stage.compression_ratio or 0), int(stage.keep or 0)) for stage in stages)
        if not isinstance(value, str):
            raise InvalidRequest((), kind_of(value), "a string or a list")
        try:
            return cls(parse_stages(value) if value else ())
        except ValueError as exc:
            raise InvalidRequest((), value[:100], f"RATIO:KEEP, RATIO:KEEP, RATIO ({exc})") from None


class _DocumentObject(Struct, kw_only=True):
    text: RawText | None = None
    id: Text | None = None


Documents = Annotated[
    list[str | _DocumentObject | None] | None, Meta(description="May be absent if passage_ids are given")
]


class Dialect(Struct, kw_only=True):
    """The body of a request as one family of clients writes it."""

    def requests(self) -> list[DialectRequest]:
        """For the engine: one, or one per distinct query."""
        raise NotImplementedError

    @classmethod
    def pack(cls, responses: Sequence[DialectResponse]) -> Any:
        """The document that answers the body."""
        raise NotImplementedError


class RerankBody(Dialect, kw_only=True):
    """Fields with one meaning in every dialect, which may rename `documents`, `top_n` and `return_documents`."""

    query: Query
    documents: Documents = None
    top_n: Top = None
    return_documents: Flag = None
    model: Annotated[Text | None, Meta(description="A served name, or absent for the first")] = None
    instruction: Annotated[
        Text | None, Meta(description="What to look for; absent or null: the model's default; empty: nothing")
    ] = None
    collection: Annotated[Text | None, Meta(description="Collection or alias that ids refer to")] = None
    passage_ids: Annotated[list[Text] | None, Meta(description="Ids of the texts, or ids alone in place of them")] = (
        None
    )
    compression_ratio: Annotated[
        Count | None,
        Meta(description="A multiple of the stored ratio; 0 or absent: the server's default, else the stored one"),
    ] = None
    stages: Annotated[
        _Stages | None,
        Meta(description="A cascade: '32:100, 4:20, 1' scores all at ratio 32, the best 100 at 4, 20 of those at 1"),
    ] = None
    on_miss: Annotated[_OnMiss | None, Meta(description="For ids that are not stored")] = None
    return_margins: Annotated[
        Flag, Meta(description="Adds margin (yes-logit minus no-logit), compression_ratio and stages to each result")
    ] = None
    max_tokens_per_doc: Annotated[Count | None, Meta(description="Texts are cut there")] = None

    def requests(self) -> list[DialectRequest]:
        return [self.request()]

    def request(
        self, field: str = "documents", *, top_k: Count | None = None, one_ratio: bool = False, **settings: Any
    ) -> DialectRequest:
        """The request for the engine.

        Args:
            field: what the dialect calls the candidates.
            top_k: the dialect's limit of results; None: top_n.
            settings: of DialectRequest.
        """
        top = self.top_n if top_k is None else top_k
        request = RerankRequest(
            query=str(self.query),
            candidates=_candidates(self, field),
            instruction=None if self.instruction is None else str(self.instruction),
            collection=str(self.collection or "") or None,
            top_n=int(top or 0),
            compression_ratio=int(self.compression_ratio or 0) or None,
            on_miss=cast(OnMiss | None, self.on_miss and str(self.on_miss)),
            return_text=self.return_documents or False,
            model=str(self.model or ""),
            stages=self.stages or (),
            one_ratio=one_ratio,
        )
        return DialectRequest(
            request,
            field,
            max_tokens_per_doc=int(self.max_tokens_per_doc or 0) or None,
            return_margins=self.return_margins or False,
            **settings,
        )


class _StageScore(Struct):
    compression_ratio: Size
    margin: float
    score: Score
    num_states: Size


class Rank(Struct, kw_only=True):
    """One result; a dialect adds its score, and the text under its name."""

    index: Annotated[int, Meta(ge=0, description="Position in the request")]
    id: Annotated[str | UnsetType, Meta(description="Where the request gave one")] = UNSET
    margin: Annotated[float | UnsetType, Meta(description="With return_margins")] = UNSET
    compression_ratio: Annotated[
        int | UnsetType, Meta(description="With return_margins: the ratio it was scored at")
    ] = UNSET
    truncated: Annotated[bool | UnsetType, Meta(description="With return_margins, where it was cut: true")] = UNSET
    stages: Annotated[
        list[_StageScore] | UnsetType,
        Meta(description="With return_margins, of a cascade: every stage that scored it"),
    ] = UNSET


class Usage(Struct, kw_only=True):
    """Tokens that were read."""

    prompt_tokens: Size | UnsetType = UNSET
    total_tokens: Size


R = TypeVar("R", bound=Rank)


@dataclass(frozen=True, slots=True)
class DialectRequest:
    """A request for the engine, and what the edge does around it."""

    request: RerankRequest
    candidates_field: str = "documents"  # the dialect's name of the candidates
    max_tokens_per_doc: int | None = None  # inline texts are cut there
    keep_end: bool = False  # inline texts over the model's limit lose their beginning
    reject_truncated: bool = False  # an error instead of the score of a cut text
    return_margins: bool = False
    raw_scores: bool = False  # margins in place of scores
    positions: tuple[int, ...] = ()  # of the candidates in the body; empty: their indexes

    @property
    def texts_alone(self) -> bool:
        """No candidate has an id: each gets a score, or the request fails."""
        return _texts_alone(self.request.candidates)

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
        except InvalidRequest as exc:
            if not exc.path:
                raise
            raise InvalidRequest(self._path(exc.path), exc.value, exc.expected) from exc
        except FailedPrecondition as exc:
            raise FailedPrecondition(exc.reason, exc.subject, exc.said, path=self._path(exc.path)) from exc

    def _path(self, path: Path) -> Path:
        match path:
            case ("candidates", int(index), *rest):
                return (*self.path_of(index), *rest)
            case ("candidates", *rest):
                return (self.candidates_field, *rest)
        return path


@dataclass(frozen=True, slots=True)
class DialectResponse:
    """Scored results best first, at most top_n; the others in request order."""

    parsed: DialectRequest
    scored: list[Result]
    unscored: list[Result]
    summary: Summary
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
            requested = _ratio(summary.degraded.compression_ratio, summary.degraded.stages)
            lines.append(f"scored at {self.ratio} in place of {requested} ({summary.degraded.reason})")
        if summary.stopped_early:
            lines.append("the deadline ended the cascade before its last stage")

        def name(index: int) -> str:
            return field_name(self.parsed.path_of(index))

        lines += [f"{name(o.index)} was not scored ({o.status}): {o.message}" for o in self.unscored]
        lines += [f"{name(index)} is empty: it has the lowest score of all and was not read" for index in self.empty]
        return lines + [f"{name(index)} was cut: its score is that of a part" for index in self.cut]

    @property
    def ratio(self) -> str:
        """The ratio it was scored at, or the stages; "" for a model that reads text."""
        return _ratio(self.summary.compression_ratio, self.summary.stages)

    def ranks(self, kind: type[R], score: str, text: str = "") -> list[R]:
        """Results as the dialect's struct, with the names of its score and its text."""
        return [kind(**self._fields(result, score, text)) for result in self.scored]

    def _fields(self, result: Result, score: str, text: str) -> dict[str, Any]:
        fields: dict[str, Any] = {"index": self.parsed.position(result.index)}
        fields[score] = result.margin if self.parsed.raw_scores else result.score
        if result.passage_id:
            fields["id"] = result.passage_id
        if text and self.parsed.request.return_text and result.text:
            fields[text] = result.text
        if self.parsed.return_margins:
            fields["margin"] = result.margin
            if result.index in self.cut:
                fields["truncated"] = True
            if result.compression_ratio:
                fields["compression_ratio"] = result.compression_ratio
            if result.stages:
                fields["stages"] = [_StageScore(**dataclasses.asdict(stage)) for stage in result.stages]
        return fields


def headers_of(responses: Sequence[DialectResponse]) -> dict[str, str]:
    """Headers for what dialects have no field for, over all requests of one body; a degraded one speaks for them."""
    chosen = next((response for response in responses if response.summary.degraded is not None), responses[-1])
    degraded = chosen.summary.degraded
    cut = [response.parsed.position(index) for response in responses for index in response.cut]
    empty = [response.parsed.position(index) for response in responses for index in response.empty]
    headers = {
        "x-preread-read": chosen.ratio,
        "x-preread-degraded": degraded.reason if degraded is not None else "",
        "x-preread-asked": _ratio(degraded.compression_ratio, degraded.stages) if degraded is not None else "",
        "x-preread-stopped-early": "true" if chosen.summary.stopped_early else "",
        "x-preread-query-truncated": "true" if any(one.summary.query_truncated for one in responses) else "",
        "x-preread-truncated": _positions(cut),
        "x-preread-empty": _positions(empty),
    }
    return {name: value for name, value in headers.items() if value}


def _positions(positions: Iterable[int]) -> str:
    """A header's list; the first of very many, since a header has to fit."""
    every = sorted(positions)
    return ",".join([*map(str, every[:MAX_POSITIONS_SHOWN]), *(["..."] if len(every) > MAX_POSITIONS_SHOWN else [])])


def _ratio(ratio: int, stages: Sequence[Stage]) -> str:
    return format_stages(stages) if stages else str(ratio or "")


def _candidates(body: RerankBody, field: str) -> tuple[Candidate, ...]:
    """Texts, or objects with `text`, `id` or both; `passage_ids` next to them, or alone."""
    items, ids = body.documents, body.passage_ids
    if items is None and ids is None:
        raise InvalidRequest(field, "absent", "a list of texts, or passage_ids and a collection")
    if items is None:
        items = [None] * len(ids or ())
    if not items:
        raise InvalidRequest(field, "empty", "at least one")
    if ids is not None and len(ids) != len(items):
        raise InvalidRequest("passage_ids", f"{len(ids)} of them", f"{len(items)}, one for each of {field}")
    candidates = tuple(_candidate((field, i), item, ids[i] if ids else "") for i, item in enumerate(items))
    bad = next((i for i, candidate in enumerate(candidates) if candidate.problem), None)
    if bad is not None and _texts_alone(candidates):  # there is no status to say it in
        raise InvalidRequest((field, bad), *HALF_A_PAIR)
    return candidates


def _texts_alone(candidates: Iterable[Candidate]) -> bool:
    return all(candidate.passage_id is None for candidate in candidates)


def _candidate(path: Path, item: str | _DocumentObject | None, passage_id: str) -> Candidate:
    """The candidate; one whose text UTF-8 cannot hold has a problem, and no text."""
    text: str | None = None
    if isinstance(item, str):
        text = item
    elif item is not None:
        text, passage_id = item.text, passage_id or item.id or ""
    if text is None and not passage_id:
        raise InvalidRequest(path, "an object without text", "a string, or an object with text, id or both")
    own_id = str(passage_id) or None
    if text is not None and not RawText.is_utf8(text):
        value, expected = HALF_A_PAIR
        return Candidate(own_id, problem=f"the text is {value}; expected {expected}")
    return Candidate(own_id, None if text is None else str(text))
