"""The online half as process parts, gRPC and HTTP: each binds, serves and drains; the models load once.

`start` returns when a real forward pass has succeeded; until then health says NOT_SERVING, and for longer where an
encoder does not answer. Owns two executors: one thread for the model, a few for tokenizing and the store.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from functools import partial

import grpc

from cache.open import open_store
from cache.read_cache import CachedStore, TimedStore
from cache.store import Store
from decoder_server.config import DecoderConfig, HttpConfig, ModelConfig
from decoder_server.edge.grpc import SERVICE, TEI_SERVICES, RerankService
from decoder_server.edge.http.app import build
from decoder_server.edge.http.request import Context, Problem
from decoder_server.edge.word_search import WordSearch
from decoder_server.engine.engine import Engine
from decoder_server.engine.lifecycle import Observer
from decoder_server.engine.on_demand import MAX_ANSWER_BYTES, EncoderClient, OnDemandStates, call_metadata
from decoder_server.models.backend import Backend
from decoder_server.models.loading import load_model
from decoder_server.readiness import Readiness
from decoder_server.telemetry import Metrics, RequestLog
from preread import AsyncClient, ClientOptions, RetryPolicy
from preread_edge import listener
from preread_edge.access import ApiKeys, Guard, join
from preread_edge.grpc_server import add_standard_services, listen, make_server

log = logging.getLogger(__name__)

NUM_STORE_THREADS = 4


class DecoderServer:
    """One online server. Not to be started twice."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        store: Store | None = None,  # shared with others and left open; None: config.store, closed at the end
        load: Callable[[ModelConfig], Backend] = load_model,  # called on the model's thread
        keys: ApiKeys | None = None,  # None: everyone who reaches the port may call
        observers: Sequence[Observer] = (),  # besides this server's own metrics and log
    ) -> None:
        self.config = config
        self.keys = keys or ApiKeys()
        if any(model.read_control_tokens for model in config.models):
            self.keys.refuse_control_tokens(config.host)
        self.metrics = Metrics()
        self._observers: tuple[Observer, ...] = (self.metrics, RequestLog(log_text=config.log_text), *observers)
        self.port = 0
        self._load = load
        self._last = AsyncExitStack()  # closed at the end of stop, the latest first
        if store is None:
            opened = open_store(config.store, read_budget_seconds=config.read_budget_seconds)
            store = self._last.enter_context(closing(opened))
        self.store: Store = TimedStore(store, self.metrics.store_read)  # with its read cache, if there is one
        if config.max_store_cache_bytes:
            max_bytes, staleness_seconds = config.max_store_cache_bytes, config.max_staleness_seconds
            self.store = CachedStore(self.store, max_bytes=max_bytes, staleness_seconds=staleness_seconds)
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.threads = ThreadPoolExecutor(NUM_STORE_THREADS, thread_name_prefix="store")  # for all that blocks
        for threads in (self.threads, self._model_thread):  # waits for a forward pass in flight, off the loop
            self._last.push_async_callback(asyncio.to_thread, threads.shutdown, cancel_futures=True)
        self._service = RerankService(self.store)
        self.engines = self._service.engines  # by served name; empty until the models have loaded
        self.metrics.watch(self.engines, self.store)
        self.readiness = Readiness([SERVICE, *TEI_SERVICES], self.metrics.encoder_up)
        self._server: grpc.aio.Server | None = None
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Binds, loads and proves the models. When it raises, everything is stopped again."""
        try:
            max_bytes = self.config.max_message_bytes
            # Clients that reconnect resolve the name again, and find servers that were added; calls in flight finish.
            age = self.config.max_connection_age_seconds
            self._server = make_server(
                self.keys,
                self.metrics.rpc,
                max_calls=self.config.max_connections,
                max_request_bytes=max_bytes,
                max_response_bytes=max_bytes,
                options=[("grpc.max_connection_age_ms", max(1, int(age * 1000)))] if age else [],
            )
            self._service.add_to(self._server)
            add_standard_services(self._server, self.readiness.servicer, [SERVICE, *TEI_SERVICES])
            await self.readiness.publish()  # health answers NOT_SERVING, everything else UNAVAILABLE
            self.port = listen(self._server, self.config, self.config.port)
            await self._server.start()
            # Each model runs once. Ready when every encoder has answered; it may be later than this.
            loaded = [await self._load_engine(model) for model in self.config.models]
            self.engines.update({engine.name: engine for engine in loaded})  # together: a ready server has every name
            await self.readiness.loaded()
        except BaseException:
            await self.stop(0)
            raise

    async def _load_engine(self, model: ModelConfig) -> Engine:
        loop = asyncio.get_running_loop()
        backend = await loop.run_in_executor(self._model_thread, self._load, model)
        identity = await loop.run_in_executor(self.threads, backend.identity)
        await loop.run_in_executor(self._model_thread, backend.warm_up)
        on_demand = None
        if identity is not None and model.encoder_address:
            seconds, tls = self.config.encode_timeout_seconds, self.config.encoder_tls
            options = ClientOptions(timeout_seconds=seconds, tls=tls, max_message_bytes=MAX_ANSWER_BYTES)
            address, key = model.encoder_address, model.encoder_api_key
            encoder = EncoderClient(address, identity, backend.dtype_name, options, key)
            self._last.push_async_callback(encoder.close)
            # One that does not answer may start later; until then candidates to encode fail, each with the reason.
            await self.readiness.add(encoder, model.served_name, in_process=model.encoder_in_process)
            ratio, max_bytes = backend.settings.default_compression_ratio, self.config.max_inline_cache_bytes
            max_bytes = self.config.max_store_cache_bytes if max_bytes is None else max_bytes
            on_demand = OnDemandStates(encoder, max_bytes=max_bytes, base_ratio=ratio)
            self._last.push_async_callback(on_demand.close)
        threads = self._model_thread, self.threads
        engine = Engine(model.served_name, backend, self.store, on_demand, threads, self.config, self._observers)
        await engine.call(engine.check)
        self._loops.append(asyncio.create_task(engine.scheduler.run()))
        self._loops[-1].add_done_callback(self._loop_ended)
        return engine

    async def stop(self, grace_seconds: float) -> None:
        """Says NOT_SERVING, accepts nothing more, lets what runs finish within the grace, then stops."""
        if self._server is not None:
            await self.readiness.stop()
            drained = await asyncio.gather(*(engine.drain(grace_seconds) for engine in self.engines.values()))
            if not all(drained):
                log.warning("requests were still running after %g s and are cut off", grace_seconds)
            # Responses being written get a moment more; requests that did not drain get none.
            await self._server.stop(1.0 if all(drained) else 0)
        for task in self._loops:
            task.remove_done_callback(self._loop_ended)
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await self._last.aclose()

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        """The scheduler never ends while the server runs; if it does, callers get an error instead of a wait."""
        log.critical("the scheduler ended, stopping", exc_info=task.exception())
        self._stopping = asyncio.get_running_loop().create_task(self.stop(0))


class Gateway:
    """HTTP in front of one DecoderServer, once, on `.port`: health from the start, 503 until the models have loaded."""

    def __init__(self, config: HttpConfig, server: DecoderServer) -> None:
        self.config = config
        grpc_config = server.config
        if any(model.read_control_tokens for model in grpc_config.models):
            server.keys.refuse_control_tokens(config.host)
        self.port = 0
        worker = None  # passages that come over HTTP are written by the first model that has one
        if writer := next((model for model in grpc_config.models if model.encoder_address), None):
            metadata = partial(call_metadata, writer.encoder_api_key)  # with the request's id, for the worker's log
            retry = RetryPolicy(budget_seconds=1.0)  # the caller over HTTP is told soon, and when to come back
            options = ClientOptions(timeout_seconds=None, tls=grpc_config.encoder_tls, metadata=metadata, retry=retry)
            worker = AsyncClient(writer.encoder_address, encoder_address=writer.encoder_address, options=options)
        self._word_search = WordSearch(server.store, server.threads, config.max_search_bytes)
        shared = server.engines, server.store, server.metrics.registry, server.readiness, server.threads
        self.context = Context(config, *shared, worker, self._word_search)
        guard = Guard(config.allowed_hosts, config.allowed_origins, any_host=bool(server.keys.keys))
        self._uvicorn = listener.make_server(
            build(self.context, server.keys, guard, server.metrics.http),
            max_connections=config.max_connections,
            refusal=lambda status, text: ("application/json", bytes(Problem(status, text).response().body)),
            header_seconds=config.header_seconds,
            ssl_certfile=grpc_config.tls_cert_file or None,
            ssl_keyfile=grpc_config.tls_key_file or None,
            ssl_ca_certs=grpc_config.tls_client_ca_file or None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if grpc_config.tls_client_ca_file else ssl.CERT_NONE,
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listens; OSError where it cannot."""
        bound = listener.bind(self.config.host, self.config.port, "HTTP")
        self.port = bound.getsockname()[1]
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=[bound]))
        while not self._uvicorn.started:
            if self._serving.done():
                await self._serving
                raise OSError(f"the HTTP server on {join(self.config.host, self.port)} ended during its start")
            await asyncio.sleep(0.005)

    async def stop(self, grace_seconds: float) -> None:
        """Says not ready, accepts nothing more, lets what runs finish within the grace, then stops."""
        self.context.draining = True
        if self._serving is not None:
            self._uvicorn.config.timeout_graceful_shutdown = max(1, round(grace_seconds))
            self._uvicorn.should_exit = True
            await self._serving
            self._serving = None
        await self._word_search.close()
        if self.context.worker is not None:
            await self.context.worker.close()
