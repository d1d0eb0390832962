"""Passages out of files: every item of an input is a SourcePassage or a Refused; nothing is dropped in silence."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cache.errors import InvalidName
from cache.record import passage_id_bytes
from preread.values import id_text, join_title


class SourceError(ValueError):
    """An input that cannot be read at all, or not further."""


class Reason(StrEnum):
    """Why a passage was refused; constants for machines."""

    BROKEN_JSON = "broken_json"
    BROKEN_ROW = "broken_row"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    INVALID_UTF8 = "invalid_utf8"
    LINE_TOO_LONG = "line_too_long"
    EMPTY_TEXT = "empty_text"
    BAD_ID = "bad_id"
    DUPLICATE_ID = "duplicate_id"
    NOT_FINITE = "not_finite"
    OUT_OF_MEMORY = "out_of_memory"
    ENCODING_FAILED = "encoding_failed"
    NOT_STORABLE = "not_storable"
    OUT_OF_RANGE = "out_of_range"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a passage stood: input name and line (row for Parquet), from 1."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class SourcePassage:
    """One passage to encode; the title, where there is one, is already in the text."""

    passage_id: str
    text: str
    place: Place


@dataclass(frozen=True, slots=True)
class Refused:
    """One item that will not be encoded, and why."""

    place: Place
    passage_id: str | None
    reason: Reason
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


Item = SourcePassage | Refused
Position = Callable[[], int]  # bytes of the input that were read, compressed where it is compressed


@dataclass(frozen=True)
class Fields:
    """Names of the fields (or columns) that make a passage; a title goes before the text, as in BEIR's own readers."""

    id: str | None = None  # None: `id` or `_id` (BEIR)
    text: str = "text"
    title: str | None = "title"  # None: titles are ignored
    title_separator: str = " "

    @property
    def id_names(self) -> tuple[str, ...]:
        return (self.id,) if self.id is not None else ("id", "_id")

    def find(self, names: Collection[str]) -> tuple[str, str, str | None]:
        """Names of id, text and any title among `names`. Raises KeyError(what is missing, `names`)."""
        id_name = next((name for name in self.id_names if name in names), None)
        if id_name is None or self.text not in names:
            missing = self.text if id_name is not None else " or ".join(self.id_names)
            raise KeyError(missing, f"{', '.join(names) or 'no keys':.200}")
        return id_name, self.text, self.title if self.title in names else None

    def of_row(self, place: Place, row: Mapping[str, Any]) -> Item:
        """Finds the fields in one item by name, and checks their values."""
        try:
            id_name, text, title = self.find(row)
        except KeyError as exc:
            return Refused(place, None, Reason.MISSING_FIELD, "no {}; found {}".format(*exc.args))
        return self.passage(place, row[id_name], row[text], row[title] if title is not None else None)

    def passage(self, place: Place, passage_id: object, text: object, title: object = None) -> Item:
        """Checks the values of one item. Ids may be strings or whole numbers; a title may be missing."""
        own_id = id_text(passage_id)
        if own_id is None:
            return Refused(place, None, Reason.WRONG_TYPE, f"id is {_show(passage_id)}; expected a string or integer")
        try:
            passage_id_bytes(own_id)
        except InvalidName as exc:
            return Refused(place, None, Reason.BAD_ID, str(exc))
        if not isinstance(text, str):
            return Refused(place, own_id, Reason.WRONG_TYPE, f"{self.text} is {_show(text)}; expected a string")
        if title is not None and not isinstance(title, str):
            return Refused(place, own_id, Reason.WRONG_TYPE, f"{self.title} is {_show(title)}; expected a string")
        joined = join_title(title, text, self.title_separator)
        if not joined.strip():  # what else has no tokens, the tokenizer says (reading.py)
            return Refused(place, own_id, Reason.EMPTY_TEXT, f"{self.text} is empty")
        try:
            joined.encode()
        except UnicodeEncodeError as exc:  # JSON can spell half a surrogate pair
            return Refused(place, own_id, Reason.INVALID_UTF8, f"{self.text} is not valid Unicode: {exc.reason}")
        return SourcePassage(own_id, joined, place)


def _show(value: object) -> str:
    kind = {type(None): "null", dict: "an object", list: "a list"}.get(type(value))
    return kind or f"{type(value).__name__} {value!r:.40}"
