"""Passages out of a request body: one JSON document, or NDJSON read line by line as it arrives.

Reading waits for whoever takes the passages; so backpressure reaches the client's socket. Knows no collection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.requests import Request

from decoder_server.errors import InvalidRequest
from decoder_server.http import body
from decoder_server.http.context import too_slow
from decoder_server.http.fields import Fields
from preread.client import Passage
from preread.edge.steps import Step
from preread.passages import join_title

NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines")

LINES_AT_ONCE = 100


async def from_lines(request: Request, max_line_bytes: int, line_seconds: float) -> AsyncIterator[Passage]:
    """One passage per line; empty lines are skipped.

    Args:
        line_seconds: how long a client may keep the server waiting for the end of one line.

    Raises:
        HttpError: a line did not end in time.
        InvalidRequest: a line that is no passage; `param` is its number, from 1.
        TooLarge: a line over the limit.
        ClientDisconnect: the client left.
    """
    number = 0
    rest = bytearray()
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
        rest += chunk
        while (end := rest.find(b"\n", start)) >= 0:
            number += 1
            if end > max_line_bytes:
                raise body.TooLarge(max_line_bytes)
            line = bytes(rest[:end]).strip()
            del rest[: end + 1]
            start = 0
            if line:
                yield _passage(await body.parse(line, f"line {number}"), f"line {number}")
            if not number % LINES_AT_ONCE:
                await asyncio.sleep(0)  # many short lines arrive together
        if len(rest) > max_line_bytes:
            raise body.TooLarge(max_line_bytes)
    if line := bytes(rest).strip():
        yield _passage(await body.parse(line, f"line {number + 1}"), f"line {number + 1}")


def from_document(step: Step, fields: Fields) -> list[Passage]:
    """`passages` of a JSON object; there may be hundreds of thousands.

    Raises:
        InvalidRequest: something there is no passage.
    """
    items = fields.items("passages")
    if not items:
        raise InvalidRequest("passages", "empty" if items is not None else "absent", "a list of objects")
    passages = []
    for i, item in enumerate(items):
        passages.append(_passage(item, f"passages[{i}]"))
        step()
    return passages


def _passage(item: object, where: str) -> Passage:
    fields = Fields(item, f"{where}.", where)
    passage_id = next(filter(None, map(fields.text, ("id", "_id", "passage_id"))), None)
    if not passage_id:
        raise InvalidRequest(f"{where}.id", "absent or empty", "the passage's id, a string")
    return Passage(passage_id, join_title(fields.text("title"), fields.needed_text("text")))
