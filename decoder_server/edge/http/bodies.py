"""Bytes to JSON to typed structs: the class that a body is read into checks it, and describes it in /openapi.json.

Null is absent, unknown fields are ignored, and an error names the path of the field. The types here are what msgspec
does not have: strings that UTF-8 must be able to hold, counts that clients write as 3.0, texts inside objects.
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar, Self, TypeVar

import msgspec

from decoder_server.edge.http.json_steps import DECODER, parse_in_steps, reason
from preread.errors import InvalidRequest, Path
from preread_edge.steps import SMALL_BYTES, stepped

T = TypeVar("T")
Schema = dict[str, Any]

MAX_INT = 2**31 - 1  # gRPC's fields hold no more
HALF_A_PAIR = "half of a surrogate pair", "text that UTF-8 can hold"  # value and expectation

_KINDS = {
    "object": "an object", "array": "a list", "str": "a string", "bool": "true or false", "int": "a whole number",
    "float": "a number", "null": "null",
}  # fmt: skip
_AT = re.compile(r" - at `\$(.*)`$")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_EXPECTED = re.compile(r"Expected `([^`]+)`( of length \d+)?, got `?([^`]+)`?")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")


async def parse(data: bytes | bytearray, what: str = "body") -> Any:
    """A JSON document, NaN and infinity excluded.

    Raises:
        InvalidRequest: anything else; a large document of too many values, or too deep.
    """
    if len(data) > SMALL_BYTES:
        return await stepped(parse_in_steps, data, what)
    try:
        return DECODER.decode(data.decode(json.detect_encoding(data), "surrogatepass"))
    except RecursionError:
        raise InvalidRequest(what, "too deeply nested", "JSON") from None
    except ValueError as exc:
        raise InvalidRequest(what, f"not JSON ({reason(exc)})" if data else "empty", "JSON") from None


class RawText(str):
    """A string, or an object with `text`, as NIM and Jina write it. UTF-8 may be unable to hold it."""

    schema: ClassVar[Schema] = {"type": "string"}

    @classmethod
    def read(cls, value: object) -> Self:
        if isinstance(value, dict):
            value = value.get("text")
        if not isinstance(value, str):
            raise InvalidRequest((), kind_of(value), "a string")
        return cls(value)

    @property
    def is_utf8(self) -> bool:
        """Whether UTF-8 can hold it: JSON's escapes can spell half a surrogate pair."""
        try:
            self.encode()
        except UnicodeEncodeError:
            return False
        return True


class Text(RawText):
    """A string as RawText reads it, and UTF-8 can hold it."""

    @classmethod
    def read(cls, value: object) -> Self:
        text = super().read(value)
        if not text.is_utf8:
            raise InvalidRequest((), *HALF_A_PAIR)
        return cls(text)


class Query(Text):
    """A text whose object form is published."""

    schema: ClassVar[Schema] = {
        "anyOf": [Text.schema, {"type": "object", "required": ["text"], "properties": {"text": Text.schema}}]
    }


class Word(Text):
    """One of `words`, in any case; in lower case once read. An empty one is absent."""

    words: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def read(cls, value: object) -> Self:
        word = super().read(value).lower()
        known = list(dict.fromkeys(map(str.lower, cls.words)))
        if word not in known:
            raise InvalidRequest((), word[:100], f"one of {', '.join(known)}")
        return cls(word)


class Count(int):
    """A whole number from 0 up: 3.0 is 3, and more than MAX_INT is MAX_INT."""

    schema: ClassVar[Schema] = {"type": "integer", "minimum": 0}

    @classmethod
    def read(cls, value: object) -> Self:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # as languages with one number type write it
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest((), kind_of(value), "a whole number")
        if value < 0:
            raise InvalidRequest((), str(max(value, -MAX_INT)), "0 or more")
        return cls(min(value, MAX_INT))


def read(kind: type[T], value: Any, root: Path = ()) -> T:
    """A JSON value as a struct, or as anything that structs may hold.

    Args:
        root: where the value stands in the body.

    Raises:
        InvalidRequest: the first field that does not fit; "body" where the value as a whole does not.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=lambda custom, item: custom.read(item))
    except msgspec.ValidationError as exc:
        raise _translated(exc, root) from None
    except UnicodeEncodeError:  # the name of a field inside an object
        raise InvalidRequest(root or ("body",), *HALF_A_PAIR) from None


def _translated(error: msgspec.ValidationError, root: Path) -> InvalidRequest:
    """The error with a path and JSON's names of types, which msgspec has in its message only."""
    message, cause = str(error), error.__cause__
    at = _AT.search(message)
    path = root + tuple(name or int(index) for name, index in _STEP.findall(at[1] if at else ""))
    if isinstance(cause, InvalidRequest):  # of a type here, with a path relative to the value
        return InvalidRequest(path + cause.path or ("body",), cause.value, cause.expected)
    if missing := _MISSING.match(message):
        return InvalidRequest((*path, missing[1]), "absent", "a value")
    path = path or ("body",)
    if wrong := _EXPECTED.match(message):
        expected = " or ".join(_KINDS.get(kind, kind) for kind in wrong[1].split(" | ") if kind != "null")
        return InvalidRequest(path, _KINDS.get(wrong[3], wrong[3]), expected + (wrong[2] or ""))
    return InvalidRequest(path, "not valid", "a value as /openapi.json describes it")


def kind_of(value: object) -> str:
    """The JSON name of a value's type: the value itself may be a passage."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "absent"}
    return names.get(type(value), "a number")
