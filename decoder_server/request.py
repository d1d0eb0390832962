"""A rerank request and its answer as plain values, and the limits a request must keep.

Knows neither protobuf nor HTTP: each edge unpacks into these and packs out of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from decoder_server.config import DecoderConfig
from decoder_server.errors import InvalidRequest
from preread.types import Stage, stages_problem

MAX_NAME_CHARS = 128  # as cache.record has it; a longer one is not even looked up


class OnMiss(Enum):
    """What to do with a candidate whose states are not stored."""

    ENCODE = "encode"
    SKIP = "skip"
    FAIL = "fail"


class Status(Enum):
    """What became of one candidate. Names are those of the wire enum."""

    HIT = "hit"
    ENCODED = "encoded"
    MISSING = "missing"
    CORRUPT = "corrupt"
    TOO_LONG = "too_long"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A passage to score: an id, inline text, or both (the text wins where the stored one differs)."""

    index: int  # position in the request
    passage_id: str | None
    text: str | None
    problem: str = ""  # what the edge found wrong with it: it fails, alone


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """One query and its candidates. None means the served model's default."""

    query: str
    candidates: tuple[Candidate, ...]
    instruction: str | None = None
    collection: str | None = None
    top_n: int = 0  # 0: all
    compression_ratio: int | None = None
    on_miss: OnMiss | None = None
    return_text: bool = False
    model: str = ""  # "": the first served one
    stages: tuple[Stage, ...] = ()  # in place of compression_ratio
    one_ratio: bool = False  # every score must compare with every other: the server's default may not be a cascade


@dataclass(frozen=True, slots=True)
class StageScore:
    """What one stage of a cascade said of a candidate."""

    compression_ratio: int
    margin: float
    score: float
    num_states: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one candidate."""

    index: int
    passage_id: str
    status: Status
    margin: float | None = None  # float32; None: not scored
    score: float | None = None
    text: str | None = None
    message: str = ""
    num_states: int = 0
    compression_ratio: int = 0  # 0: the passage was read as text
    truncated: bool = False
    num_passage_tokens: int = 0  # of a scored passage; of states each stands for compression_ratio of them
    stages: tuple[StageScore, ...] = ()  # of a cascade: each that scored it, the last as above
    empty: bool = False  # not scored, because nothing of its text is a token


@dataclass(frozen=True, slots=True)
class Degraded:
    """The server read coarser than it was asked to, or than its default."""

    reason: str  # deadline or queue
    compression_ratio: int  # what would have been read; 0: stages
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one request went. Fetch, encode and compute overlap, so they need not add up to total.

    fetch and encode: while any read of the store, any encoding, was under way; queue: while
    pairs were ready and none of them computed; compute: while any of them did.
    """

    fetch_seconds: float
    encode_seconds: float
    queue_seconds: float
    compute_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The answer, less its results."""

    model: str
    timings: Timings
    num_scored: int
    num_query_tokens: int
    query_truncated: bool
    num_passage_tokens: int  # of the scored candidates, each in whole states: at ratio 1 exact
    compression_ratio: int = 0  # what every candidate was read at; 0: text, or stages
    stages: tuple[Stage, ...] = ()  # that were read, where it was a cascade
    stopped_early: bool = False  # the deadline came before the cascade was through
    degraded: Degraded | None = None
    truncated: tuple[int, ...] = ()  # indexes of all scored candidates that were cut, those beyond top_n too


def distinct(candidates: Sequence[Candidate]) -> dict[Candidate, list[int]]:
    """The first candidate of each kind, and the indexes of all of that kind.

    A passage that a request names twice is scored once, which also makes it a tie to the last bit.
    """
    groups: dict[tuple[str | None, str | None, str], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault((candidate.passage_id, candidate.text, candidate.problem), []).append(candidate)
    return {same[0]: [candidate.index for candidate in same] for same in groups.values()}


def check(request: RerankRequest, limits: DecoderConfig) -> None:
    """Checks what can be checked without tokenizer and store.

    Raises:
        InvalidRequest: the first field that is out of range.
    """
    if not request.query:
        raise InvalidRequest("query", "", "a query that is not empty")
    _check_bytes("query", request.query, limits.max_query_bytes)
    _check_bytes("instruction", request.instruction or "", limits.max_query_bytes)
    if request.collection is not None and len(request.collection) > MAX_NAME_CHARS:
        raise InvalidRequest("collection", request.collection[:MAX_NAME_CHARS], "the name of a collection or alias")
    num_candidates = len(request.candidates)
    if not 1 <= num_candidates <= limits.max_candidates:
        raise InvalidRequest("candidates", f"{num_candidates} of them", f"1..{limits.max_candidates}")
    if request.top_n < 0:
        raise InvalidRequest("top_n", request.top_n, "0 (all) or more")
    if request.compression_ratio is not None and request.compression_ratio < 1:
        raise InvalidRequest("compression_ratio", request.compression_ratio, "0 (the stored ratio) or more")
    _check_stages(request)
    for candidate in request.candidates:
        if candidate.problem:
            continue
        if candidate.passage_id is None and candidate.text is None:
            raise InvalidRequest(f"candidates[{candidate.index}]", "empty", "a passage_id, a text, or both")
        if request.collection is None and candidate.text is None:
            expected = f"the collection that holds candidates[{candidate.index}], which has an id and no text"
            raise InvalidRequest("collection", "", expected)


def _check_stages(request: RerankRequest) -> None:
    if not request.stages:
        return
    if request.compression_ratio:
        raise InvalidRequest("compression_ratio", request.compression_ratio, "none beside stages, which have their own")
    problem = stages_problem(request.stages)
    if problem is not None:
        raise InvalidRequest(*problem)


def _check_bytes(field: str, text: str, limit: int) -> None:
    # A character is at most four bytes: most texts need no encoding to be known short.
    if len(text) * 4 > limit and len(text.encode()) > limit:
        raise InvalidRequest(field, f"{len(text.encode())} bytes long", f"at most {limit} bytes")
