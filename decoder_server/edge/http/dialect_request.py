"""The rerank request and response of every dialect: shared fields of a body, and all of a response but its shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast, get_args

from msgspec import UNSET, Meta, Struct, UnsetType

from decoder_server.edge.http.json_steps import pieces
from decoder_server.edge.http.json_values import Count, Query, RawText, Schema, Switch, Text, Word, kind_of, read
from preread import values
from preread.errors import FailedPrecondition, InvalidRequest, Path, field_name
from preread_edge.steps import Step

MAX_POSITIONS_SHOWN = 500
MAX_RANK_FIELDS = 100  # they are looked for in every document


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


# Our own names; a document without any other is one of ours, so that its id may be a passage's.
_OWN: dict[str, Schema] = {"text": Text.schema, "title": Text.schema, "id": {"type": ["string", "integer"]}}
_DocumentObject = Annotated[dict[str, Any], Meta(extra_json_schema={"properties": _OWN})]
Documents = Annotated[list[str | _DocumentObject | None] | None, _about("May be absent if passage_ids are given")]


def no_step() -> None:
    """Between steps of work that is short: nothing."""


def flat(value: object, path: Path, step: Step = no_step) -> str:
    """A JSON value in one line, which is YAML too. Raises InvalidRequest for one that JSON cannot hold."""
    parts = []
    try:
        for piece in pieces(value):
            parts.append(piece)
            step()
    except RecursionError:
        raise InvalidRequest(path, "too deeply nested", "an object of fewer levels") from None
    except ValueError:
        raise InvalidRequest(path, "a number that is not finite", "numbers that are") from None
    return "".join(parts)


def _text_of(document: Mapping[str, Any], rank_fields: Sequence[str], path: Path, step: Step) -> str | None:
    """The text that is scored of a document that is an object; None where it has no field but an id.

    That is `text`, with `title` before it; else all other fields, a line `name: value` each, as Cohere documents it.
    With `rank_fields` those instead, in their order: of one the value alone.
    """
    chosen = [name for name in rank_fields if document.get(name) is not None]
    if rank_fields and not chosen and not document.keys() <= {"id"}:
        raise InvalidRequest(path, "an object without them", f"one of rank_fields: {', '.join(rank_fields)[:200]}")
    if not rank_fields and document.get("text") is None and not document.keys() <= _OWN.keys():
        chosen = [name for name, value in document.items() if name not in ("id", "_id") and value is not None]
    if not chosen or {"title", "text"}.issuperset(chosen):  # joined as where passages are indexed
        fields = {name: document.get(name) for name in chosen or ("title", "text")}
        text, title = (
            None if (value := fields.get(name)) is None else read(RawText, value, (*path, name))
            for name in ("text", "title")
        )
        if text is None:
            return title if chosen else None
        return values.join_title(title, text)
    rendered = [value if isinstance(value := document[n], str) else flat(value, path, step) for n in chosen]
    if len(chosen) == 1 and rank_fields:
        return rendered[0]
    return "\n".join(f"{name}: {value}" for name, value in zip(chosen, rendered, strict=True))


class RerankBody(Struct, kw_only=True):
    """Fields with one meaning in every dialect, which may rename `documents`, `top_n` and `return_documents`."""

    owns_ids: ClassVar[bool] = True  # False: an `id` in a document is never a passage's

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
    rank_fields: Annotated[
        list[Text] | None, _about("Fields of documents that are objects: these are scored, in this order")
    ] = None

    def requests(self, step: Step) -> list[DialectRequest]:
        """For the engine: one, or one per distinct query. Calls `step` between pieces of work."""
        return [self.request(step=step)]

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
        step: Step = no_step,
        **settings: Any,  # of DialectRequest
    ) -> DialectRequest:
        """The request for the engine."""
        if self.documents is None and self.passage_ids is not None:
            field = "passage_ids"
        top = self.top_n if top_k is None else top_k
        candidates, foreign_ids = self._candidates(field, step)
        request = values.RerankRequest(
            query=str(self.query),
            candidates=candidates,
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
        settings |= {"return_margins": bool(self.return_margins), "foreign_ids": foreign_ids}
        parsed = DialectRequest(request, field, max_tokens, **settings)
        bad = next((i for i, candidate in enumerate(request.candidates) if candidate.problem), None)
        if bad is not None and parsed.texts_alone:  # there is no status to say it in
            raise InvalidRequest(parsed.path_of(bad), *RawText.HALF_A_PAIR)
        return parsed

    def _candidates(self, field: str, step: Step) -> tuple[tuple[values.Candidate, ...], dict[int, str | int]]:
        """Texts, or objects with fields, `id` or both; `passage_ids` next to them, or alone. And ids to echo, by index.

        An `id` is a passage's where the request names a collection, or the object has none but our own fields.
        """
        items, ids, rank_fields = self.documents, self.passage_ids, self.rank_fields or ()
        if items is None and ids is None:
            raise InvalidRequest(field, "absent", "a list of texts, or passage_ids and a collection")
        items = [None] * len(ids or ()) if items is None else items
        if not items:
            raise InvalidRequest(field, "empty", "at least one")
        if ids is not None and len(ids) != len(items):
            raise InvalidRequest("passage_ids", f"{len(ids)} of them", f"{len(items)}, one for each of {field}")
        if len(rank_fields) > MAX_RANK_FIELDS:
            raise InvalidRequest("rank_fields", f"{len(rank_fields)} of them", f"at most {MAX_RANK_FIELDS}")
        candidates, foreign = [], dict[int, str | int]()
        for i, item in enumerate(items):
            text, passage_id = (None, "") if isinstance(item, dict) else (item, "")
            if isinstance(item, dict):
                given, is_plain = item.get("id"), item.keys() <= _OWN.keys()
                is_ours = self.owns_ids and bool(self.collection or (is_plain and not isinstance(given, int)))
                if is_ours and given is not None:
                    passage_id = str(read(Text, given, (field, i, "id")))
                elif isinstance(given, (str, int)) and not isinstance(given, bool):
                    foreign[i] = given if isinstance(given, int) else str(read(Text, given, (field, i, "id")))
                if not (passage_id and self.collection and item.get("text") is None and not rank_fields):
                    text = _text_of(item, rank_fields, (field, i), step)
            passage_id = (ids[i] if ids else "") or passage_id
            if text is None and not passage_id:
                if self.documents is None:
                    raise InvalidRequest((field, i), "", "the id of a passage")
                expected = "a string, or an object with text, id or both"
                raise InvalidRequest((field, i), "an object without text", expected)
            problem = ""
            if text is not None and not RawText.is_utf8(text):
                text, problem = None, "the text is {}; expected {}".format(*RawText.HALF_A_PAIR)
            candidates.append(values.Candidate(str(passage_id) or None, None if text is None else str(text), problem))
            step()
        return tuple(candidates), foreign


class _StageScore(Struct):
    compression_ratio: Size
    margin: float
    score: Score
    num_states: Size


class Rank(Struct, kw_only=True):
    """One result; a dialect adds its score, and the text under its name."""

    index: Annotated[int, Meta(ge=0, description="Position in the request")]
    id: Annotated[str | int | UnsetType, _about("Where the request gave one")] = UNSET
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
    """Tokens that were read. None are generated."""

    prompt_tokens: Size | UnsetType = UNSET
    completion_tokens: Size | UnsetType = UNSET
    total_tokens: Size

    @classmethod
    def of(cls, num_tokens: int) -> Self:
        return cls(prompt_tokens=num_tokens, completion_tokens=0, total_tokens=num_tokens)


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
    foreign_ids: Mapping[int, str | int] = field(default_factory=dict)  # by index, of no passage here: echoed
    documents: Sequence[Any] = ()  # as they were sent, where the dialect gives them back so

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
        return Usage.of(self.num_tokens)

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

    def ranks(self, kind: type[R], score: str, text: str = "", **more: Any) -> list[R]:
        """Results as the dialect's struct, with the names of its score and its text; `more` is the same in each."""
        ranks, parsed = [], self.parsed
        for result in self.scored:
            given_id = result.passage_id or parsed.foreign_ids.get(result.index)
            fields: dict[str, Any] = {"index": parsed.position(result.index)}
            fields["id"] = UNSET if given_id is None else given_id
            fields[score] = result.margin if parsed.raw_scores else result.score
            if text and parsed.request.return_text:
                fields[text] = result.text or UNSET
            if parsed.return_margins:
                fields |= {"margin": result.margin, "compression_ratio": result.compression_ratio or UNSET}
                fields["truncated"] = result.index in self.cut or UNSET
                fields |= {"found_in": result.found_in or UNSET, "found_id": result.found_id or UNSET}
                fields["stages"] = [_StageScore(**dataclasses.asdict(one)) for one in result.stages] or UNSET
            ranks.append(kind(**fields, **more))
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
