"""Observers of the engine's lifecycle: Prometheus metrics of one server, and one log line per request that ended.

Counters and histograms are filled as requests and forward passes end. Values that the server counts anyway are read
when a scrape comes in, on the scrape's thread. Traces are in tracing.py, which needs an extra.
"""

import collections
import logging
import time
from collections.abc import Iterable, Mapping
from functools import partial
from operator import attrgetter
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily as CounterFamily
from prometheus_client.core import GaugeMetricFamily as GaugeFamily
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from cache.errors import CacheError
from cache.read_cache import CachedStore
from cache.store import Store
from decoder_server.engine.collections import StoredCollection, describe
from decoder_server.engine.engine import Engine
from decoder_server.engine.lifecycle import PassRecord, RequestTrace
from decoder_server.models.backend import StatesBackend
from preread_edge.logs import fields

log = logging.getLogger(__name__)

# A forward pass takes from a millisecond (a few states on a GPU) to seconds (a large batch on a small CPU).
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKENS = tuple(float(2**power) for power in range(6, 18))
PAIRS = tuple(float(2**power) for power in range(11))
COLLECTION_SECONDS = 60.0  # between two counts of the collections: the store may take long

_PER_MODEL: tuple[tuple[type[CounterFamily | GaugeFamily], str, str, str], ...] = (  # the last: of an engine
    (GaugeFamily, "queue_requests", "Requests in flight.", "admission.num_requests"),
    (GaugeFamily, "queue_tokens", "Tokens they still need, by estimate.", "admission.num_tokens"),
    (CounterFamily, "admission_refusals", "Requests rejected because the queue was full.", "admission.num_rejected"),
    (CounterFamily, "dropped_pairs", "Queued pairs dropped: cancelled or past their deadline.",
     "scheduler.stats.num_dropped_pairs"),
    (CounterFamily, "compilations", "Compiled steps; constant once warm.", "backend.num_compilations"),
)  # fmt: skip
_PER_COLLECTION = (
    ("passages", "Passages stored.", "num_passages"),
    ("states", "States stored.", "num_states"),
    ("bytes", "Bytes of records stored.", "size_bytes"),
)


class Metrics(Collector):
    """Metrics of one server, in a registry that belongs to it; a store that is down costs only its own lines."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="preread", registry=self.registry)
        histogram = partial(Histogram, namespace="preread", registry=self.registry, buckets=SECONDS)
        by_model = ("model",)
        self._requests = counter("requests", "Rerank and explain requests of every edge, by result.", ("model", "code"))
        self._request_seconds = histogram("request_seconds", "From arrival to response.", by_model)
        self._candidates = counter("candidates", "Candidates of answered requests.", ("model", "status"))
        text = "Texts of answered requests that were looked up in collections: found, or not."
        self._lookups = counter("lookups", text, ("model", "result"))
        text = "Requests scored at a coarser ratio than requested, by cause."
        self._degraded = counter("degraded_requests", text, ("model", "reason"))
        text = "Cascades cut short by their deadline before the last stage."
        self._stopped_early = counter("stopped_early_requests", text, by_model)
        self._queue_wait = histogram("queue_wait_seconds", "Time a request had queued pairs and none in a batch.")
        self._fetch_seconds = histogram("fetch_seconds", "One read of a request's states, through the read cache.")
        self._forward_seconds = histogram("forward_seconds", "One forward pass.")
        self._batch_tokens = histogram("batch_tokens", "Prompt tokens and states of one batch.", buckets=TOKENS)
        self._batch_pairs = histogram("batch_pairs", "Pairs of prompt and passage of one batch.", buckets=PAIRS)
        self._cells = counter("attention_cells", "Attention cells computed: needed, and padding.", ("kind",))
        self._store_seconds = histogram("store_read_seconds", "One read of the store, behind the read cache.")
        self._store_bytes = counter("store_read_bytes", "Bytes of records read from the store.")
        self._store_errors = counter("store_read_errors", "Reads of the store that failed.")
        text = "1: the model's encoder answered its last check."
        self._encoder_up = Gauge("encoder_up", text, by_model, namespace="preread", registry=self.registry)
        self._rpcs = counter("rpcs", "gRPC calls by status, rejected ones included.", ("method", "code"))
        self._rpc_seconds = histogram("rpc_seconds", "One gRPC call.", ("method",))
        self._http_answers = counter("http_answers", "HTTP responses of the gateway, of every path.", ("status",))
        self._http_seconds = histogram("http_seconds", "One HTTP request.")
        self._lock = Lock()
        self._described: list[StoredCollection] = []
        self._answers = False
        self._counted = -COLLECTION_SECONDS

    def watch(self, engines: Mapping[str, Engine], store: Store) -> None:
        """Adds what engines and store count themselves; `engines` may fill later."""
        self._engines, self._store = engines, store
        self.registry.register(self)

    def request_finished(self, trace: RequestTrace) -> None:
        self._requests.labels(trace.model, trace.code).inc()
        self._request_seconds.labels(trace.model).observe(trace.end - trace.start)
        for status, count in collections.Counter(result.status for result in trace.results).items():
            self._candidates.labels(trace.model, status).inc(count)
        if trace.num_looked_up:
            self._lookups.labels(trace.model, "hit").inc(trace.num_found)
            self._lookups.labels(trace.model, "miss").inc(trace.num_looked_up - trace.num_found)
        if trace.degraded:
            self._degraded.labels(trace.model, trace.degraded.reason).inc()
        if trace.stopped_early:
            self._stopped_early.labels(trace.model).inc()
        if trace.timings is not None:
            self._queue_wait.observe(trace.timings.queue_seconds)
        for start, end, _ in trace.fetches:
            self._fetch_seconds.observe(end - start)

    def pass_finished(self, one: PassRecord) -> None:
        self._forward_seconds.observe(one.seconds)
        self._batch_tokens.observe(one.num_tokens)
        self._batch_pairs.observe(one.num_pairs)
        self._cells.labels("needed").inc(one.num_cells)
        self._cells.labels("padding").inc(one.num_padding_cells)

    def store_read(self, seconds: float, num_bytes: int, went_well: bool) -> None:
        """Counts one read of the store; called on the thread that read."""
        self._store_seconds.observe(seconds)
        self._store_bytes.inc(num_bytes)
        if not went_well:
            self._store_errors.inc()

    def encoder_up(self, model: str, up: bool) -> None:
        self._encoder_up.labels(model).set(up)

    def http(self, status: int, seconds: float) -> None:
        self._http_answers.labels(str(status)).inc()
        self._http_seconds.observe(seconds)

    def rpc(self, method: str, code: str, seconds: float) -> None:
        self._rpcs.labels(method, code).inc()
        self._rpc_seconds.labels(method).observe(seconds)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering does not read the store."""
        return ()

    def collect(self) -> Iterable[Metric]:
        engines = dict(self._engines)
        for kind, name, text, path in _PER_MODEL:
            family = kind(f"preread_{name}", text, labels=["model"])
            for model, engine in engines.items():
                family.add_metric([model], max(0, attrgetter(path)(engine)))  # an estimate may fall below 0
            yield family
        hits = CounterFamily("preread_cache_hits", "Cache hits, in passages.", labels=["tier"])
        misses = CounterFamily("preread_cache_misses", "Cache misses, in passages.", labels=["tier"])
        held = GaugeFamily("preread_cache_bytes", "Bytes held by a cache.", labels=["tier"])

        def add(tier: str, num_hits: int, num_misses: int, num_bytes: int) -> None:
            for family, value in ((hits, num_hits), (misses, num_misses), (held, num_bytes)):
                family.add_metric([tier], value)

        if isinstance(self._store, CachedStore):
            add("store", self._store.num_hits, self._store.num_misses, self._store.num_bytes)
        if inline := [one.fetcher.on_demand for one in engines.values() if one.fetcher.on_demand is not None]:
            counts = ((one.num_hits, one.num_encoded, one.num_bytes) for one in inline)
            add("inline", *map(sum, zip(*counts, strict=True)))
        kept = [engine.backend.caches for engine in engines.values() if isinstance(engine.backend, StatesBackend)]
        for caches in zip(*kept, strict=True):  # one kind of cache, of all models
            counts = ((cache.num_hits, cache.num_misses, cache.num_bytes) for cache in caches)
            add(caches[0].name, *map(sum, zip(*counts, strict=True)))
        if known := [engine.score_cache for engine in engines.values()]:  # none before the models have loaded
            counts = ((cache.num_hits, cache.num_misses, cache.num_bytes) for cache in known)
            add("scores", *map(sum, zip(*counts, strict=True)))
        yield from (hits, misses, held)
        models = InfoMetricFamily("preread_model", "A model that is served.")
        for model, engine in engines.items():
            backend, identity = engine.backend, engine.backend.identity()
            labels = {"model": model, "backend": backend.name, "checkpoint": backend.checkpoint_name}
            labels |= {"dtype": backend.dtype_name, "device": backend.device_name}
            models.add_metric([], labels | {"fingerprint": identity.fingerprint[:12] if identity is not None else ""})
        yield models
        yield from self._collections()

    def _collections(self) -> Iterable[Metric]:
        with self._lock:  # concurrent scrapes count once
            now = time.monotonic()
            if now - self._counted >= COLLECTION_SECONDS:
                self._counted = now
                try:
                    self._described, self._answers = describe(self._store), True
                except CacheError:
                    self._answers = False  # the last counts stay; preread_store_up says how far to trust them
            described, answers = self._described, self._answers
        yield GaugeFamily("preread_store_up", "1: the store answered its last count.", float(answers))
        info = InfoMetricFamily("preread_collection", "A collection that this server can read.")
        for manifest in (one.manifest for one in described):
            labels = {"collection": manifest.collection, "codec": manifest.codec}
            labels |= {"compression_ratio": str(manifest.compression_ratio), "fingerprint": manifest.fingerprint[:12]}
            info.add_metric([], labels)
        yield info
        for name, text, count in _PER_COLLECTION:
            family = GaugeFamily(f"preread_collection_{name}", text, labels=["collection"])
            for one in described:
                family.add_metric([one.manifest.collection], getattr(one.stats, count))
            yield family


class RequestLog:
    """One log line per request. `log_text` adds query and instruction; passages are never logged."""

    def __init__(self, *, log_text: bool = False) -> None:
        self._log_text = log_text

    def request_finished(self, trace: RequestTrace) -> None:
        request, timings = trace.request, trace.timings
        values = {
            "model": trace.model,
            "code": trace.code,
            "collection": request.collection,
            "num_candidates": len(request.candidates),
            **({"num_queries": len(trace.queries)} if trace.queries else {}),
            "seconds": round(trace.end - trace.start, 6),
        }
        if timings is not None:
            names = ("fetch_seconds", "encode_seconds", "queue_seconds", "compute_seconds")
            values |= {name: round(getattr(timings, name), 6) for name in names}
        if trace.num_looked_up:
            values |= {"num_looked_up": trace.num_looked_up, "num_found": trace.num_found}
        values |= {"degraded": trace.degraded.reason} if trace.degraded else {}
        values |= {"stopped_early": True} if trace.stopped_early else {}
        counts = collections.Counter(result.status for result in trace.results)
        values |= {f"num_{status}": count for status, count in sorted(counts.items())}
        if self._log_text:
            values |= {"query": "\n".join(trace.queries) or request.query, "instruction": request.instruction}
        level = logging.ERROR if trace.code == "internal" else logging.INFO
        log.log(level, trace.kind, extra=fields(**values))

    def pass_finished(self, one: PassRecord) -> None:
        log.debug("pass", extra=fields(num_pairs=one.num_pairs, num_tokens=one.num_tokens, seconds=one.seconds))
