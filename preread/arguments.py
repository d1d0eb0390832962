"""Arguments of a call, checked before they go on the wire. The server checks what a value means."""

import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from preread.errors import FieldViolation, InvalidRequest
from preread.values import Candidate, Passage, id_text, join_title

ID_KEYS, TEXT_KEYS = ("id", "_id", "passage_id"), ("text", "title")
MAX_SECONDS = 1e9  # beyond some centuries gRPC's clock overflows, and the call ends immediately
_INT32 = 1 << 31
_METADATA_NAME = re.compile(r"[0-9a-z_.-]+(?<!-bin)")


class Argument:
    """A value and the name of its field: `candidates[3].text`. Each method is a check that returns the value to send.

    TypeError is another kind of thing than the field holds, InvalidRequest a value that no message can carry.
    """

    __slots__ = ("field", "value")

    def __init__(self, field: str, value: Any) -> None:
        self.field, self.value = field, value

    def text(self) -> str:
        """A string that UTF-8 can carry."""
        if not isinstance(self.value, str):
            raise self.wrong("a string")
        value = str.__str__(self.value)
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            half = f"half a surrogate pair, U+{ord(value[exc.start]):04X}, at {exc.start}"
            raise self.invalid(f"not valid Unicode ({half})", "text that UTF-8 can carry") from None
        return value

    def text_or_none(self) -> str | None:
        return None if self.value is None else self.text()

    def address(self) -> str:
        """host:port, or a gRPC target such as dns:///name:port or unix:path."""
        text = self.text()
        if ":" not in text or not text.isprintable() or text.startswith(("http://", "https://")):
            raise self.invalid(ascii(text), "host:port")
        if "," in text and not text.startswith(("ipv4:", "ipv6:", "unix:")):
            raise self.invalid(ascii(text), "one host:port; several are a list")
        return text

    def addresses(self) -> tuple[str, ...]:
        """One address, or a list of them."""
        if isinstance(self.value, str):
            return (self.address(),)
        if not isinstance(self.value, Iterable) or isinstance(self.value, bytes | bytearray | Mapping):
            raise self.wrong("host:port, or a list of them")
        if not (found := tuple(one.address() for one in self.each())):
            raise self.invalid("an empty list", "at least one host:port")
        return found

    def file_contents(self) -> bytes | None:
        """Of the file at a path; None: there is none."""
        if self.value is None:
            return None
        if not isinstance(self.value, str | os.PathLike):
            raise self.wrong("a path")
        try:
            return Path(self.value).read_bytes()
        except (OSError, ValueError):
            raise self.invalid(ascii(os.fspath(self.value)), "a file that can be read") from None

    def integer(self, at_least: int = -_INT32) -> int:
        """An int32; None and 0 are the default."""
        try:
            number = operator.index(0 if self.value is None else self.value)
        except TypeError:
            raise self.wrong("an integer") from None
        if isinstance(self.value, bool):
            raise self.wrong("an integer")
        if not -_INT32 <= number < _INT32:
            raise self.invalid(_show(self.value), f"an integer below {_INT32:,}")
        if number < at_least:
            raise self.invalid(str(self.value), f"at least {at_least}")
        return number

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.wrong("True or False")
        return self.value

    def number(self) -> float:
        """A float, 0 or more."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.wrong("a number")
        if not 0 <= self.value < math.inf:
            raise self.invalid(str(self.value), "0 or more")
        return float(self.value)

    def seconds(self) -> float | None:
        """A time limit; None: the default."""
        if self.value is None:
            return None
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.wrong("a number of seconds, or None")
        if not 0 < self.value <= MAX_SECONDS:
            raise self.invalid(_show(self.value), f"seconds, more than 0 and at most {MAX_SECONDS:g}, or None")
        return float(self.value)

    def secret(self) -> str | None:
        """A value of call metadata that errors do not show; None: absent."""
        if self.value is not None and not isinstance(self.value, str):
            raise TypeError(f"{self.field} is of type {type(self.value).__name__}; expected a string")
        if self.value is not None and not (self.value.isascii() and self.value.isprintable()):
            raise self.invalid("not printable ASCII", "printable ASCII characters")
        return self.value

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """A mapping of call metadata as HTTP/2 takes it. Its values may be secret."""
        if not isinstance(self.value, Mapping):
            raise TypeError(f"metadata is of type {type(self.value).__name__}; expected a mapping, or a function")
        for name, value in self.value.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(f"metadata has {_show(name)}: {type(value).__name__}; expected strings")
            if not _METADATA_NAME.fullmatch(name.lower()):
                expected = "names of letters, digits, '_', '-' and '.', not ending in -bin"
                raise self.invalid(f"named {_show(name)}", expected)
            Argument(f"metadata[{name.lower()!r}]", value).secret()
        return tuple((name.lower(), value) for name, value in self.value.items())

    def items(self) -> Iterable[Any]:
        """The values of anything iterable but a string, bytes or a mapping, which would give their parts."""
        if isinstance(self.value, str | bytes | bytearray):
            raise self.wrong("a list")
        if isinstance(self.value, Mapping):
            kind = type(self.value).__name__
            raise TypeError(f"{self.field} is a {kind}, which would give its keys; expected a list")
        if type(self.value).__name__ == "DataFrame":
            advice = "expected a list, such as frame.to_dict('records')"
            raise TypeError(f"{self.field} is a DataFrame, which would give names of columns; {advice}")
        try:
            parts: Iterator[Any] = iter(self.value)
        except TypeError:
            raise self.wrong("a list") from None
        return parts

    def each(self) -> "Iterator[Argument]":
        return (Argument(f"{self.field}[{i}]", value) for i, value in enumerate(self.items()))

    def texts(self) -> list[str]:
        return [one.text() for one in self.each()]

    def passage(self) -> tuple[str, str]:
        """(id, text) of a Passage, or of a mapping as `preread index` reads it; of no pair: which would be the id?"""
        if isinstance(self.value, Passage):
            return self._of("passage_id").text(), self._of("text").text()
        passage_id, text = self._row("a Passage, or a mapping {id, text}")
        if passage_id is None or text is None:
            raise TypeError(f"{self.field} has no {'id' if passage_id is None else 'text'}; found {self._keys()}")
        return passage_id, text

    def candidate(self, *, is_id: bool) -> tuple[str | None, str | None]:
        """(id, text) of a Candidate, of a mapping with one or both, or of a string, which is an id or a text."""
        if isinstance(self.value, str):
            return (self.text(), None) if is_id else (None, self.text())
        if isinstance(self.value, Candidate):
            found, keys = (self._of("passage_id").text_or_none(), self._of("text").text_or_none()), ""
        else:
            found = self._row("a str, a Candidate, or a mapping {id, text}")
            keys = f"; found {self._keys()}"
        if found == (None, None):
            raise TypeError(f"{self.field} has neither id nor text{keys}")
        return found

    def _of(self, name: str) -> "Argument":
        return Argument(f"{self.field}.{name}", getattr(self.value, name))

    def _row(self, expected: str) -> tuple[str | None, str | None]:
        """Id and text of a mapping, or else a TypeError; a title goes before the text."""
        row, passage_id = self.value, None
        if not isinstance(row, Mapping):
            raise self.wrong(expected)
        for key in row:
            if key not in (*ID_KEYS, *TEXT_KEYS):
                raise TypeError(f"{self.field} has the key {_show(key)}; expected id, text and title")
        named = [key for key in ID_KEYS if row.get(key) is not None]
        if len(named) > 1:
            raise TypeError(f"{self.field} has both {named[0]} and {named[1]}; expected one of them")
        if named:
            argument = Argument(f"{self.field}.{named[0]}", row[named[0]])
            if (value := id_text(argument.value)) is None:
                raise argument.wrong("a string or an integer")
            passage_id = Argument(argument.field, value).text()
        text, title = (Argument(f"{self.field}.{key}", row.get(key)).text_or_none() for key in TEXT_KEYS)
        return passage_id, text if text is None else join_title(title, text)

    def _keys(self) -> str:
        return ", ".join(f"{key}{' (None)' if it is None else ''}" for key, it in self.value.items()) or "no keys"

    def wrong(self, expected: str) -> TypeError:
        return TypeError(f"{self.field} is {_show(self.value)}; expected {expected}")

    def invalid(self, value: str, expected: str) -> InvalidRequest:
        """The error of a value that cannot be sent, in the form of a server's."""
        violation = FieldViolation(self.field, f"{value}; expected {expected}")
        return InvalidRequest.received(f"{self.field} is {violation.description}", violations=(violation,))


def _show(value: object) -> str:
    """A value for a message: its type, and its beginning in ASCII, which every terminal can print; on one line."""
    if value is None:
        return "None"
    kind, shown = type(value).__name__, " ".join(ascii(value).split())
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind} ({shown if len(shown) <= 60 else shown[:57] + '...'})"
