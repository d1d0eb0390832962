"""What a server counts anyway, read when a scrape asks: queues, tiers, refusals, models, collections.

Runs on the thread of the scrape. Collections are counted by the store, which may take it a while:
at most once in COLLECTION_SECONDS, and a store that does not answer costs only its own lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from threading import Lock

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from cache.errors import CacheError
from cache.store import Store
from cache.tier import StatesTier
from decoder_server.backend import KeepsContexts
from decoder_server.catalogue import Described, describe
from decoder_server.engine import Engine

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
        if isinstance(self._store, StatesTier):
            hits.add_metric(["store"], self._store.num_hits)
            misses.add_metric(["store"], self._store.num_misses)
            held.add_metric(["store"], self._store.num_bytes)
        inline = [engine.passages.inline for engine in engines.values() if engine.passages.inline is not None]
        if inline:
            hits.add_metric(["inline"], sum(one.num_hits for one in inline))
            misses.add_metric(["inline"], sum(one.num_encoded for one in inline))
            held.add_metric(["inline"], sum(one.num_bytes for one in inline))
        kept = [one.backend.tiers.all() for one in engines.values() if isinstance(one.backend, KeepsContexts)]
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
        compiled.add_metric([name], getattr(engine.backend, "num_compilations", 0))  # where a backend compiles
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
