"""Prometheus counters and histograms of one online server. An Observer; nothing global.

What the server counts anyway is read when it is asked for, by gauges.py.

What a server counts anyway, read when a scrape asks: queues, tiers, refusals, models, collections.

Runs on the thread of the scrape. Collections are counted by the store, which may take it a while:
at most once in COLLECTION_SECONDS, and a store that does not answer costs only its own lines.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from cache.errors import CacheError
from cache.read_cache import CachedStore
from cache.store import Store
from decoder_server.engine.collections import Described, describe
from decoder_server.engine.engine import Engine
from decoder_server.engine.lifecycle import Answered, Pass
from decoder_server.models.backend import StatesBackend

# A pass takes from a millisecond (a few states on a GPU) to seconds (a large batch on a small CPU).
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKENS = tuple(float(2**power) for power in range(6, 18))
PAIRS = tuple(float(2**power) for power in range(11))


class Metrics:
    """Made by the server that owns it; `registry` is what a scrape renders."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "preread_requests",
            "Requests to rerank or explain by how they ended, of every edge.",
            ["model", "code"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            "preread_request_seconds", "From arrival to answer.", ["model"], buckets=SECONDS, registry=registry
        )
        self._candidates = Counter(
            "preread_candidates", "Candidates of answered requests.", ["model", "status"], registry=registry
        )
        self._degraded = Counter(
            "preread_degraded_requests",
            "Requests read coarser than asked, by the pressure they were under.",
            ["model", "reason"],
            registry=registry,
        )
        self._stopped_early = Counter(
            "preread_stopped_early_requests",
            "Cascades whose deadline neared before their last stage was through.",
            ["model"],
            registry=registry,
        )
        self._queue_wait = Histogram(
            "preread_queue_wait_seconds",
            "Time in which a request had pairs ready and none of them computed.",
            buckets=SECONDS,
            registry=registry,
        )
        self._fetch_seconds = Histogram(
            "preread_fetch_seconds",
            "One read of a request's states, through the tier in memory.",
            buckets=SECONDS,
            registry=registry,
        )
        self._forward_seconds = Histogram(
            "preread_forward_seconds", "One pass of the model.", buckets=SECONDS, registry=registry
        )
        self._batch_tokens = Histogram(
            "preread_batch_tokens", "Prompt tokens and states of one pass.", buckets=TOKENS, registry=registry
        )
        self._batch_pairs = Histogram(
            "preread_batch_pairs", "Pairs of prompt and passage of one pass.", buckets=PAIRS, registry=registry
        )
        self._cells = Counter(
            "preread_attention_cells", "Attention cells computed: needed, and padding.", ["kind"], registry=registry
        )
        self._store_seconds = Histogram(
            "preread_store_read_seconds", "One read of the store, behind the tier.", buckets=SECONDS, registry=registry
        )
        self._store_bytes = Counter(
            "preread_store_read_bytes", "Bytes of records that the store gave.", registry=registry
        )
        self._store_errors = Counter("preread_store_read_errors", "Reads of the store that failed.", registry=registry)
        self._encoder_up = Gauge(
            "preread_encoder_up",
            "1: the model's encoder answered when it was last asked.",
            ["model"],
            registry=registry,
        )
        self._rpcs = Counter(
            "preread_rpcs", "gRPC calls by how they ended, refused ones too.", ["method", "code"], registry=registry
        )
        self._rpc_seconds = Histogram(
            "preread_rpc_seconds", "One gRPC call.", ["method"], buckets=SECONDS, registry=registry
        )

        self._http_answers = Counter(
            "preread_http_answers", "HTTP answers of the gateway, of every path.", ["status"], registry=registry
        )
        self._http_seconds = Histogram("preread_http_seconds", "One HTTP request.", buckets=SECONDS, registry=registry)

    def answered(self, answered: Answered) -> None:
        self._requests.labels(answered.model, answered.code).inc()
        self._request_seconds.labels(answered.model).observe(answered.end - answered.start)
        for status, count in Tally(outcome.status for outcome in answered.trail.outcomes).items():
            self._candidates.labels(answered.model, status).inc(count)
        if answered.trail.degraded:
            self._degraded.labels(answered.model, answered.trail.degraded).inc()
        if answered.trail.stopped_early:
            self._stopped_early.labels(answered.model).inc()
        if answered.timings is not None:
            self._queue_wait.observe(answered.timings.queue_seconds)
        for fetch in answered.trail.fetches:
            self._fetch_seconds.observe(fetch.end - fetch.start)

    def passed(self, one: Pass) -> None:
        self._forward_seconds.observe(one.seconds)
        self._batch_tokens.observe(one.num_tokens)
        self._batch_pairs.observe(one.num_pairs)
        self._cells.labels("needed").inc(one.num_cells)
        self._cells.labels("padding").inc(one.num_padding_cells)

    def store_read(self, seconds: float, num_bytes: int, went_well: bool) -> None:
        """For cache.read_cache; called on the thread that read."""
        self._store_seconds.observe(seconds)
        self._store_bytes.inc(num_bytes)
        if not went_well:
            self._store_errors.inc()

    def encoder_up(self, model: str, up: bool) -> None:
        """For decoder_server.readiness."""
        self._encoder_up.labels(model).set(up)

    def http(self, status: int, seconds: float) -> None:
        """For decoder_server.edge.http.envelope."""
        self._http_answers.labels(str(status)).inc()
        self._http_seconds.observe(seconds)

    def rpc(self, method: str, code: str, seconds: float) -> None:
        """For preread_edge.grpc_server."""
        self._rpcs.labels(method, code).inc()
        self._rpc_seconds.labels(method).observe(seconds)


COLLECTION_SECONDS = 60.0


class ServerCollector(Collector):
    """Register it with a server's registry."""

    def __init__(
        self, engines: Mapping[str, Engine], store: Store, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            engines: by served name; filled when the models have loaded.
            store: with its tier, if there is one.
        """
        self._engines = engines
        self._store = store
        self._clock = clock
        self._lock = Lock()
        self._described: list[Described] = []
        self._answers = False
        self._counted: float | None = None

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not read the store."""
        return ()

    def collect(self) -> Iterable[Metric]:
        engines = dict(self._engines)
        yield from _queues(engines)
        yield from self._tiers(engines)
        yield _models(engines)
        yield from self._collections()

    def _tiers(self, engines: Mapping[str, Engine]) -> Iterable[Metric]:
        hits = CounterMetricFamily("preread_cache_hits", "Passages found in a tier in memory.", labels=["tier"])
        misses = CounterMetricFamily("preread_cache_misses", "Passages not found there.", labels=["tier"])
        held = GaugeMetricFamily("preread_cache_bytes", "Bytes a tier holds.", labels=["tier"])
        if isinstance(self._store, CachedStore):
            hits.add_metric(["store"], self._store.num_hits)
            misses.add_metric(["store"], self._store.num_misses)
            held.add_metric(["store"], self._store.num_bytes)
        inline = [engine.passages.inline for engine in engines.values() if engine.passages.inline is not None]
        if inline:
            hits.add_metric(["inline"], sum(one.num_hits for one in inline))
            misses.add_metric(["inline"], sum(one.num_encoded for one in inline))
            held.add_metric(["inline"], sum(one.num_bytes for one in inline))
        kept = [one.backend.caches for one in engines.values() if isinstance(one.backend, StatesBackend)]
        for tiers in zip(*kept, strict=True):  # one kind of tier, of all models
            hits.add_metric([tiers[0].name], sum(tier.num_hits for tier in tiers))
            misses.add_metric([tiers[0].name], sum(tier.num_misses for tier in tiers))
            held.add_metric([tiers[0].name], sum(tier.num_bytes for tier in tiers))
        return hits, misses, held

    def _collections(self) -> Iterable[Metric]:
        described, answers = self._counted_collections()
        info = InfoMetricFamily("preread_collection", "A collection that this server can read.")
        passages = GaugeMetricFamily("preread_collection_passages", "Passages stored.", labels=["collection"])
        states = GaugeMetricFamily("preread_collection_states", "States stored.", labels=["collection"])
        size = GaugeMetricFamily("preread_collection_bytes", "Bytes of records stored.", labels=["collection"])
        for one in described:
            manifest, name = one.manifest, [one.manifest.collection]
            info.add_metric(
                [],
                {
                    "collection": manifest.collection,
                    "codec": manifest.codec,
                    "compression_ratio": str(manifest.compression_ratio),
                    "fingerprint": manifest.fingerprint[:12],
                },
            )
            passages.add_metric(name, one.stats.num_passages)
            states.add_metric(name, one.stats.num_states)
            size.add_metric(name, one.stats.size_bytes)
        yield GaugeMetricFamily("preread_store_up", "1: the store answered when it was last counted.", float(answers))
        yield from (info, passages, states, size)

    def _counted_collections(self) -> tuple[list[Described], bool]:
        with self._lock:  # scrapes at the same time count once
            now = self._clock()
            if self._counted is None or now - self._counted >= COLLECTION_SECONDS:
                self._counted = now
                try:
                    self._described, self._answers = describe(self._store), True
                except CacheError:
                    self._answers = False  # what was there stays shown; preread_store_up says how much to trust it
            return self._described, self._answers


def _queues(engines: Mapping[str, Engine]) -> Iterable[Metric]:
    requests = GaugeMetricFamily("preread_queue_requests", "Requests admitted and not answered.", labels=["model"])
    tokens = GaugeMetricFamily("preread_queue_tokens", "Tokens they still need, by estimate.", labels=["model"])
    refused = CounterMetricFamily("preread_admission_refusals", "Requests turned away: queue full.", labels=["model"])
    dropped = CounterMetricFamily("preread_dropped_pairs", "Pairs whose caller left or was late.", labels=["model"])
    compiled = CounterMetricFamily("preread_compilations", "Fused steps; constant once warm.", labels=["model"])
    for name, engine in engines.items():
        compiled.add_metric([name], engine.backend.num_compilations)
        requests.add_metric([name], engine.admission.num_requests)
        tokens.add_metric([name], max(0.0, engine.admission.num_tokens))
        refused.add_metric([name], engine.admission.num_refused)
        dropped.add_metric([name], engine.batcher.counts.num_dropped_pairs)
    return requests, tokens, refused, dropped, compiled


def _models(engines: Mapping[str, Engine]) -> Metric:
    info = InfoMetricFamily("preread_model", "A model that is served.")
    for name, engine in engines.items():
        identity = engine.backend.identity()
        info.add_metric(
            [],
            {
                "model": name,
                "backend": engine.backend.name,
                "checkpoint": engine.backend.checkpoint_name,
                "fingerprint": identity.fingerprint[:12] if identity is not None else "",
                "dtype": engine.backend.dtype_name,
                "device": engine.backend.device_name,
            },
        )
    return info
