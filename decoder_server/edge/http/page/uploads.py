"""Passages out of a request body: one JSON document, or NDJSON read line by line as it arrives.

Reading waits for whoever takes the passages; so backpressure reaches the client's socket. Knows no collection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.requests import Request

from decoder_server.edge.http import body
from decoder_server.edge.http.context import too_slow
from decoder_server.edge.http.fields import HALF_A_PAIR, Fields, is_utf8
from preread import Passage, UpsertResult
from preread.errors import InvalidRequest
from preread.types import join_title
from preread_edge.steps import Pace, Step

NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines")


async def from_lines(
    request: Request, max_line_bytes: int, line_seconds: float
) -> AsyncIterator[Passage | UpsertResult]:
    """One passage per line, or why it is refused; empty lines are skipped. A line over the limit is not kept.

    Args:
        line_seconds: how long a client may keep the server waiting for the end of one line.

    Raises:
        HttpError: a line did not end in time.
        InvalidRequest: a line that is no passage; `param` is its number, from 1.
        ClientDisconnect: the client left.
    """
    number = 0
    rest = bytearray()  # of a line that has not ended
    too_long = False  # what came of that line before
    waited = 0.0
    stream = request.stream()
    while True:
        began = time.monotonic()
        try:
            async with asyncio.timeout(line_seconds - waited):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise too_slow() from None
        if chunk is None:
            break
        waited = 0.0 if b"\n" in chunk else waited + time.monotonic() - began
        start = len(rest)  # what was there holds no line end
        if not start and not too_long and not chunk.strip():  # nothing but empty lines
            number += chunk.count(b"\n")
            continue
        rest += chunk
        pace = Pace()
        while (end := rest.find(b"\n", start)) >= 0:
            number += 1
            too_long = too_long or end > max_line_bytes
            line = b"" if too_long else bytes(rest[:end]).strip()
            del rest[: end + 1]
            start = 0
            if too_long:
                yield _refused("", f"line {number} is over {max_line_bytes} bytes")
                too_long = False
            elif line:
                yield _passage(await body.parse(line, f"line {number}"), f"line {number}")
            await pace.worked()  # many short lines arrive together
        if len(rest) > max_line_bytes:
            too_long = True
            rest.clear()
    if too_long:
        yield _refused("", f"line {number + 1} is over {max_line_bytes} bytes")
    elif line := bytes(rest).strip():
        yield _passage(await body.parse(line, f"line {number + 1}"), f"line {number + 1}")


def from_document(step: Step, fields: Fields) -> list[Passage | UpsertResult]:
    """`passages` of a JSON object, or why one is refused; there may be hundreds of thousands.

    Raises:
        InvalidRequest: something there is no passage.
    """
    items = fields.items("passages")
    if not items:
        raise InvalidRequest("passages", "empty" if items is not None else "absent", "a list of objects")
    passages: list[Passage | UpsertResult] = []
    for i, item in enumerate(items):
        passages.append(_passage(item, f"passages[{i}]"))
        step()
    return passages


def _passage(item: object, where: str) -> Passage | UpsertResult:
    fields = Fields(item, f"{where}.", where)
    passage_id = next(filter(None, map(fields.text, ("id", "_id", "passage_id"))), None)
    if not passage_id:
        raise InvalidRequest(f"{where}.id", "absent or empty", "the passage's id, a string")
    text = fields.raw_text("text")
    if text is None:
        raise InvalidRequest(f"{where}.text", "absent", "a string")
    text = join_title(fields.raw_text("title"), text)
    if not is_utf8(text):
        value, expected = HALF_A_PAIR
        return _refused(passage_id, f"text is {value}; expected {expected}")
    return Passage(passage_id, text)


def _refused(passage_id: str, message: str) -> UpsertResult:
    return UpsertResult(passage_id, "refused", 0, 0, False, message)
