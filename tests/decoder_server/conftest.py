"""A tiny random checkpoint with both halves, real stores filled from it, and real servers on loopback."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from grpc_status import rpc_status
from numpy.typing import NDArray

from cache.collection import Collection, StoredPassage
from cache.manifest import Manifest
from cache.open import open_store
from cache.states import AnyStates, PassageStates, text_digest
from cache.store import Store
from checkpoint import Checkpoint, EncoderIdentity, TokenizedPrompt
from checkpoint.synthetic import make_checkpoint
from decoder_server.config import DecoderConfig
from decoder_server.models.backend import Backend
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair
from decoder_server.models.loading import load_model
from decoder_server.server import DecoderServer
from encoder_worker.encoder import Encoder
from preread.v1 import rerank_pb2, rerank_pb2_grpc

# Tests are not a package; the redis-server they share is taken over by path.
_spec = importlib.util.spec_from_file_location("redis_fixture", Path(__file__).parents[1] / "redis_fixture.py")
assert _spec is not None
assert _spec.loader is not None
_redis_fixture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_redis_fixture)
RedisServer = _redis_fixture.RedisServer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "tiny")


@pytest.fixture(scope="session")
def fbnl(tiny: Path) -> FbnlBackend:
    return FbnlBackend(Checkpoint.open(tiny), device="cpu", dtype="float32")


class GatedBackend:
    """A real backend whose passes can be held up; remembers every pass it made."""

    name = "fbnl"
    num_compilations = 0

    def __init__(self, real: FbnlBackend) -> None:
        self.real = real
        self.settings, self.dtype_name, self.device_name = real.settings, real.dtype_name, real.device_name
        self.checkpoint_name, self.notice, self.listwise = real.checkpoint_name, real.notice, real.listwise
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.passes: list[list[StatePair]] = []
        self.seconds_per_pass = 0.0

    def identity(self) -> EncoderIdentity:
        return self.real.identity()

    def prompt(self, query: str, instruction: str | None = None) -> TokenizedPrompt:
        return self.real.prompt(query, instruction)

    def pairs(self, prompt: TokenizedPrompt, passages: Sequence[AnyStates]) -> list[list[StatePair]]:
        return self.real.pairs(prompt, passages)

    def activate(self, margin: float) -> float:
        return self.real.activate(margin)

    def is_empty(self, text: str) -> bool:
        return self.real.is_empty(text)

    def score(self, pairs: Sequence[StatePair]) -> NDArray[np.float32]:
        self.passes.append(list(pairs))
        self.entered.set()
        assert self.gate.wait(30)
        time.sleep(self.seconds_per_pass)
        return self.real.score(pairs)

    def warm_up(self) -> None:
        assert self.gate.wait(30)
        self.real.warm_up()

    async def wait_entered(self) -> None:
        """Returns when a pass is under way."""
        while not self.entered.is_set():
            await asyncio.sleep(0.001)


@pytest.fixture
def gated(fbnl: FbnlBackend) -> GatedBackend:
    return GatedBackend(fbnl)


class Encoding:
    """Texts to states by the real encoder, and collections filled with them."""

    def __init__(self, directory: Path) -> None:
        self.checkpoint = Checkpoint.open(directory)
        self._encoder = Encoder(self.checkpoint, device="cpu", dtype="float32")
        self.encode = functools.cache(self._encode)

    def _encode(self, text: str, ratio: int) -> PassageStates:
        (tokens,) = self.checkpoint.text.passages([text])
        (states,) = self._encoder.encode([tokens.ids], ratio)
        return PassageStates(states, (len(tokens.ids),), ratio, tokens.truncated, text_digest(text))

    def manifest(self, name: str, ratio: int = 4, codec: str = "Flat", *, fingerprint: str | None = None) -> Manifest:
        identity = self.checkpoint.identity
        return Manifest(
            collection=name,
            fingerprint=fingerprint or identity.fingerprint,
            checkpoint=identity.checkpoint,
            dim=identity.dim,
            max_passage_tokens=identity.max_passage_tokens,
            passage_template=identity.passage_template,
            pooling_version=identity.pooling_version,
            compression_ratio=ratio,
            codec=codec,
            stores_text=True,
        )

    def fill(self, store: Store, name: str, texts: Mapping[str, str], ratio: int = 4) -> Collection:
        collection = Collection.create(store, self.manifest(name, ratio))
        collection.put_many([StoredPassage(i, self.encode(text, ratio), text) for i, text in texts.items()])
        return collection


@pytest.fixture(scope="session")
def encoding(tiny: Path) -> Encoding:
    return Encoding(tiny)


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    """Passages of one to some ninety words."""
    rng = np.random.default_rng(7)
    words = ["passage", "query", "read", "once", "state", "decoder", "answers", "yes", "no", "gravity", "bodies"]
    return {f"p{i}": " ".join(rng.choice(words, rng.integers(1, 90))) for i in range(60)}


@pytest.fixture
def store(tmp_path: Path, encoding: Encoding, texts: dict[str, str]) -> Store:
    """An embedded store with the collection `docs`."""
    store = open_store(f"faiss:{tmp_path / 'store'}")
    encoding.fill(store, "docs", texts)
    yield store
    store.close()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Any]:
    server = RedisServer(tmp_path / "redis").start()
    yield server
    server.stop()


@dataclass
class Serving:
    """A running server and a stub that speaks to it."""

    server: DecoderServer
    channel: grpc.aio.Channel
    stub: rerank_pb2_grpc.RerankServiceAsyncStub

    @property
    def engine(self):
        return next(iter(self.server.engines.values()))

    async def rerank(self, *, timeout: float | None = 30, **fields: object) -> rerank_pb2.RerankResponse:
        return await self.stub.Rerank(request(**fields), timeout=timeout)


def request(
    query: str = "what is read once?", ids: Sequence[str] = (), inline: Sequence[str] = (), **fields: object
) -> rerank_pb2.RerankRequest:
    """Candidates by id, then by text; `candidates` gives them in full."""
    candidates = [rerank_pb2.Candidate(passage_id=i) for i in ids]
    candidates += [rerank_pb2.Candidate(text=text) for text in inline]
    fields = {"collection": "docs", "candidates": candidates} | fields
    return rerank_pb2.RerankRequest(query=query, **fields)


Serve = Callable[..., AbstractAsyncContextManager[Serving]]


@pytest.fixture
def serve(tiny: Path, store: Store, fbnl: FbnlBackend) -> Serve:
    """Starts a server over the embedded store; keyword arguments are DecoderConfig's.

    The model is the one loaded already, unless a backend is given or the configuration wants another. The score cache
    is disabled, so that a request that is sent again is scored again.
    """

    @asynccontextmanager
    async def start(
        *, backend: Backend | None = None, over: Store | None = None, **config: object
    ) -> AsyncIterator[Serving]:
        settings = {"port": 0, "device": "cpu", "dtype": "float32", "max_staleness_seconds": 0.0}
        settings |= {"max_score_cache_bytes": 0} | config
        server = DecoderServer(
            DecoderConfig.of_one(str(tiny), **settings),
            store=over or store,
            load=load_model if settings["dtype"] != "float32" else lambda _: backend or fbnl,
        )
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                yield Serving(server, channel, rerank_pb2_grpc.RerankServiceStub(channel))
        finally:
            if isinstance(backend, GatedBackend):
                backend.gate.set()
            await server.stop(5)

    return start


@pytest.fixture
def make_request() -> Callable[..., rerank_pb2.RerankRequest]:
    return request


@pytest.fixture
def by_hand(fbnl: FbnlBackend, encoding: Encoding) -> Callable[..., float]:
    """The margin of a text by encoding it, pooling it and scoring it alone."""

    def margin(text: str, ratio: int = 4, query: str = "what is read once?", instruction: str | None = None) -> float:
        states = encoding.encode(text, 1).at_ratio(ratio).states
        return float(fbnl.score([StatePair(fbnl.prompt(query, instruction), states)])[0])

    return margin


async def _refused(call: Awaitable[object], code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value
    return caught.value


@pytest.fixture
def refused() -> Callable[..., Awaitable[grpc.aio.AioRpcError]]:
    """Awaits a call that must end with a status; gives the error."""
    return _refused


def _detail(error: grpc.aio.AioRpcError, kind: type[Message]) -> Message:
    for one in rpc_status.from_call(error).details:
        message = kind()
        if one.Unpack(message):
            return message
    raise AssertionError(f"no {kind.__name__} in {error}")


@pytest.fixture
def detail() -> Callable[..., Message]:
    """The google.rpc detail of one kind that an error carries."""
    return _detail
