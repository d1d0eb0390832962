"""Which dialect a body is in. The only place that decides."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from decoder_server.http import mixedbread, nim, score, superset, tei, voyage
from decoder_server.http.body import Json
from decoder_server.http.fields import Fields
from decoder_server.http.question import Ask


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one family of clients is answered."""

    name: str
    answer: Callable[[Fields, Ask], Awaitable[Json]]


TEI = Dialect("tei", tei.answer)
NIM = Dialect("nim", nim.answer)
VOYAGE = Dialect("voyage", voyage.answer)
MIXEDBREAD = Dialect("mixedbread", mixedbread.answer)
SCORE = Dialect("score", score.answer)
INFINITY = Dialect("infinity", superset.answer_infinity)
SUPERSET = Dialect("superset", superset.answer)

FORCED = {"tei": TEI, "voyage": VOYAGE, "infinity": INFINITY}  # by the first part of the path


# A string may be cut off. Were its end required, one of escaped quotes would be looked for from each of them again.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{}:,]', re.DOTALL)


def guess(data: bytes) -> Dialect:
    """The dialect of a body by its beginning, or by all of it where it is no JSON: as far as its fields can be told."""
    depth, last = 0, b""
    names: dict[str, object] = {}
    for match in _TOKEN.finditer(data):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
        elif token in (b"}", b"]"):
            depth -= 1
        elif token == b":" and depth == 1:
            names[last[1:-1].decode(errors="replace")] = True
        last = token
    return pick(Fields(names))


def pick(body: Fields) -> Dialect:
    """By what the body has, as wire.md's table says; first match counts."""
    if "texts" in body:
        return TEI
    if "passages" in body:
        return NIM
    if "input" in body:  # before Voyage, with which it shares top_k
        return MIXEDBREAD
    if "text_1" in body or "pairs" in body:
        return SCORE
    if "truncation" in body or ("top_k" in body and "top_n" not in body):
        return VOYAGE
    return SUPERSET
