"""Misspelled names of fields, query parameters and paths: near misses of known names, and the errors that name both.

A client's body may hold fields that only its own service knows; they are ignored. A near miss of a known field is
rejected: its value would be lost without a word. Bodies and query parameters that only Preread has are strict.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

from msgspec import Struct

from preread.errors import InvalidRequest, Path

MAX_UNKNOWN = 64  # names of one object that are compared: comparing a million would take minutes
_MAX_CHARS = 64  # a longer name is a near miss of none
_NEAR_PATH = 0.75  # of difflib's ratio, in which 1 is equal

Names = tuple[str, ...]


def fields_of(kind: type[Struct]) -> Names:
    """The fields of a body as callers write them, a dialect's own before those that it shares."""
    return kind.__struct_encode_fields__[::-1]


def check(values: Mapping[str, Any], known: Iterable[str], candidates: Names, path: Path = ()) -> None:
    """Raises InvalidRequest for an unknown name that is a near miss of a candidate; null is absent."""
    unknown = (name for name in values if name not in known)
    for name in islice(unknown, MAX_UNKNOWN):
        if values[name] is not None and nearest(name, candidates):
            raise no_such(name, values[name], candidates, path)


def check_query(values: Mapping[str, str], known: Iterable[str]) -> None:
    """Raises InvalidRequest for a query parameter that the path does not have."""
    for name, value in values.items():
        if name not in known:
            raise no_such(name, value, (*known,), what="query parameter")


def no_such(name: str, value: object, known: Names, path: Path = (), what: str = "field") -> InvalidRequest:
    """The error of an unknown name: with its nearest, or with all."""
    expected = f"one of {', '.join(sorted(known))}" if known else f"no {what}"
    if near := nearest(name, known):
        expected = f"a known {what}: did you mean {near}?"
    return InvalidRequest((*path, name[:_MAX_CHARS].encode(errors="replace").decode()), _shown(value), expected)


def nearest(name: str, known: Names) -> str:
    """The known name of fewest edits away; "" if that is too many for its length, or `name` is known."""
    return "" if len(name) > _MAX_CHARS or name in known else _nearest(name, known)


@lru_cache(1024)  # of clients' own fields, which every request has
def _nearest(name: str, known: Names) -> str:
    given = _plain(name)
    for most in range(3):
        for one in known:
            plain = _plain(one)
            if most <= (len(plain) > 3) + (len(plain) > 10) and _within(given, plain, most):
                return one
    return ""


def nearest_path(path: str, known: Iterable[str]) -> str:
    """The most similar known path, with the caller's names in place of {}; "" if none is similar."""
    best = (_NEAR_PATH, "")
    given = path.split("/")
    for one in known:
        parts = one.replace(":path", "").split("/")
        # Counted from the end: a caller may leave the version in front out.
        named = [i for i in range(-1, -min(len(parts), len(given)), -1) if parts[i].startswith("{") and given[i]]
        if len(parts) == len(given) and not _within(given[1].lower(), parts[1], 1):
            continue  # another prefix or resource
        filled, plain = [*parts], [part.lower() for part in given]
        for i in named:
            filled[i], parts[i], plain[i] = given[i], "", ""
        alike = difflib.SequenceMatcher(None, "/".join(plain), "/".join(parts))
        if alike.quick_ratio() > best[0] and (ratio := alike.ratio()) > best[0]:  # the first is cheap, and never less
            best = (ratio, "/".join(filled) if len(given) <= len(filled) else one.replace(":path", ""))
    return best[1]


def _shown(value: object) -> object:
    """A JSON value for an error: a list or an object may hold passages."""
    match value:
        case list() | dict():
            return "a list" if isinstance(value, list) else "an object"
        case True | False | None:
            return json.dumps(value)
    return value


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _within(a: str, b: str, edits: int) -> bool:
    """Whether so many edits make `a` of `b`: a character more, less, in place of another, or two exchanged."""
    if abs(len(a) - len(b)) > edits:
        return False
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[same:], b[same:]
    if not a and not b:
        return True
    if not edits:
        return False
    exchanged = a[:2] == b[1::-1] and len(a) > 1 and _within(a[2:], b[2:], edits - 1)
    return exchanged or any(_within(*rest, edits - 1) for rest in ((a[1:], b), (a, b[1:]), (a[1:], b[1:])))
