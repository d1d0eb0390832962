"""Ranks the items of a framework: the calls that every component makes, sync and async.

A list longer than a server's limits goes in several requests, whose results are merged in the server's own order.
"""

import asyncio
import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, Self, TypedDict, Unpack, cast, get_args

from preread.aio import AsyncClient
from preread.arguments import Argument
from preread.channel import LOCAL_ADDRESS, ClientOptions
from preread.errors import PrereadError
from preread.sync import Client
from preread.values import (
    Candidate,
    Candidates,
    ModelInfo,
    OnMiss,
    Reranking,
    RerankOptions,
    Result,
    Stage,
    id_text,
    ranked,
)

MAX_NAMED = 3  # candidates that an error shows
MAX_BYTES_PER_CHAR = 4  # of UTF-8
STAGE_GAP, UNSCORED = 1e3, -1e6  # margins are some tens at most, and a cascade has at most eight stages
NUM_CONCURRENT = 4  # requests of several queries in flight: enough to fill a server's batches


class SyncReranker(Protocol):
    """A Client, or an object with its method."""

    def rerank(self, query: str, candidates: Candidates, **options: Unpack[RerankOptions]) -> Reranking: ...


class AsyncReranker(Protocol):
    """An AsyncClient, or an object with its method."""

    async def rerank(self, query: str, candidates: Candidates, **options: Unpack[RerankOptions]) -> Reranking: ...


Target = str | Sequence[str] | SyncReranker | AsyncReranker  # an address, several of equal servers, or a client
OnUnscored = Literal["raise", "last"]


class NotScored(PrereadError):  # noqa: N818 - as in preread.errors
    """Candidates without a score, of a component that may not drop them; .results has each with its reason."""

    results: tuple[Result, ...] = ()

    @classmethod
    def of(cls, unscored: Sequence[Result], num_candidates: int) -> "NotScored":
        ids = [f" (id {one.passage_id!r})" if one.passage_id else "" for one in unscored[:MAX_NAMED]]
        named = "; ".join(
            f"candidates[{one.index}]{passage_id} is {one.status}: {one.message}"
            for one, passage_id in zip(unscored, ids, strict=False)
        )
        more = f"; and {len(unscored) - MAX_NAMED} more" if len(unscored) > MAX_NAMED else ""
        advice = 'on_unscored="last" ranks them after all others, without a score'
        error = cls(f"{len(unscored)} of {num_candidates} candidates could not be scored; {named}{more}; {advice}")
        error.results = tuple(unscored)
        return error


class Limits(NamedTuple):
    """What one request may hold."""

    max_candidates: int
    max_chars: int

    @classmethod
    def of(cls, models: Sequence[ModelInfo]) -> "Limits":
        """The least of all models: a request may name one by an alias that is not listed."""
        least_bytes = min(one.max_message_bytes for one in models)
        return cls(min(one.max_candidates for one in models), least_bytes // MAX_BYTES_PER_CHAR)


class Settings(TypedDict, total=False):
    """Keyword arguments of every component; the first seven as in preread.values.RerankOptions. None: the default."""

    collection: str | None
    instruction: str | None
    compression_ratio: int | None
    stages: str | Sequence[Stage] | None
    on_miss: OnMiss | None
    model: str | None
    timeout: float | None
    id_key: str | None  # of an item's metadata, that holds its passage id in the collection; default: the item's own id
    send_text: bool  # default: an item with an id goes with its text, which is read where the id is not stored
    on_unscored: OnUnscored  # default "raise": NotScored; "last": after all others, without a score
    client_options: ClientOptions | None  # of the client that is made of an address


class Ranker:
    """Ranks items over a client, or over one that it makes of an address; Client or AsyncClient as is needed.

    Thread-safe over a Client or an address. Pickled, it connects again; one over a client is pickled where that can be.
    """

    def __init__(self, client: Target = LOCAL_ADDRESS, **settings: Unpack[Settings]) -> None:
        if unknown := settings.keys() - Settings.__optional_keys__:
            raise TypeError(f"unknown arguments {sorted(unknown)}; known: {sorted(Settings.__optional_keys__)}")
        self._client, self._client_options = client, settings.get("client_options")
        self._id_key, self._send_text = settings.get("id_key"), settings.get("send_text", True)
        self._on_unscored = settings.get("on_unscored", "raise")
        kept = {name: value for name, value in settings.items() if name in RerankOptions.__optional_keys__}
        self.options = _options(cast(RerankOptions, kept), {})
        self._check()
        self._forget()

    def _check(self) -> None:
        if self._address is not None:
            Argument("client", self._address).addresses()
        elif not callable(getattr(self._client, "rerank", None)):
            raise Argument("client", self._client).wrong("host:port, a list, or an object with the method rerank")
        elif self._client_options is not None:
            raise ValueError("client_options is set, but client is no address; expected them in the client")
        if self._on_unscored not in get_args(OnUnscored):
            expected = " or ".join(map(repr, get_args(OnUnscored)))
            raise Argument("on_unscored", self._on_unscored).wrong(expected)
        if not Argument("send_text", self._send_text).flag() and not self._has_collection:
            raise ValueError("send_text is False, but collection is not set; expected both: ids are of a collection")
        if self._id_key is not None and not self._has_collection:
            raise ValueError(f"id_key is {self._id_key!r}, but collection is not set; expected both")

    @property
    def _has_collection(self) -> bool:
        return bool(self.options.get("collection"))

    def _forget(self) -> None:
        self._sync: Any = None
        self._of_loop: dict[Any, Any] = {}  # an AsyncClient belongs to the event loop it was made on
        self._limits: Limits | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        made = ("_sync", "_of_loop", "_limits", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def close(self) -> None:
        """Ends the sync connection that was made of an address; a client that was passed in is its caller's."""
        if self._sync is not None:
            self._sync.close()
        self._forget()

    async def aclose(self) -> None:
        """The same of the connection of the running event loop."""
        made = self._of_loop.pop(asyncio.get_running_loop(), None)
        if made is not None:
            await made.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def _is_async(self) -> bool:
        return inspect.iscoroutinefunction(getattr(self._client, "rerank", None))

    @property
    def _address(self) -> Any:
        return self._client if isinstance(self._client, str | list | tuple) else None

    def connect(self) -> Any:
        """The client of sync calls."""
        if self._address is None:
            if self._is_async:
                raise TypeError("client is async; expected a Client, an object like it, or an address, for a sync call")
            return self._client
        with self._lock:
            self._sync = self._sync or Client(self._address, options=self._client_options)
            return self._sync

    def connect_async(self) -> Any:
        """The client of calls on the running event loop; None: there is a sync one only."""
        if self._address is None:
            return self._client if self._is_async else None
        loop = asyncio.get_running_loop()
        with self._lock:
            for gone in [one for one in self._of_loop if one.is_closed()]:
                del self._of_loop[gone]
            if loop not in self._of_loop:
                self._of_loop[loop] = AsyncClient(self._address, options=self._client_options)
            return self._of_loop[loop]

    def candidate(self, field: str, text: Any, metadata: Any = None, own_id: Any = None) -> Candidate:
        """Of an item: its id and text where a collection is named and it has an id, else its text.

        `field` names the item in errors: documents[3]. Raises TypeError: an id or a text of another type.
        """
        name, value = f"{field}.id", own_id
        if self._id_key is not None:
            name, value = f"{field}[{self._id_key!r}]", (metadata or {}).get(self._id_key)
        if not self._has_collection or value is None:
            return Candidate(text=Argument(f"text of {field}", text).text())
        if (passage_id := id_text(value)) is None:
            raise Argument(name, value).wrong("a string or an integer")
        if not self._send_text or text is None:
            return Candidate(passage_id)
        return Candidate(passage_id, Argument(f"text of {field}", text).text())

    def rank(self, query: str, candidates: Sequence[Candidate], **more: Unpack[RerankOptions]) -> list[Result]:
        """Results best first, their indexes those of `candidates`; `more` options replace those of the settings.

        Raises PrereadError, NotScored among them. No candidates: no request.
        """
        if not candidates:
            return []
        client, options = self.connect(), _options(self.options, more)
        if self._limits is None and hasattr(client, "list_models"):
            self._limits = Limits.of(client.list_models(timeout=options.get("timeout")))
        parts = []
        for start, some in split(candidates, self._limits):
            with naming_part(start):
                parts.append((start, client.rerank(query, some, **options)))
        return self._merge(parts, len(candidates), options)

    async def arank(self, query: str, candidates: Sequence[Candidate], **more: Unpack[RerankOptions]) -> list[Result]:
        """Like rank; in a thread where the client is a sync one."""
        if not candidates:
            return []
        client, options = self.connect_async(), _options(self.options, more)
        if client is None:
            return await asyncio.to_thread(self.rank, query, candidates, **more)
        if self._limits is None and hasattr(client, "list_models"):
            self._limits = Limits.of(await client.list_models(timeout=options.get("timeout")))
        parts = []
        for start, some in split(candidates, self._limits):  # in turn: a long list should not fill a server's queue
            with naming_part(start):
                parts.append((start, await client.rerank(query, some, **options)))
        return self._merge(parts, len(candidates), options)

    def rank_many(self, requests: Iterable[tuple[str, Sequence[Candidate], RerankOptions]]) -> Iterator[list[Result]]:
        """What rank gives for each query, its candidates and options, in order; NUM_CONCURRENT queries in flight."""
        with ThreadPoolExecutor(NUM_CONCURRENT, thread_name_prefix="preread-rank") as threads:
            yield from threads.map(lambda one: self.rank(one[0], one[1], **one[2]), requests)

    def _merge(
        self, parts: Sequence[tuple[int, Reranking]], num_candidates: int, options: RerankOptions
    ) -> list[Result]:
        results = ranked(replace(one, index=start + one.index) for start, part in parts for one in part)
        unscored = [one for one in results if one.margin is None]
        if unscored and self._on_unscored == "raise":
            raise NotScored.of(unscored, num_candidates)
        return results[: options.get("top_n") or None]


def _options(settings: RerankOptions, more: RerankOptions) -> RerankOptions:
    """Those that are set, `more` before `settings`."""
    named = [(name, value) for options in (settings, more) for name, value in options.items() if value is not None]
    return cast(RerankOptions, dict(named))


def sortable_scores(results: Sequence[Result]) -> list[float]:
    """Numbers in the order of the results, for measures, which sort by them: margins, where there was no cascade.

    Probabilities near 1 round to the same number; margins do not.
    """
    deepest = max((len(one.stages) for one in results), default=0)
    return [UNSCORED if one.margin is None else one.margin - STAGE_GAP * (deepest - len(one.stages)) for one in results]


@contextmanager
def naming_part(start: int) -> Iterator[None]:
    """A note to an error of a request for some of the candidates, whose indexes in it begin at 0."""
    try:
        yield
    except PrereadError as exc:
        if start:
            exc.add_note(f"candidates[0] of this request is candidates[{start}] of the list, which was split")
        raise


def split(candidates: Sequence[Candidate], limits: Limits | None) -> Iterator[tuple[int, Sequence[Candidate]]]:
    """Parts that a request may hold, each with the index of its first candidate; None: there is no limit."""
    start = num_chars = 0
    for end, one in enumerate(candidates):
        num_chars += len(one.text or "")
        if limits and end > start and (end - start >= limits.max_candidates or num_chars > limits.max_chars):
            yield start, candidates[start:end]
            start, num_chars = end, len(one.text or "")
    yield start, candidates[start:]
