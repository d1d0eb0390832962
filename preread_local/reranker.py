"""Reranker and AsyncReranker: clients of both halves, which run in this process for them alone.

The halves are those that `preread serve` runs, on loopback ports that take no key but one made here, so every method,
value and error is the client's, and code that was written against one of them runs with the other.
"""

import asyncio
import difflib
import secrets
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from cache.open import open_store
from decoder_server.config import SHIPPED_MODEL, DecoderConfig, ModelConfig
from decoder_server.models.loading import is_fbnl
from decoder_server.server import DecoderServer
from encoder_worker.config import EncoderConfig
from encoder_worker.server import EncoderServer
from preread.aio import AsyncClient
from preread.channel import ClientOptions
from preread.retry import RetryPolicy
from preread.service import Service
from preread.sync import Client
from preread.values import AsyncPassages, Passage, Passages, UpsertResult
from preread_edge.access import ApiKeys, join
from preread_edge.settings import LoadConfig

T = TypeVar("T")

OnProgress = Callable[[int], None]  # how many passages are done


class Indexed(NamedTuple):
    """What became of the passages of one `index`."""

    num_stored: int
    num_unchanged: int  # stored before, with the same text
    refused: tuple[UpsertResult, ...]  # each with the reason


class Reranker(Client):
    """A model of this process, as a client: rerank, upsert, warm and so on are preread.Client's. Thread-safe.

    with Reranker(store="faiss:./data") as reranker:
        reranker.index({"p1": "a text", "p2": "another"}, collection="docs")
        for result in reranker.rerank("a query", ["p1", "p2"], collection="docs"):
            print(result.passage_id, result.score)
    """

    def __init__(
        self,
        model: str | Path = SHIPPED_MODEL,
        *,
        store: str | None = None,
        encode: bool = True,
        timeout_seconds: float | None = None,
        **settings: Any,
    ) -> None:
        """Loads the model, a directory or a hub id, which takes seconds.

        `store` is a URL, as of `preread serve`; None: in memory, for this object alone. Without `encode` nothing is
        encoded, and texts are scored where they are stored. `timeout_seconds` is of a call. `settings` are fields of
        ModelConfig and DecoderConfig in decoder_server.config. Raises CheckpointError, CacheError and ValueError for
        what cannot be loaded or opened.
        """
        config = _config(model, store, settings)
        self._thread = _LoopThread()
        try:
            halves = self._thread.run(_Halves.start(config, encode=encode))
        except BaseException:
            self._thread.end(asyncio.sleep(0))
            raise
        super().__init__(**halves.reached_by(timeout_seconds))
        # One that is dropped without `close` gives its memory back; one that lives to the end ends with the process.
        self._end = weakref.finalize(self, _end, self._thread, halves)
        self._end.atexit = False

    def index(
        self,
        passages: Mapping[str, str] | Passages,
        *,
        collection: str,
        on_progress: OnProgress | None = None,
        **how: Any,
    ) -> Indexed:
        """Encodes and stores passages: {id: text}, or as `upsert` takes them; `how` are upsert's options.

        A passage that is refused costs no other, and is named in what comes back.
        """
        tally = _Tally(on_progress)
        for result in self.upsert(_texts(passages), collection=collection, **how):
            tally.add(result)
        return tally.indexed

    def close(self) -> None:
        super().close()
        self._end()
        self._thread.join()

    def _encoder(self) -> Service:
        return _writable(self._worker)


class AsyncReranker(AsyncClient):
    """The same with preread.AsyncClient's methods: `async with AsyncReranker() as reranker`, where the model is loaded.

    It belongs to the event loop that it was entered on.
    """

    def __init__(
        self,
        model: str | Path = SHIPPED_MODEL,
        *,
        store: str | None = None,
        encode: bool = True,
        timeout_seconds: float | None = None,
        **settings: Any,
    ) -> None:
        """As Reranker, but nothing is loaded yet."""
        self._config, self._encode, self._timeout_seconds = _config(model, store, settings), encode, timeout_seconds
        self._halves: _Halves | None = None

    async def __aenter__(self) -> Self:
        self._halves = await _Halves.start(self._config, encode=self._encode)
        super().__init__(**self._halves.reached_by(self._timeout_seconds))
        return self

    async def index(
        self,
        passages: Mapping[str, str] | AsyncPassages,
        *,
        collection: str,
        on_progress: OnProgress | None = None,
        **how: Any,
    ) -> Indexed:
        """As Reranker.index; passages may come from an async iterable."""
        tally = _Tally(on_progress)
        async for result in self.upsert(_texts(passages), collection=collection, **how):
            tally.add(result)
        return tally.indexed

    async def close(self) -> None:
        if self._halves is not None:
            await super().close()
            await self._halves.stop()

    def _encoder(self) -> Service:
        return _writable(self._worker)


class _Halves:
    """A decoder server and, for a model that reads states, an encoder worker, over one store."""

    def __init__(self, server: DecoderServer, worker: EncoderServer | None, key: str, parts: AsyncExitStack) -> None:
        self._server, self._worker, self._key, self._parts = server, worker, key, parts

    @classmethod
    async def start(cls, config: DecoderConfig, *, encode: bool) -> Self:
        """Raises what starting either raises, with everything stopped again."""
        key = secrets.token_urlsafe(32)
        keys, (model,) = ApiKeys.parse([key]), config.models
        async with AsyncExitStack() as parts:
            store = await asyncio.to_thread(open_store, config.store, read_budget_seconds=config.read_budget_seconds)
            parts.callback(store.close)
            worker = None
            if encode and await asyncio.to_thread(is_fbnl, model):
                settings = EncoderConfig(model.checkpoint, port=0, **model.values_of(LoadConfig))
                worker = EncoderServer(settings, store=store, keys=keys)
                await worker.start()
                parts.push_async_callback(worker.stop, 0)
                address = join(worker.config.host, worker.port)
                model = replace(model, encoder_address=address, encoder_api_key=key, encoder_in_process=True)
            server = DecoderServer(replace(config, models=(model,)), store=store, keys=keys)
            await server.start()
            parts.push_async_callback(server.stop, 0)
            await server.readiness.wait()
            return cls(server, worker, key, parts.pop_all())
        raise AssertionError  # the block above returns or raises

    def reached_by(self, timeout_seconds: float | None) -> dict[str, Any]:
        """Arguments of a client. What runs here does not come back when it fails, so nothing is tried again."""
        worker = None if self._worker is None else join(self._worker.config.host, self._worker.port)
        options = ClientOptions(timeout_seconds=timeout_seconds, retry=RetryPolicy(budget_seconds=0), api_key=self._key)
        address = join(self._server.config.host, self._server.port)
        return {"address": address, "encoder_address": worker, "options": options}

    async def stop(self) -> None:
        await self._parts.aclose()


class _LoopThread:
    """An event loop on another thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="preread", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def end(self, last: Coroutine[Any, Any, None]) -> None:
        """Ends when `last` has run; does not wait, so that any thread may call it, this one too."""
        ended = asyncio.run_coroutine_threadsafe(last, self._loop)
        ended.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))

    def join(self) -> None:
        self._thread.join()


def _end(thread: _LoopThread, halves: _Halves) -> None:
    thread.end(halves.stop())


class _Tally:
    """Counts the acknowledgements of one `index`."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._counts, self._refused = Counter[str](), list[UpsertResult]()
        self._on_progress = on_progress

    def add(self, result: UpsertResult) -> None:
        self._counts[result.status] += 1
        if result.status == "refused":
            self._refused.append(result)
        if self._on_progress is not None:
            self._on_progress(self._counts.total())

    @property
    def indexed(self) -> Indexed:
        return Indexed(self._counts["stored"], self._counts["unchanged"], tuple(self._refused))


def _config(model: str | Path, store: str | None, settings: dict[str, Any]) -> DecoderConfig:
    if taken := {"host", "port", "encoder_address", "encoder_api_key", "encoder_in_process"}.intersection(settings):
        raise ValueError(f"{', '.join(sorted(taken))}: of a server; expected settings of the model and of scoring")
    known = {one.name for config in (ModelConfig, DecoderConfig) for one in fields(config)}
    if unknown := settings.keys() - known:
        near = difflib.get_close_matches(min(unknown), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{min(unknown)!r} is not a setting of the model or of scoring{hint}")
    store = f"memory:{secrets.token_hex(8)}" if store is None else store
    return DecoderConfig.of_one(str(model), store=store, port=0, **settings)


def _texts(passages: Any) -> Any:
    """{id: text} as upsert takes it; anything else is upsert's to read."""
    if isinstance(passages, Mapping):
        return (Passage(passage_id, text) for passage_id, text in passages.items())
    return passages


def _writable(worker: Service | None) -> Service:
    if worker is None:
        raise ValueError("nothing is encoded here: the model reads texts (send them to rerank), or encode is False")
    return worker
