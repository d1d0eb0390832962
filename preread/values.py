"""The values of a call: requests, results and descriptions, defined once for servers and clients.

Frozen and plain: no protobuf, no HTTP, light to import. preread.wire and the edges of the servers translate.
"""

import operator
import re
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypedDict, TypeVar

from preread.errors import Path, field_name

MAX_STAGES = 8
MAX_QUERIES = 64  # of one call of rerank_many; from some thirty on, more share hardly more
MAX_TEXT_CHARS = 400
MAX_NUMBER = 2**31 - 1  # of a ratio or a count: the wire holds no greater one
REQUEST_ID = "x-request-id"  # metadata of a call: its name in the logs of every server that it passes
USABLE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")  # anything else could forge lines in a log
_STAGE = re.compile(r"\s*(?P<ratio>[0-9]+)\s*(:\s*(?P<keep>[0-9]+)\s*)?")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a cascade: scores what the stage before kept; the first one scores every candidate."""

    compression_ratio: int  # where the collection cannot give it, the next one that it can is scored at
    keep: int = 0  # how many candidates the next stage scores; ignored in the last stage


def parse_stages(text: str) -> tuple[Stage, ...]:
    """`32:100, 8:20, 4`: all at ratio 32, the best 100 at 8, the best 20 of those at 4. Raises ValueError."""
    if not isinstance(text, str):
        raise TypeError(f"stages is of type {type(text).__name__}; expected a string such as 32:100, 8:20, 4")
    if len(text) > MAX_TEXT_CHARS:
        raise ValueError(f"stages is {len(text)} characters long; expected at most {MAX_TEXT_CHARS}")
    parts = [_STAGE.fullmatch(part) for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"stages is {text!r}; expected RATIO:KEEP, RATIO:KEEP, RATIO, such as 32:100, 8:20, 4")
    stages = tuple(Stage(int(part["ratio"]), int(part["keep"] or 0)) for part in parts if part)
    if problem := stages_problem(stages):
        path, value, expected = problem
        raise ValueError(f"{field_name(path)} of {text!r} is {value}; expected {expected}")
    return stages


def format_stages(stages: Iterable[Stage]) -> str:
    """The inverse of parse_stages."""
    return ",".join(f"{s.compression_ratio}:{s.keep}" if s.keep else str(s.compression_ratio) for s in stages)


def stages_problem(stages: Sequence[Stage]) -> tuple[Path, object, str] | None:
    """Path, value and expectation of the first field that is out of range; None: all are in range."""
    if not 1 <= len(stages) <= MAX_STAGES:
        return ("stages",), f"{len(stages)} of them", f"1..{MAX_STAGES}"
    for i, stage in enumerate(stages):
        before = stages[max(0, i - 1)]
        ratio, keep = ("stages", i, "compression_ratio"), ("stages", i, "keep")
        min_keep = 0 if i == len(stages) - 1 else 1
        if not 1 <= stage.compression_ratio <= MAX_NUMBER:
            return ratio, stage.compression_ratio, f"1 or more, at most {MAX_NUMBER}"
        if not min_keep <= stage.keep <= MAX_NUMBER:
            return keep, stage.keep, f"{min_keep} or more candidates for the next stage, at most {MAX_NUMBER}"
        if i and stage.compression_ratio >= before.compression_ratio:
            return ratio, stage.compression_ratio, f"less than {before.compression_ratio}, the ratio of stage {i - 1}"
        if i and stage.keep > before.keep:
            return keep, stage.keep, f"at most {before.keep}, which stage {i - 1} keeps"
    return None


def id_text(value: object) -> str | None:
    """An id as it is stored: a string, or an integer's digits; None: neither, as a float, whose 3.0 would not be 3."""
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, numpy's or an enum's, the string itself
    try:
        return None if isinstance(value, bool) else str(operator.index(value))  # type: ignore[arg-type]  # it raises TypeError
    except TypeError:
        return None


def join_title(title: str | None, text: str, separator: str = " ") -> str:
    """The text that is encoded: a title that is not blank goes before it, as BEIR's readers do."""
    if title and title.strip():
        return f"{title}{separator}{text}" if text.strip() else title
    return text


_T = TypeVar("_T")

OnMiss = Literal["encode", "skip", "fail"]
Status = Literal["hit", "encoded", "missing", "corrupt", "too_long", "failed", "unspecified"]
UpsertStatus = Literal["stored", "unchanged", "refused", "unspecified"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A passage to score: an id in a collection, or text, or both (the text wins where another one is stored)."""

    passage_id: str | None = None
    text: str | None = None
    problem: str = field(default="", repr=False)  # found by a server's edge: this candidate fails, no other


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage to store."""

    passage_id: str
    text: str


Candidates = Iterable[str | Candidate | Mapping[str, Any]]
Passages = Iterable[Passage | Mapping[str, Any]]
AsyncPassages = Passages | AsyncIterable[Passage | Mapping[str, Any]]


class RerankOptions(TypedDict, total=False):
    """Keyword arguments of `rerank` and `rerank_stream`; what is left out, "" or 0 means the default."""

    collection: str  # or alias: what passage ids refer to
    instruction: str | None  # what to look for; default, which "" is not: the checkpoint's
    top_n: int  # how many scored results to return; default: all
    compression_ratio: int  # exactly this multiple of the stored ratio; default: the server's, else the stored one
    stages: str | Sequence[Stage]  # a cascade in place of one ratio: "32:100, 8:20, 4"; the summary has those used
    on_miss: OnMiss | None  # for ids that are not stored; default: the server's
    return_text: bool
    model: str  # default: the only or first one
    timeout: float | None  # of the call, in seconds; default: the client's


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """One query and its candidates, as a server's edge unpacks them. None means the served model's default."""

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
    """The score of a candidate in one stage of a cascade."""

    compression_ratio: int
    score: float
    margin: float
    num_states: int


@dataclass(frozen=True, slots=True)
class Degraded:
    """The server, under pressure, scored at a coarser ratio than requested or configured."""

    reason: str  # deadline or queue
    compression_ratio: int  # without the pressure; 0: stages
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """The score of one candidate, or the reason why there is none."""

    index: int  # position among the candidates of the call
    passage_id: str  # "" for inline text
    status: Status
    score: float | None = None  # P(yes) in [0, 1]; None: not scored
    margin: float | None = None  # yes-logit minus no-logit, float32; None: not scored
    text: str | None = None  # with return_text
    message: str = ""  # why it was not scored
    num_states: int = 0
    compression_ratio: int = 0  # 0: the passage was read as text
    truncated: bool = False  # the passage was cut when it was encoded
    stages: tuple[StageScore, ...] = ()  # of a cascade: each that scored it, the last as above
    found_in: str = ""  # of a hit by its text: the collection that has it, and there as which passage
    found_id: str = ""
    num_passage_tokens: int = 0  # of a scored passage, in whole states; on servers only
    empty: bool = False  # not scored, because its text has no tokens; on servers only


def ranked(results: Iterable[Result], top_n: int = 0) -> list[Result]:
    """Results in a response's order: scored ones best first, cut to `top_n` (0: all), then the others by index.

    Those that reached a later stage of a cascade rank before the others; ties break by index.
    """
    by_index = sorted(results, key=lambda one: one.index)
    scored = [one for one in by_index if one.margin is not None]
    scored.sort(key=lambda one: (-len(one.stages), -(one.margin or 0.0)))
    return scored[: top_n or None] + [one for one in by_index if one.margin is None]


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a call went on the server, in seconds. Parts overlap: they need not add up to the total.

    Fetch and encode count while any read of the store, any encoding, was in flight; queue while pairs were ready and
    none of them in a forward pass; compute while any of them was.
    """

    fetch_seconds: float
    encode_seconds: float
    queue_seconds: float
    compute_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A response, less its results."""

    model: str
    timings: Timings
    num_scored: int
    num_query_tokens: int
    query_truncated: bool
    compression_ratio: int = 0  # of every candidate; 0: text, or stages
    stages: tuple[Stage, ...] = ()  # those used, where it was a cascade
    stopped_early: bool = False  # the deadline neared: these are the scores the cascade had by then
    degraded: Degraded | None = None
    num_looked_up: int = 0  # texts that were looked up in the server's collections
    num_found: int = 0  # of those
    num_passage_tokens: int = 0  # of the scored candidates, at ratio 1 exact; on servers only
    truncated: tuple[int, ...] = ()  # indexes of all scored candidates that were cut; on servers only


@dataclass(frozen=True, slots=True)
class Reranking:
    """A response: results best first, then those that could not be scored. Iterates over its results."""

    results: tuple[Result, ...]
    summary: Summary
    request_id: str = field(default="", compare=False)  # the server's log has the request under it

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, position: int) -> Result:
        return self.results[position]


class Listed(tuple[_T, ...]):
    """What a server listed: a tuple, with the id of the request."""

    request_id: str

    def __new__(cls, values: Iterable[_T], request_id: str = "") -> Self:
        made = super().__new__(cls, values)
        made.request_id = request_id
        return made


@dataclass(frozen=True, slots=True)
class EncoderIdentity:
    """The encoder that wrote a collection, or whose states a model reads."""

    fingerprint: str
    checkpoint: str
    dim: int
    max_passage_tokens: int
    passage_template: str
    pooling_version: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model and its limits."""

    name: str
    backend: str
    checkpoint: str
    encoder: EncoderIdentity | None  # None: the model reads text
    default_instruction: str
    default_compression_ratio: int
    max_query_tokens: int
    max_candidates: int
    max_message_bytes: int
    dtype: str
    device: str
    encodes_on_demand: bool
    max_passage_tokens: int
    notice: str  # required by the model's licence; mostly empty


@dataclass(frozen=True, slots=True)
class TierUse:
    """The contents of one of a server's caches after a call of warm."""

    name: str  # keys: the KV cache of passages; prefixes: the prefix cache
    num_kept: int  # of the call's windows
    num_bytes: int  # for all passages
    max_bytes: int  # 0: the cache is off


@dataclass(frozen=True, slots=True)
class Warmed:
    """Counts of a call of warm. A passage has one window, or several when it was split, each at every ratio."""

    model: str
    num_passages: int
    num_windows: int
    missing_ids: tuple[str, ...]  # not stored, or damaged
    tiers: tuple[TierUse, ...]
    request_id: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """One collection of a store."""

    name: str
    aliases: tuple[str, ...]
    encoder: EncoderIdentity
    compression_ratio: int
    codec: str
    num_passages: int
    num_states: int
    num_tokens: int
    num_truncated: int
    size_bytes: int
    stores_text: bool
    num_clipped: int = 0  # numbers of all states that lie outside what the codec was trained for


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """The encoder of a worker, and how it stores by default."""

    encoder: EncoderIdentity
    default_compression_ratio: int
    default_codec: str
    dtype: str
    device: str
    store: str
    max_message_bytes: int


@dataclass(frozen=True, slots=True)
class UpsertResult:
    """The acknowledgement of one passage: it is in the store, was there already, or was refused."""

    passage_id: str
    status: UpsertStatus
    num_tokens: int
    num_states: int
    truncated: bool
    message: str
    num_clipped: int = 0  # numbers of its states that lie outside what the codec was trained for
