"""Prometheus metrics of one encoder worker; nothing global. Their names differ from the reranking server's."""

from __future__ import annotations

from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.scheduler import Pass, Scheduler
from preread.v1 import encoder_pb2

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKENS = tuple(float(2**power) for power in range(4, 18))


class WorkerMetrics:
    """Made by the worker that owns it; `registry` is what a scrape renders."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._rpcs = Counter(
            "preread_encoder_rpcs",
            "gRPC calls by how they ended, refused ones too.",
            ["method", "code"],
            registry=registry,
        )
        self._rpc_seconds = Histogram(
            "preread_encoder_rpc_seconds", "One gRPC call.", ["method"], buckets=SECONDS, registry=registry
        )
        self._forward_seconds = Histogram(
            "preread_encoder_forward_seconds", "One pass of the encoder.", buckets=SECONDS, registry=registry
        )
        self._batch_tokens = Histogram(
            "preread_encoder_batch_tokens", "Tokens of one pass, without padding.", buckets=TOKENS, registry=registry
        )
        self._tokens = Counter(
            "preread_encoder_tokens", "Tokens computed: of texts, and padding.", ["kind"], registry=registry
        )
        self._passages = Counter(
            "preread_encoder_passages", "Passages of uploads by what became of them.", ["status"], registry=registry
        )
        self._on_demand = Gauge("preread_encoder_on_demand_tokens", "On-demand tokens under way.", registry=registry)
        self._model = Info("preread_encoder_model", "The encoder that runs here.", registry=registry)

    def watch(self, scheduler: Scheduler, encoder: PassageEncoder) -> None:
        """What is there once the model has loaded."""
        self._on_demand.set_function(lambda: scheduler.on_demand_tokens)
        self._model.info(
            {
                "checkpoint": encoder.identity.checkpoint,
                "fingerprint": encoder.identity.fingerprint[:12],
                "dtype": encoder.dtype_name,
                "device": encoder.device_name,
            }
        )

    def rpc(self, method: str, code: str, seconds: float) -> None:
        """For preread.edge.observe."""
        self._rpcs.labels(method, code).inc()
        self._rpc_seconds.labels(method).observe(seconds)

    def passed(self, one: Pass) -> None:
        self._forward_seconds.observe(one.seconds)
        self._batch_tokens.observe(one.num_tokens)
        self._tokens.labels("text").inc(one.num_tokens)
        self._tokens.labels("padding").inc(one.num_padding_tokens)

    def upserted(self, response: encoder_pb2.UpsertResponse) -> None:
        for status, count in Tally(result.status for result in response.results).items():
            name = encoder_pb2.UpsertStatus.Name(status).removeprefix("UPSERT_STATUS_").lower()
            self._passages.labels(name).inc(count)
