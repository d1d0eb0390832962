"""The offline half as a process part: binds, loads, proves the model by a real forward pass, serves, drains.

Until that pass has succeeded health says NOT_SERVING. Owns one thread for the model and a few for tokenizer and store.
"""

import asyncio
import logging
from collections import Counter as Tally
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from cache.open import open_store
from cache.store import Store
from encoder_worker.config import EncoderConfig
from encoder_worker.keeping import Keeper, Reason
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.scheduler import EncodeScheduler
from encoder_worker.service import EncoderService, Worker
from preread.v1 import encoder_pb2, encoder_pb2_grpc
from preread_edge import logs
from preread_edge.access import ApiKeys
from preread_edge.grpc_server import add_standard_services, listen, make_server

T = TypeVar("T")
log = logging.getLogger(__name__)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKENS = tuple(float(2**power) for power in range(4, 18))
SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["EncoderService"].full_name
NUM_THREADS = 4
STORE_READ_SECONDS = 5.0  # writers are in no hurry: a slow store is better than a passage given up on


class _Metrics:
    """Of one worker; `registry` is what a scrape renders. The names differ from the reranking server's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def make(kind: Callable[..., T], name: str, help: str, *labels: str, **options: Any) -> T:
            return kind(f"preread_encoder_{name}", help, labels, registry=self.registry, **options)

        self._rpcs = make(Counter, "rpcs", "gRPC calls by how they ended, refused ones too.", "method", "code")
        self._rpc_seconds = make(Histogram, "rpc_seconds", "One gRPC call.", "method", buckets=SECONDS)
        self._forward_seconds = make(Histogram, "forward_seconds", "One pass of the encoder.", buckets=SECONDS)
        self._batch_tokens = make(Histogram, "batch_tokens", "Tokens of one pass, without padding.", buckets=TOKENS)
        self._tokens = make(Counter, "tokens", "Tokens computed: of texts, and padding.", "kind")
        self._passages = make(Counter, "passages", "Passages of uploads by their outcome.", "status")
        self._kept = make(Counter, "kept_passages", "Passages encoded on demand that were kept.")
        self._dropped = make(Counter, "not_kept_passages", "Those that were to be kept and were not.", "reason")
        self._evicted = make(Counter, "evicted_passages", "Kept passages evicted: over the budget, or a share of it.")
        self._held = make(Gauge, "kept_bytes", "Bytes of kept passages in the store.", "collection")
        self.on_demand = make(Gauge, "on_demand_tokens", "On-demand tokens in flight.")
        self.model = make(Info, "model", "The encoder that runs here.")

    def rpc(self, method: str, code: str, seconds: float) -> None:
        """Counts and logs a call; Describe, which servers call every few seconds, has no line by default."""
        self._rpcs.labels(method, code).inc()
        self._rpc_seconds.labels(method).observe(seconds)
        level = logging.DEBUG if method.endswith("/Describe") and code == "OK" else logging.INFO
        log.log(level, "call", extra=logs.fields(method=method, code=code, seconds=round(seconds, 6)))

    def passed(self, num_tokens: int, num_padding_tokens: int, seconds: float) -> None:
        self._forward_seconds.observe(seconds)
        self._batch_tokens.observe(num_tokens)
        self._tokens.labels("text").inc(num_tokens)
        self._tokens.labels("padding").inc(num_padding_tokens)

    def upserted(self, response: encoder_pb2.UpsertResponse) -> None:
        for status, count in Tally(result.status for result in response.results).items():
            name = encoder_pb2.UpsertStatus.Name(status).removeprefix("UPSERT_STATUS_").lower()
            self._passages.labels(name).inc(count)

    def kept(self, num_passages: int) -> None:
        self._kept.inc(num_passages)

    def dropped(self, reason: Reason, num_passages: int) -> None:
        self._dropped.labels(reason.value).inc(num_passages)

    def evicted(self, num_passages: int) -> None:
        self._evicted.inc(num_passages)

    def holds(self, collection: str, num_bytes: int) -> None:
        self._held.labels(collection).set(num_bytes)


class EncoderServer:
    """One encoder worker: `start`, serve on `.port`, then `stop`. Shares a `store`, or opens the configured one."""

    def __init__(self, config: EncoderConfig, *, store: Store | None = None, keys: ApiKeys | None = None) -> None:
        self.config = config
        self.keys = keys or ApiKeys()
        if config.read_control_tokens:
            self.keys.refuse_control_tokens(config.host)
        self.metrics = _Metrics()
        self.port = 0
        self._owns_store = store is None
        self._store = store or open_store(config.store, read_budget_seconds=STORE_READ_SECONDS)
        self._kept_store = self._store  # for what is kept of texts encoded on demand
        if seconds := config.max_kept_seconds:  # of records that this handle writes
            self._kept_store = open_store(config.store, read_budget_seconds=STORE_READ_SECONDS, ttl_seconds=seconds)
        self._model_thread = EncodeScheduler.make_model_thread()
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="text")
        self._store_threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="store")
        self._service = EncoderService(self.metrics.upserted)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in grpc-stubs
        self._server: grpc.aio.Server | None = None
        self._loop: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None

    @property
    def engine(self) -> Worker:
        if self._service.worker is None:
            raise RuntimeError("this worker has not started, or was stopped")
        return self._service.worker

    async def start(self) -> None:
        """Binds, loads and proves the model. When it raises, everything is stopped again.

        Raises OSError where the port is taken, CheckpointError or ValueError for what cannot be served.
        """
        try:
            server = make_server(
                self.keys,
                self.metrics.rpc,
                max_calls=self.config.max_connections,
                max_request_bytes=self.config.max_message_bytes,
                max_response_bytes=self.config.max_answer_bytes,
            )
            encoder_pb2_grpc.add_EncoderServiceServicer_to_server(self._service, server)
            add_standard_services(server, self._health, [SERVICE])
            await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
            self.port = listen(server, self.config, self.config.port)
            await server.start()
            self._server = server
            await self._load()
        except BaseException:
            await self.stop(0)
            raise

    async def stop(self, grace_seconds: float) -> None:
        """Says NOT_SERVING, takes no new calls, lets what runs finish within the grace, then stops."""
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace_seconds)
            self._server = None
        self._service.worker = None
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)  # what ended it before was logged
            self._loop = None
        if self._keeping is not None:
            self._close_keeper()  # which writes what is queued
            await asyncio.gather(self._keeping, return_exceptions=True)
            self._keeping = None
        for threads in (self._model_thread, self._threads, self._store_threads):
            await asyncio.to_thread(threads.shutdown, wait=True, cancel_futures=True)
        if self._kept_store is not self._store:
            self._kept_store.close()
        if self._owns_store:
            self._store.close()
            self._owns_store = False

    async def _load(self) -> None:
        loop = asyncio.get_running_loop()
        names = ("device", "dtype", "max_passage_tokens", "read_control_tokens", "max_batch_tokens")
        load = partial(PassageEncoder.load, self.config.checkpoint, **{one: getattr(self.config, one) for one in names})
        encoder = await loop.run_in_executor(self._model_thread, load)
        await loop.run_in_executor(self._model_thread, encoder.encode_one, "warm", 1)  # a real forward pass
        scheduler = EncodeScheduler(encoder, self._model_thread, self.metrics.passed)
        self.metrics.on_demand.set_function(lambda: scheduler.on_demand_tokens)
        model = {"checkpoint": encoder.identity.checkpoint, "fingerprint": encoder.identity.fingerprint[:12]}
        self.metrics.model.info(model | {"dtype": encoder.dtype_name, "device": encoder.device_name})
        self._loop = asyncio.create_task(scheduler.run())
        self._loop.add_done_callback(self._loop_ended)
        threads = self._threads, self._store_threads
        keeper = Keeper(self._kept_store, encoder, self.config, threads, self.metrics)
        self._keeping, self._close_keeper = asyncio.create_task(keeper.run()), keeper.close
        self._service.worker = Worker(self.config, encoder, scheduler, self._store, *threads, keeper)
        await self._say(health_pb2.HealthCheckResponse.SERVING)

    async def _say(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        """The batching loop must never end; if it does, say so and take no more work."""
        if not task.cancelled():
            log.critical("the batching loop ended, stopping", exc_info=task.exception())
            self._service.worker = None
            self._saying = asyncio.create_task(self._say(health_pb2.HealthCheckResponse.NOT_SERVING))
