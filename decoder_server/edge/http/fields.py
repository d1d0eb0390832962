"""Typed reading of one JSON object: null is absent, unknown fields are ignored, errors name field and expectation."""

from __future__ import annotations

from typing import Any

from preread.errors import InvalidRequest

HALF_A_PAIR = "half of a surrogate pair", "text that UTF-8 can hold"  # what it is, and what was expected
MAX_INT = 2**31 - 1  # more is never meant, and gRPC could not say it either


class Fields:
    """A JSON object. `where` goes in front of field names in errors: `passages[3].`."""

    def __init__(self, values: object, where: str = "", what: str = "body") -> None:
        if not isinstance(values, dict):
            raise InvalidRequest(what, _kind(values), "a JSON object")
        self._values: dict[str, Any] = values
        self._where = where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def or_else(self, name: str, value: object) -> Fields:
        """The same object, with `value` where it has no such field."""
        return self if name in self else Fields(self._values | {name: value}, self._where)

    def get(self, name: str) -> object:
        """The value as it came."""
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        """A string; None where there is none. An object with `text` stands for its text, as NIM and Jina write it."""
        value = self.raw_text(name)
        return None if value is None else as_text(value, self._where + name)

    def raw_text(self, name: str) -> str | None:
        """The same as it came: UTF-8 may not hold it. For a text that a status can be said of."""
        value = self._values.get(name)
        if isinstance(value, dict):
            value = value.get("text")
        if value is not None and not isinstance(value, str):
            raise InvalidRequest(self._where + name, _kind(value), "a string")
        return value

    def needed_text(self, name: str) -> str:
        """A string that must be there."""
        value = self.text(name)
        if value is None:
            raise InvalidRequest(self._where + name, "absent", "a string")
        return value

    def flag(self, name: str) -> bool | None:
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise InvalidRequest(self._where + name, _kind(value), "true or false")
        return value

    def count(self, name: str) -> int | None:
        """A whole number from 0 up; None where there is none."""
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # 3.0, as languages with one number type write it
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest(self._where + name, _kind(value), "a whole number")
        if value < 0:
            raise InvalidRequest(self._where + name, max(value, -MAX_INT), "0 or more")
        return min(value, MAX_INT)

    def word(self, name: str, words: tuple[str, ...]) -> str | None:
        """One of a few words, in any case."""
        value = self.text(name)
        if value is None:
            return None
        if value.lower() not in words:
            raise InvalidRequest(self._where + name, value[:100], f"one of {', '.join(words)}")
        return value.lower()

    def items(self, name: str) -> list[Any] | None:
        value = self._values.get(name)
        if value is not None and not isinstance(value, list):
            raise InvalidRequest(self._where + name, _kind(value), "a list")
        return value

    def texts(self, name: str) -> list[str] | None:
        """A list of strings."""
        items = self.items(name)
        return None if items is None else [as_text(item, f"{self._where}{name}[{i}]") for i, item in enumerate(items)]


def as_text(value: object, field: str) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise InvalidRequest(field, _kind(value), "a string")
    if not is_utf8(value):
        raise InvalidRequest(field, *HALF_A_PAIR)
    return value


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a string; JSON's escapes can spell half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    """The JSON name of a value's type: the value itself may be a passage."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
