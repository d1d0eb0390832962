"""Large JSON documents, read and written in steps next to the event loop. Small ones are left to json alone.

A document is scanned first, 64 KiB at a time: where the characters are that are not inside strings, how many, how
deep. A hostile one is rejected before anything is made of it, and every other is cut into runs of elements, or of
one long string's characters, that json reads in a millisecond each.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from preread.errors import InvalidRequest
from preread_edge.steps import SMALL_BYTES, Step, stepped

Json = Any

BLOCK_BYTES = 64 << 10
# Brackets, commas and colons: each costs at most 60 bytes of memory. A passage of an upload has six.
MAX_TOKENS = 1_000_000
MAX_DEPTH = 100
SHORT_VALUES = 1000  # are written at once

_QUOTE, _SLASH, _COMMA, _COLON = b'"\\,:'
_IS_TOKEN = np.isin(np.arange(256), np.frombuffer(b"[]{},:", np.uint8))
_LEVEL = np.zeros(256, np.int8)
_LEVEL[np.frombuffer(b"[{", np.uint8)], _LEVEL[np.frombuffer(b"]}", np.uint8)] = 1, -1
_SPACE = b" \t\n\r"
_PAIR = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]")


class _NoConstant(ValueError):  # noqa: N818 - says what it is
    """NaN or an infinity."""


def _no_constant(name: str) -> NoReturn:
    raise _NoConstant(f"{name} is not JSON")


# NaN and infinity are not JSON: the one never reads them, and the other raises on a NaN, which would be a bug.
DECODER = json.JSONDecoder(parse_constant=_no_constant)
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _reason(error: ValueError) -> str:
    """The cause in the words of json, which are meant for writers of JSON; those of other exceptions are not."""
    if isinstance(error, (json.JSONDecodeError, _NoConstant)):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"bytes that are not {error.encoding}, from byte {error.start} on"
    return "a number of too many digits"


async def parse(data: bytes | bytearray, what: str = "body") -> Json:
    """A JSON document, NaN and infinity excluded; a large one may have neither too many values nor too many levels."""
    if len(data) > SMALL_BYTES:
        return await stepped(parse_in_steps, data, what)
    try:
        return DECODER.decode(data.decode(json.detect_encoding(data), "surrogatepass"))
    except RecursionError:
        raise InvalidRequest(what, "too deeply nested", "JSON") from None
    except ValueError as exc:
        raise InvalidRequest(what, f"not JSON ({_reason(exc)})" if data else "empty", "JSON") from None


def parse_in_steps(step: Step, data: bytes | bytearray, what: str) -> Json:
    """A large JSON document of UTF-8, for `stepped`."""
    if data.startswith(codecs.BOM_UTF8):
        data = data[len(codecs.BOM_UTF8) :]
    return _Document(step, data, what).value(0, len(data))


class _Document:
    def __init__(self, step: Step, data: bytes | bytearray, what: str) -> None:
        self._step, self._data, self._what = step, data, what
        self._view = np.frombuffer(data, np.uint8)
        self._tokens = self._scan()
        kinds = self._view[self._tokens]
        self._depth = np.cumsum(_LEVEL[kinds], dtype=np.int32)
        step()
        if self._depth.size and self._depth.max() > MAX_DEPTH:
            raise InvalidRequest(what, "too deeply nested", f"JSON, at most {MAX_DEPTH} levels deep")

    def value(self, begin: int, end: int) -> Json:
        """The value of a range with nothing but space around it."""
        begin, end = self._strip(begin, end)
        if end - begin <= BLOCK_BYTES:
            return self._loads(begin, end)
        first, last = self._data[begin], self._data[end - 1]
        if first == _QUOTE and last == _QUOTE:
            return self._string(begin + 1, end - 1)
        if (first, last) == (0x5B, 0x5D):
            items: list[Json] = []
            for a, b in self._runs(begin, end):
                items += self._loads(a, b, "[", "]") if b - a <= BLOCK_BYTES else [self.value(a, b)]
            return items
        if (first, last) != (0x7B, 0x7D):
            raise self._problem(begin, "expecting a value")
        members: dict[str, Json] = {}
        for a, b in self._runs(begin, end):
            if b - a <= BLOCK_BYTES:
                members |= self._loads(a, b, "{", "}")
                continue
            index = int(np.searchsorted(self._tokens, a))
            colon = int(self._tokens[index]) if index < self._tokens.size else b
            if colon >= b or self._data[colon] != _COLON:
                raise self._problem(a, "expecting a name and a colon")
            name = self.value(a, colon)
            if not isinstance(name, str):
                raise self._problem(a, "expecting a name")
            members[name] = self.value(colon + 1, b)
        return members

    def _runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The elements of the array or object at [begin, end): as many at a time as fit a block, or a longer one."""
        first, last = np.searchsorted(self._tokens, [begin, end - 1])
        inside = self._tokens[first + 1 : last]
        depth = self._depth[first]
        if self._depth[last] != depth - 1 or (inside.size and self._depth[first + 1 : last].min() < depth):
            raise self._problem(begin, "brackets do not match")
        commas = inside[(self._depth[first + 1 : last] == depth) & (self._view[inside] == _COMMA)]
        self._step()
        if not commas.size and self._strip(begin + 1, end - 1)[0] == end - 1:
            return
        ends = np.append(commas, end - 1)
        a, i = begin + 1, 0
        while i < ends.size:
            # the last element that ends within a block of the first one's beginning; at least one
            j = max(i, int(np.searchsorted(ends, a + BLOCK_BYTES, side="right")) - 1)
            b = int(ends[j])
            if i == j and self._strip(a, b)[0] == b:
                raise self._problem(a, "expecting a value")
            yield a, b
            a, i = b + 1, j + 1

    def _string(self, begin: int, end: int) -> str:
        if (index := int(np.searchsorted(self._tokens, begin))) < self._tokens.size and self._tokens[index] < end:
            raise self._problem(int(self._tokens[index]), "expecting a comma")
        pieces = []
        while begin < end:
            cut = self._cut(begin, min(end, begin + BLOCK_BYTES), end)
            pieces.append(self._loads(begin, cut, '"', '"'))
            begin = cut
        self._step()
        return "".join(pieces)

    def _cut(self, begin: int, cut: int, end: int) -> int:
        """The last place up to `cut` where a string can be cut: in no escape, pair of escapes or character."""
        if cut == end:
            return end
        starts = _escapes(self._view[begin:cut])[0] + begin
        late = starts[starts >= cut - 12]
        if late.size:
            at = int(late[0])
            is_second = starts.size > late.size and starts[-late.size - 1] == at - 6 and _PAIR.match(self._data, at - 6)
            return at - 6 if is_second else at
        while self._data[cut] & 0xC0 == 0x80 and cut > begin + 1:
            cut -= 1
        return cut

    def _loads(self, begin: int, end: int, before: str = "", after: str = "") -> Json:
        try:
            return DECODER.decode(before + self._data[begin:end].decode("utf-8", "surrogatepass") + after)
        except RecursionError:
            raise InvalidRequest(self._what, "too deeply nested", "JSON") from None
        except json.JSONDecodeError as exc:
            raise self._problem(begin + exc.pos - len(before), exc.msg) from None
        except ValueError as exc:
            raise self._problem(begin, _reason(exc)) from None
        finally:
            self._step()

    def _strip(self, begin: int, end: int) -> tuple[int, int]:
        while (block := self._data[begin : min(end, begin + BLOCK_BYTES)]) and not block.strip(_SPACE):
            begin += len(block)
            self._step()
        begin += len(block) - len(block.lstrip(_SPACE))
        while (block := self._data[max(begin, end - BLOCK_BYTES) : end]) and not block.strip(_SPACE):
            end -= len(block)
            self._step()
        return begin, end - len(block) + len(block.rstrip(_SPACE))

    def _scan(self) -> NDArray[np.int64]:
        """Where brackets, commas and colons stand outside strings."""
        found = [np.zeros(0, np.int64)]
        num_found, in_string, is_escaped = 0, 0, False
        for begin in range(0, self._view.size, BLOCK_BYTES):
            block = self._view[begin : begin + BLOCK_BYTES]
            escapes, carried = _escapes(block, is_escaped)
            quotes = np.flatnonzero(block == _QUOTE)
            if quotes.size and (escapes.size or is_escaped):
                escaped = np.zeros(block.size + 1, bool)
                escaped[0], escaped[escapes + 1] = is_escaped, True
                quotes = quotes[~escaped[quotes]]
            tokens = np.flatnonzero(_IS_TOKEN[block])
            if quotes.size or in_string:
                tokens = tokens[(np.searchsorted(quotes, tokens) + in_string) % 2 == 0]
            in_string, is_escaped = (in_string + quotes.size) % 2, carried
            num_found += tokens.size
            if num_found > MAX_TOKENS:
                expected = f"at most {MAX_TOKENS:,}; passages can come as NDJSON, a line each"
                raise InvalidRequest(self._what, f"more than {MAX_TOKENS:,} brackets, commas and colons", expected)
            found.append(tokens + begin)
            self._step()
        if in_string:
            raise self._problem(self._view.size, "a string does not end")
        return np.concatenate(found)

    def _problem(self, position: int, message: str) -> InvalidRequest:
        return InvalidRequest(self._what, f"not JSON ({message[:200]}, at byte {position})", "JSON")


def _escapes(block: NDArray[np.uint8], is_escaped: bool = False) -> tuple[NDArray[np.int64], bool]:
    """Where escapes begin, and if the last goes on behind the block, as one before goes on in it if `is_escaped`."""
    slashes = np.flatnonzero(block == _SLASH)
    if is_escaped and slashes.size and slashes[0] == 0:
        slashes = slashes[1:]
    if not slashes.size:
        return slashes, False
    # Of a run of backslashes every second one is escaped by the one before.
    numbers = np.arange(slashes.size)
    begins = np.maximum.accumulate(np.where(np.diff(slashes, prepend=-2) != 1, numbers, 0))
    starts = slashes[(numbers - begins) % 2 == 0]
    return starts, bool(starts[-1] == block.size - 1)


def render_in_steps(step: Step, document: Json) -> list[bytes]:
    """UTF-8 of a document in parts of about a block; a NaN would be a bug and raises."""
    parts, waiting, num_waiting = list[bytes](), list[str](), 0
    for piece in pieces(document):
        waiting.append(piece)
        num_waiting += len(piece)
        if num_waiting >= BLOCK_BYTES:
            parts.append("".join(waiting).encode())
            waiting, num_waiting = [], 0
        step()
    parts.append("".join(waiting).encode())
    return parts


def pieces(document: Json) -> Iterator[str]:
    """The text of a document: as much at a time as json writes in a millisecond."""
    inside: list[Iterator[tuple[str, Json]]] = [iter([("", document)])]  # of containers that are not short, outer first
    ends = [""]
    while inside:
        for before, value in inside[-1]:
            yield before
            if _is_short(value):
                yield ENCODER.encode(value)
            elif isinstance(value, str):
                yield '"'
                for begin in range(0, len(value), BLOCK_BYTES):
                    yield ENCODER.encode(value[begin : begin + BLOCK_BYTES])[1:-1]
                yield '"'
            else:
                inside.append(_members(value))
                ends.append("}" if isinstance(value, dict) else "]")
                break
        else:
            inside.pop()
            yield ends.pop()


def _members(container: Json) -> Iterator[tuple[str, Json]]:
    """Values, each with the text before it."""
    if isinstance(container, dict):
        for i, (name, value) in enumerate(container.items()):
            yield f"{',' if i else '{'}{ENCODER.encode(str(name))}:", value
    else:
        for i, value in enumerate(container):
            yield "," if i else "[", value


def _is_short(document: Json) -> bool:
    """Whether a document has at most SHORT_VALUES values and names, and a block of characters in strings."""
    found, num_characters = [document], 0
    for one in found:  # which grows
        if isinstance(one, str):
            num_characters += len(one)
        elif isinstance(one, (dict, list)):
            if len(found) + len(one) > SHORT_VALUES:
                return False
            found += one
            if isinstance(one, dict):
                found += one.values()
        if num_characters > BLOCK_BYTES:
            return False
    return True
