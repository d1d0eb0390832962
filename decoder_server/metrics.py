"""Prometheus counters and histograms of one online server. An Observer; nothing global.

What the server counts anyway is read when it is asked for, by gauges.py.
"""

from __future__ import annotations

from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from decoder_server.observer import Answered, Pass

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
        for status, count in Tally(outcome.status.value for outcome in answered.trail.outcomes).items():
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
        """For cache.timed; called on the thread that read."""
        self._store_seconds.observe(seconds)
        self._store_bytes.inc(num_bytes)
        if not went_well:
            self._store_errors.inc()

    def encoder_up(self, model: str, up: bool) -> None:
        """For decoder_server.readiness."""
        self._encoder_up.labels(model).set(up)

    def http(self, status: int, seconds: float) -> None:
        """For decoder_server.http.counted."""
        self._http_answers.labels(str(status)).inc()
        self._http_seconds.observe(seconds)

    def rpc(self, method: str, code: str, seconds: float) -> None:
        """For preread.edge.observe."""
        self._rpcs.labels(method, code).inc()
        self._rpc_seconds.labels(method).observe(seconds)
