"""JSON values read as what they are to be, or an error that names field, value and expectation.

The class that a body is read into checks it, and describes it in /openapi.json. Null is absent; unknown fields are
ignored, unless the class forbids them. The types here are what msgspec does not have: text that UTF-8 can hold,
counts written as 3.0.
"""

import re
from typing import Any, ClassVar, Self, TypeVar

import msgspec
from msgspec import Struct

from decoder_server.edge.http import names
from preread.errors import InvalidRequest, Path

T = TypeVar("T")
Schema = dict[str, Any]

MAX_INT = 2**31 - 1  # gRPC's fields hold no more

_KINDS = {
    "object": "an object", "array": "a list", "str": "a string", "bool": "true or false", "int": "a whole number",
    "float": "a number", "null": "null",
}  # fmt: skip
_AT = re.compile(r" - at `\$(.*)`$")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_EXPECTED = re.compile(r"Expected `([^`]+)`( of length \d+)?, got `?([^`]+)`?")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_UNKNOWN = "Object contains unknown field "


class RawText(str):
    """A string, or an object with `text`, as NIM and Jina write it. UTF-8 may be unable to hold it."""

    HALF_A_PAIR: ClassVar = "half of a surrogate pair", "text that UTF-8 can hold"  # value and expectation
    schema: ClassVar[Schema] = {"type": "string"}

    @classmethod
    def read(cls, value: object) -> Self:
        if isinstance(value, dict):
            value = value.get("text")
        if not isinstance(value, str):
            raise InvalidRequest((), kind_of(value), "a string")
        return cls(value)

    @staticmethod
    def is_utf8(text: str) -> bool:
        """Whether UTF-8 can hold a string: JSON's escapes can spell half a surrogate pair."""
        try:
            return text.isascii() or bool(text.encode())
        except UnicodeEncodeError:
            return False


class Text(RawText):
    """A string as RawText reads it, and UTF-8 can hold it."""

    @classmethod
    def read(cls, value: object) -> Self:
        text = super().read(value)
        if not cls.is_utf8(text):
            raise InvalidRequest((), *RawText.HALF_A_PAIR)
        return text


class Query(Text):
    """A text whose object form is published."""

    _OBJECT: ClassVar[Schema] = {"type": "object", "required": ["text"], "properties": {"text": Text.schema}}
    schema: ClassVar[Schema] = {"anyOf": [Text.schema, _OBJECT]}


class Word(Text):
    """One of `words`, in any case; in lower case once read."""

    words: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def read(cls, value: object) -> Self:
        word = super().read(value).lower()
        if word not in cls.words:
            raise InvalidRequest((), word[:100], f"one of {', '.join(cls.words)}")
        return cls(word)


class Switch(int):
    """True or false."""

    schema: ClassVar[Schema] = {"type": "boolean"}
    _WORDS: ClassVar = dict.fromkeys(("1", "on", "t", "true", "y", "yes"), True) | dict.fromkeys(
        ("0", "off", "f", "false", "n", "no"), False
    )

    @classmethod
    def coerce(cls, value: object) -> object:
        """A word or number that pydantic reads as true or false; anything else as it is."""
        if isinstance(value, str):
            return cls._WORDS.get(value.lower(), value)
        return bool(value) if isinstance(value, (int, float)) and value in (0, 1) else value

    @classmethod
    def read(cls, value: object) -> Self:
        if not isinstance(value, bool):
            raise InvalidRequest((), value[:100] if isinstance(value, str) else kind_of(value), "true or false")
        return cls(value)


class Count(int):
    """A whole number from 0 up: 3.0 is 3, and more than MAX_INT is MAX_INT."""

    schema: ClassVar[Schema] = {"type": "integer", "minimum": 0}
    _DIGITS: ClassVar = re.compile(r"\s*([+-]?[0-9]+(?:_[0-9]+)*)(?:\.0+)?\s*")

    @classmethod
    def coerce(cls, value: object) -> object:
        """Digits, true and false as pydantic reads them as a whole number; anything else as it is."""
        if isinstance(value, str) and len(value) <= 100 and (digits := cls._DIGITS.fullmatch(value)):
            return int(digits[1])
        return int(value) if isinstance(value, bool) else value

    @classmethod
    def read(cls, value: object) -> Self:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # as languages with one number type write it
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest((), value[:100] if isinstance(value, str) else kind_of(value), "a whole number")
        if value < 0:
            raise InvalidRequest((), str(max(value, -MAX_INT)), "0 or more")
        return cls(min(value, MAX_INT))


def kind_of(value: object) -> str:
    """The JSON name of a value's type: the value itself may be a passage."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "absent"}
    return names.get(type(value), "a number")


def read(kind: type[T], value: Any, root: Path = (), *, lax: bool = False) -> T:
    """A JSON value, which stands at `root` in the body, as a struct, or as anything that structs may hold.

    `lax`: what servers built on pydantic coerce is coerced: "true", "2", 1 for true.
    """

    def custom(kind: Any, item: Any) -> Any:
        return kind.read(kind.coerce(item) if lax and hasattr(kind, "coerce") else item)

    try:
        return msgspec.convert(value, kind, dec_hook=custom)
    except UnicodeEncodeError:  # the name of a field inside an object
        raise InvalidRequest(root or ("body",), *RawText.HALF_A_PAIR) from None
    except msgspec.ValidationError as exc:
        # The path and JSON's names of types, which msgspec has in its message only.
        message, cause = str(exc), exc.__cause__
        at = _AT.search(message)
        path = root + tuple(name or int(index) for name, index in _STEP.findall(at[1] if at else ""))
        if isinstance(cause, InvalidRequest):  # of a type here, with a path relative to the value
            raise InvalidRequest(path + cause.path or ("body",), cause.value, cause.expected) from None
        if message.startswith(_UNKNOWN) and path == root and isinstance(kind, type) and issubclass(kind, Struct):
            known = names.fields_of(kind)
            unknown = next(name for name in value if name not in known)
            raise names.no_such(unknown, value[unknown], known, root) from None
        if missing := _MISSING.match(message):
            raise InvalidRequest((*path, missing[1]), "absent", "a value") from None
        found, expected = "not valid", "a value as /openapi.json describes it"
        if wrong := _EXPECTED.match(message):
            kinds = [_KINDS.get(name, name) for name in wrong[1].split(" | ") if name != "null"]
            found, expected = _KINDS.get(wrong[3], wrong[3]), " or ".join(kinds) + (wrong[2] or "")
        raise InvalidRequest(path or ("body",), found, expected) from None
