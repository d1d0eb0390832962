"""Passages out of files: every item of an input is a SourcePassage or a Refused; nothing is dropped in silence."""

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cache.errors import InvalidName
from cache.record import passage_id_bytes
from preread.values import id_text, join_title

_MAX_EXACT = 2**53  # from there a double stands for several whole numbers
_UNNAMED = "(unnamed)"
_MERGE_AT = 1 << 16
_LINE_BITS = 40


class SourceError(ValueError):
    """An input that cannot be read at all, or not further."""


class UnknownFormat(SourceError):  # noqa: N818 - as the errors of the stores
    """Neither a name nor a caller tells what an input is."""


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

    @classmethod
    def too_long(cls, place: Place, kind: str, num_bytes: int, limit: int) -> Self:
        return cls(place, None, Reason.LINE_TOO_LONG, f"{kind} of {num_bytes:,} bytes; at most {limit:,} are read")

    @classmethod
    def not_utf8(cls, place: Place, exc: UnicodeDecodeError) -> Self:
        return cls(place, None, Reason.INVALID_UTF8, f"not UTF-8: {exc.reason} at byte {exc.start + 1}")


Item = SourcePassage | Refused
Line = tuple[Place, bytes] | Refused
Text = tuple[Place, str] | Refused
Position = Callable[[], int]  # bytes of the input that were read, compressed where it is compressed


@dataclass(frozen=True)
class Columns:
    """The columns of one CSV, TSV or Parquet input that were taken: names, or numbers from 1 where it has no header."""

    source: str
    id: str | int
    text: str | int
    title: str | int | None = None
    separator: str | None = None  # of a CSV file, where it is no comma

    def __str__(self) -> str:
        """`passages.csv: columns docid, content`, for people."""
        separated = {";": "semicolons separate; ", "\t": "tabs separate; "}.get(self.separator or "", "")
        if isinstance(self.id, int):
            title = "" if self.title is None else f", column {self.title} the title"
            return (
                f"{self.source}: {separated}no header: column {self.id} is the id, column {self.text} the text{title}"
            )
        title = "" if self.title is None else f", {self.title} (before the text)"
        return f"{self.source}: {separated}columns {self.id or _UNNAMED}, {self.text}{title}"


@dataclass(frozen=True)
class Fields:
    """Names of the fields (or columns) that make a passage; a title goes before the text, as in BEIR's own readers.

    A name is found as it is written, else without case and the white space around it.
    """

    id: str | None = None  # None: `id` or `_id` (BEIR); a column's number where there is no header, there 1
    text: str | None = None  # None: `text`, or column 2
    title: str | None = "title"  # None: titles are ignored
    title_separator: str = " "
    has_header: bool | None = None  # of CSV and TSV; None: the first line tells
    advice: str = "expected id and text"  # ends the errors about names; a command names its options

    @property
    def id_names(self) -> tuple[str, ...]:
        return (self.id,) if self.id is not None else ("id", "_id")

    @property
    def text_name(self) -> str:
        return self.text if self.text is not None else "text"

    def find(self, names: Collection[str]) -> tuple[str, str, str | None]:
        """Names of id, text and any title among `names`. Raises KeyError(what is missing or twice, `names`)."""
        id_name, text = _find(self.id_names, names), _find((self.text_name,), names)
        if id_name is None or text is None:
            missing = ([] if id_name is not None else [" or ".join(self.id_names)]) + [self.text_name] * (text is None)
            raise KeyError(f"no {' and no '.join(missing)}", show_names(names))
        return id_name, text, None if self.title is None else _find((self.title,), names)

    def of_row(self, place: Place, row: Mapping[str, Any]) -> Item:
        """Finds the fields in one item by name, and checks their values."""
        try:
            id_name, text, title = self.find(row)
        except KeyError as exc:
            message = "{}; found {}; {}".format(*exc.args, self.advice)
            return Refused(place, None, Reason.MISSING_FIELD, message)
        return self.passage(place, row[id_name], row[text], row[title] if title is not None else None)

    def passage(self, place: Place, passage_id: object, text: object, title: object = None) -> Item:
        """Checks the values of one item. Ids may be strings or whole numbers; a title may be missing."""
        if (own_id := source_id(passage_id)) is None:
            message = f"id is {_show(passage_id)}; expected a string or whole number"
            return Refused(place, None, Reason.WRONG_TYPE, message)
        try:
            passage_id_bytes(own_id)
        except InvalidName as exc:
            return Refused(place, None, Reason.BAD_ID, str(exc))
        if not isinstance(text, str):
            return Refused(place, own_id, Reason.WRONG_TYPE, f"{self.text_name} is {_show(text)}; expected a string")
        if title is not None and not isinstance(title, str):
            return Refused(place, own_id, Reason.WRONG_TYPE, f"{self.title} is {_show(title)}; expected a string")
        joined = join_title(title, text, self.title_separator)
        if not joined.strip():  # what else has no tokens, the tokenizer says (reading.py)
            return Refused(place, own_id, Reason.EMPTY_TEXT, f"{self.text_name} is empty")
        try:
            joined.encode()
        except UnicodeEncodeError as exc:  # JSON can spell half a surrogate pair
            return Refused(place, own_id, Reason.INVALID_UTF8, f"{self.text_name} is not valid Unicode: {exc.reason}")
        return SourcePassage(own_id, joined, place)


def source_id(value: object) -> str | None:
    """An id as it is stored; a whole number may be a double or decimal, as pandas and databases write it. None: none.

    A double from 2^53 on is none: it may have been another whole number before.
    """
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return str(int(value)) if isinstance(value, Decimal) or abs(value) < _MAX_EXACT else None
    return id_text(value)


def show_names(names: Collection[str]) -> str:
    return f"{', '.join(name or _UNNAMED for name in names) or 'no keys':.200}"


def _find(wanted: Sequence[str], names: Collection[str]) -> str | None:
    """The first that is there as written, else folded. Raises KeyError where it is there twice."""
    for name in wanted:
        if name in names:
            found = [name] if isinstance(names, Mapping) else [one for one in names if one == name]
            break
    else:
        folded = {name.strip().casefold() for name in wanted}
        found = [name for name in names if name.strip().casefold() in folded]
    if len(found) > 1:
        raise KeyError(f"{' and '.join(found)}: which one is unclear", show_names(names))
    return found[0] if found else None


def _show(value: object) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN, which stands for a missing value"
        if abs(value) >= _MAX_EXACT:
            return f"the number {value!r}, which a double does not hold exactly"
        return f"the number {value!r}"
    kind = {type(None): "null", dict: "an object", list: "a list"}.get(type(value))
    return kind or f"{type(value).__name__} {value!r:.40}"


def decoded(line: Line) -> Text:
    if isinstance(line, Refused):
        return line
    place, data = line
    try:
        return place, data.decode()
    except UnicodeDecodeError as exc:
        return Refused.not_utf8(place, exc)


class SeenIds:
    """Ids that came already, and where, in some 20 bytes each, so that a hundred million fit.

    By 64-bit hash: a dict of the latest, merged into sorted arrays of doubling size. Two different ids share a hash
    once in some three hundred thousand runs of ten million ids; the second one is then refused, visibly.
    """

    def __init__(self) -> None:
        self._sources: list[str] = []
        self._latest: dict[int, int] = {}  # hash -> number of the source and line in one
        self._sorted: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] = []  # the same, large to small

    def once(self, passage: SourcePassage) -> SourcePassage | Refused:
        """The passage, or the reason it is refused where its id came before."""
        key = _hash(passage.passage_id)
        if (found := self._find(key)) is not None:
            first = Place(self._sources[found >> _LINE_BITS], found & ((1 << _LINE_BITS) - 1))
            message = f"id {passage.passage_id!r} came before, at {first}; the first one counts"
            return Refused(passage.place, passage.passage_id, Reason.DUPLICATE_ID, message)
        if not self._sources or self._sources[-1] != passage.place.source:
            self._sources.append(passage.place.source)
        self._latest[key] = (len(self._sources) - 1) << _LINE_BITS | passage.place.line
        if len(self._latest) >= _MERGE_AT:
            hashes = np.fromiter(self._latest.keys(), np.uint64, len(self._latest))
            places = np.fromiter(self._latest.values(), np.uint64, len(self._latest))
            self._latest = {}
            while self._sorted and len(self._sorted[-1][0]) <= len(hashes):
                more_hashes, more_places = self._sorted.pop()
                hashes, places = np.concatenate([more_hashes, hashes]), np.concatenate([more_places, places])
            order = np.argsort(hashes)
            self._sorted.append((hashes[order], places[order]))
        return passage

    def __contains__(self, passage_id: str) -> bool:
        return self._find(_hash(passage_id)) is not None

    def _find(self, key: int) -> int | None:
        """Number of the source and line in one."""
        found, wanted = self._latest.get(key), np.uint64(key)
        for hashes, places in self._sorted if found is None else ():
            at = int(np.searchsorted(hashes, wanted))
            if at < len(hashes) and hashes[at] == wanted:
                return int(places[at])
        return found


def _hash(passage_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(passage_id.encode(), digest_size=8).digest(), "little")
