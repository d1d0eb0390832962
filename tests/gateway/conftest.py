"""A gateway on loopback in front of both halves, one per module, and small ways to speak to it."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from benchmarks.synthetic import make_cross_encoder
from cache.open import open_store
from decoder_server.config import NO_KV_CACHES, DecoderConfig, HttpConfig, ModelConfig
from decoder_server.models.loading import load_model
from decoder_server.server import DecoderServer, Gateway
from encoder_worker.config import EncoderConfig
from encoder_worker.server import EncoderServer
from preread_edge.access import ApiKeys

QUERY = "What is deep learning?"
DOCUMENTS = [
    "Deep learning is a branch of machine learning that uses neural networks with many layers.",
    "The weather today is sunny with a gentle breeze.",
    "Neural networks learn representations from data.",
    "Paris is the capital of France.",
]


class Held:
    """A real backend whose passes wait for `gate`."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.passes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def score(self, pairs: Any) -> Any:
        self.passes.append(len(pairs))
        self.entered.set()
        assert self.gate.wait(30)
        return self._real.score(pairs)


@dataclass
class Running:
    """A gateway and a client of it. Everything of the servers happens on a loop in another thread."""

    gateway: Gateway
    server: DecoderServer
    worker: EncoderServer | None
    backend: Held
    call: Callable[[Coroutine[Any, Any, Any]], Any]
    http: httpx2.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx2.Client(base_url=self.url, timeout=30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.port}"

    @property
    def engine(self) -> Any:
        return next(iter(self.server.engines.values()))

    def post(self, path: str, body: Any, **more: Any) -> httpx2.Response:
        return self.http.post(path, json=body, **more)

    def ask(self, path: str = "/v1/rerank", /, **fields: Any) -> Any:
        """The document of a successful answer to the usual question, with `fields` in place of its own."""
        response = self.post(path, {"query": QUERY, "documents": DOCUMENTS} | fields)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, status: int, path: str = "/v1/rerank", /, **fields: Any) -> Any:
        """The error document of a refused question."""
        response = self.post(path, {"query": QUERY, "documents": DOCUMENTS} | fields)
        assert response.status_code == status, response.text
        return response.json()


@contextmanager
def _loop() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def _run(
    checkpoint: Path,
    store_url: str,
    *,
    encoder: bool = True,
    keys: ApiKeys | None = None,
    http: Any = None,
    beside: Path | None = None,  # the checkpoint of a second model
    **config: Any,
) -> Iterator[Running]:
    store = open_store(store_url, read_budget_seconds=config.get("read_budget_seconds", 0.1))
    held: list[Held] = []

    def load(settings: ModelConfig) -> Any:
        held.append(Held(load_model(settings)))
        return held[-1]

    async def start() -> tuple[Gateway, DecoderServer, EncoderServer | None]:
        worker = None
        if encoder:
            worker = EncoderServer(EncoderConfig(str(checkpoint), port=0, device="cpu", dtype="float32"), store=store)
            await worker.start()
        # Without caches a request that is sent again is scored again, to the last bit the same on whichever path.
        settings = {"port": 0, "device": "cpu", "dtype": "float32", "max_staleness_seconds": 0.0}
        settings |= {"kv_caches": NO_KV_CACHES, "max_score_cache_bytes": 0} | config
        address = f"127.0.0.1:{worker.port}" if worker else ""
        of_both = DecoderConfig.of_one(str(checkpoint), encoder_address=address, **settings)
        if beside is not None:
            second = ModelConfig(str(beside), device="cpu", dtype="float32")
            of_both = dataclasses.replace(of_both, models=(*of_both.models, second))
        server = DecoderServer(of_both, store=store, load=load, keys=keys)
        gateway = Gateway(HttpConfig(port=0, **(http or {})), server)
        await gateway.start()
        await server.start()
        return gateway, server, worker

    async def stop() -> None:
        held[0].gate.set()
        await gateway.stop(1)
        await server.stop(5)
        if worker is not None:
            await worker.stop(0)

    with _loop() as call:
        gateway, server, worker = call(start())
        running = Running(gateway, server, worker, held[0], call)
        try:
            yield running
        finally:
            running.http.close()
            call(stop())
            store.close()


@pytest.fixture(scope="module")
def running(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Both halves with default settings."""
    with _run(tiny_checkpoint, f"faiss:{tmp_path_factory.mktemp('store')}") as one:
        yield one


@pytest.fixture(scope="module")
def lossy(lossy_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Both halves of a model whose tokenizer drops what it does not know."""
    with _run(lossy_checkpoint, f"faiss:{tmp_path_factory.mktemp('lossy')}") as one:
        yield one


@pytest.fixture(scope="module", params=["BertForSequenceClassification", "XLMRobertaForSequenceClassification"])
def cross(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model that reads text, whose margins pass no sigmoid."""
    directory = make_cross_encoder(tmp_path_factory.mktemp("cross") / "model", request.param)
    with _run(directory, f"faiss:{tmp_path_factory.mktemp('store')}", encoder=False) as one:
        yield one


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Any]:
    """Starts a gateway; over another store, with settings: DecoderConfig's as keywords, HttpConfig's as `http`."""
    own = f"faiss:{tmp_path / 'store'}"
    return lambda store=own, **settings: _run(tiny_checkpoint, store, **settings)


CHROMIUM = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A real Chromium without a profile, driven by selenium."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("NO BROWSER, THE PAGE IS NOT TESTED: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="NO SELENIUM, THE PAGE IS NOT TESTED")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*CHROMIUM, f"--user-data-dir={tmp_path}/profile"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@pytest.fixture
def query() -> str:
    return QUERY


@pytest.fixture
def documents() -> list[str]:
    return list(DOCUMENTS)
