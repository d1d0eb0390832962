"""Arguments of a call, checked before they go on the wire.

TypeError: another kind of thing than the field holds. InvalidRequest: a value that no message can carry. Both name
the field, and of a list its index. The server checks what a value means.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

from preread.errors import FieldViolation, InvalidRequest
from preread.types import Candidate, Passage, id_text, join_title

ID_KEYS = ("id", "_id", "passage_id")
TEXT_KEYS = ("text", "title")
MAX_SECONDS = 1e9  # beyond some centuries gRPC's clock overflows, and the call ends immediately
_INT32 = 1 << 31
_METADATA_NAME = re.compile(r"[0-9a-z_.-]+")


def invalid(field: str, value: str, expected: str) -> InvalidRequest:
    """The error of a value that cannot be sent, in the form of a server's."""
    violation = FieldViolation(field, f"{value}; expected {expected}")
    return InvalidRequest.received(f"{field} is {value}; expected {expected}", violations=(violation,))


def text(field: str, value: object) -> str:
    """A string that UTF-8 can carry."""
    if not isinstance(value, str):
        raise TypeError(f"{field} is {show(value)}; expected a string")
    value = str.__str__(value)
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        half = f"half a surrogate pair, U+{ord(value[exc.start]):04X}, at {exc.start}"
        raise invalid(field, f"not valid Unicode ({half})", "text that UTF-8 can carry") from None
    return value


def optional_text(field: str, value: object) -> str:
    """The same; None and "" are the default."""
    return "" if value is None else text(field, value)


def text_or_absent(field: str, value: object) -> str | None:
    """The same where the two differ: None is absent, "" is an empty text."""
    return None if value is None else text(field, value)


def integer(field: str, value: object) -> int:
    """An int32; None and 0 are the default."""
    if value is None:
        return 0
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # whatever is no integer raises
    except TypeError:
        raise TypeError(f"{field} is {show(value)}; expected an integer") from None
    if not -_INT32 <= number < _INT32:
        raise invalid(field, show(number), f"an integer below {_INT32:,}")
    return number


def flag(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{field} is {show(value)}; expected True or False")
    return value


def seconds(field: str, value: object) -> float | None:
    """A time limit; None: the default."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field} is {show(value)}; expected a number of seconds, or None")
    if not (math.isfinite(value) and 0 < value <= MAX_SECONDS):
        raise invalid(field, show(value), f"seconds, more than 0 and at most {MAX_SECONDS:g}, or None")
    return float(value)


def metadata(name: object, value: object) -> tuple[str, str]:
    """One entry of call metadata as HTTP/2 takes it. Values may be secret: errors do not show them."""
    if not isinstance(name, str) or not isinstance(value, str):
        raise TypeError(f"metadata has {show(name)}: {type(value).__name__}; expected strings")
    lowered = name.lower()
    if not _METADATA_NAME.fullmatch(lowered) or lowered.endswith("-bin"):
        raise invalid(
            "metadata", f"named {show(name)}", "names of letters, digits, '_', '-' and '.', not ending in -bin"
        )
    if not value.isascii() or not value.isprintable():
        raise invalid(f"metadata[{lowered!r}]", "not printable ASCII", "printable ASCII characters")
    return lowered, value


def many(field: str, values: object) -> Iterable[Any]:
    """Anything that gives one value after another, but a string, bytes or a mapping, which would give their parts."""
    if isinstance(values, str | bytes | bytearray):
        raise TypeError(f"{field} is one {'string' if isinstance(values, str) else 'bytes object'}; expected a list")
    if isinstance(values, Mapping):
        raise TypeError(f"{field} is a {type(values).__name__}, which would give its keys alone; expected a list")
    if not isinstance(values, Iterable):
        raise TypeError(f"{field} is {show(values)}; expected a list")
    return values


def texts(field: str, values: object) -> list[str]:
    """Strings, such as ids."""
    return [text(f"{field}[{i}]", value) for i, value in enumerate(many(field, values))]


def passage(index: int, value: object) -> tuple[str, str]:
    """(id, text) of a Passage, or of a mapping with the keys that `preread index` reads.

    Raises:
        TypeError: anything else. Nothing is unpacked as a pair: strings of two letters and dictionaries of two keys
            would unpack as well, and a tuple does not say which part is the id.
    """
    where = f"passages[{index}]"
    if isinstance(value, Passage):
        return text(f"{where}.passage_id", value.passage_id), text(f"{where}.text", value.text)
    if isinstance(value, Mapping):
        passage_id, own = _fields(where, value)
        if passage_id is None or own is None:
            missing = "id" if passage_id is None else "text"
            raise TypeError(f"{where} has no {missing}; found {_keys(value)}")
        return passage_id, own
    raise TypeError(f'{where} is {show(value)}; expected a Passage, or a mapping {{"id": ..., "text": ...}}')


def candidate(index: int, value: object, *, is_id: bool) -> Candidate:
    """A Candidate, a mapping with an id, a text or both, or a string, which is an id or a text."""
    where = f"candidates[{index}]"
    if isinstance(value, str):
        own = text(where, value)
        return Candidate(passage_id=own) if is_id else Candidate(text=own)
    if isinstance(value, Mapping):
        found = Candidate(*_fields(where, value))
        if found.passage_id is None and found.text is None:
            raise TypeError(f"{where} has neither id nor text; found {_keys(value)}")
        return found
    if isinstance(value, Candidate):
        return Candidate(
            None if value.passage_id is None else text(f"{where}.passage_id", value.passage_id),
            None if value.text is None else text(f"{where}.text", value.text),
        )
    expected = 'a string, a Candidate, or a mapping {"id": ..., "text": ...}'
    raise TypeError(f"{where} is {show(value)}; expected {expected}")


def _fields(where: str, row: Mapping[Any, Any]) -> tuple[str | None, str | None]:
    """Id and text of a row; a title goes before the text."""
    known = (*ID_KEYS, *TEXT_KEYS)
    unknown = [key for key in row if key not in known]
    if unknown:
        raise TypeError(f"{where} has the key {show(unknown[0])}; expected id, text and title")
    named = [key for key in ID_KEYS if row.get(key) is not None]
    if len(named) > 1:
        raise TypeError(f"{where} has both {named[0]} and {named[1]}; expected one of them")
    passage_id = None
    if named:
        value = id_text(row[named[0]])
        if value is None:
            raise TypeError(f"{where}.{named[0]} is {show(row[named[0]])}; expected a string or an integer")
        passage_id = text(f"{where}.{named[0]}", value)
    own, title = (None if row.get(key) is None else text(f"{where}.{key}", row[key]) for key in TEXT_KEYS)
    return passage_id, own if own is None else join_title(title, own)


def _keys(row: Mapping[Any, Any]) -> str:
    return ", ".join(f"{key}{' (None)' if value is None else ''}" for key, value in row.items()) or "no keys"


def show(value: object) -> str:
    """A value for a message: its type, and its beginning in ASCII, which every terminal can print."""
    shown = ascii(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
