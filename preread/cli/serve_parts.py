"""What `preread serve` runs beside the server: the encoder half, the port for metrics, the sender of spans."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from cache.store import Store
    from decoder_server.observer import Observer
    from preread.edge.keys import ApiKeys


@dataclass(frozen=True)
class EncoderHalf:
    """Where texts are sent to, and what is shown there."""

    address: str = ""  # "": nowhere
    api_key: str = ""
    registries: tuple[CollectorRegistry, ...] = ()


@asynccontextmanager
async def encoder_half(options: Mapping[str, Any], store: Store, keys: ApiKeys) -> AsyncIterator[EncoderHalf]:
    """Runs the worker where no other one is named. It asks for the same keys, and for one made for this process."""
    if options["no_encoder"] or options["encoder_address"]:
        yield EncoderHalf(options["encoder_address"] or "", options["encoder_api_key"] or "")
        return
    from encoder_worker.config import EncoderConfig
    from encoder_worker.server import EncoderServer
    from preread.edge.keys import ApiKeys, Scope, make_key

    own = secrets.token_urlsafe(32) if keys.required else ""
    worker = EncoderServer(
        EncoderConfig(
            checkpoint=options["model"],
            store=options["store"],
            port=options["encoder_port"],
            device=options["device"],
            dtype=options["dtype"],
            max_passage_tokens=options["max_passage_tokens"],
        ),
        store=store,
        keys=keys + ApiKeys((make_key(own, [Scope.ADMIN]),)) if own else keys,
    )
    await worker.start()
    try:
        yield EncoderHalf(f"127.0.0.1:{worker.port}", own, (worker.metrics.registry,))
    finally:
        await worker.stop(0)


@contextmanager
def metrics_port(options: Mapping[str, Any], registry: CollectorRegistry) -> Iterator[None]:
    """Listens on --metrics-port while the block runs, if there is one."""
    if options["metrics_port"] is None:
        yield
        return
    from preread.edge.scrape import metrics_listener

    with metrics_listener(registry, options["metrics_host"], options["metrics_port"]) as port:
        click.echo(f"metrics      http://{options['metrics_host']}:{port}/metrics")
        yield


@contextmanager
def tracing(options: Mapping[str, Any]) -> Iterator[tuple[Observer, ...]]:
    """The observer that sends spans, if --tracing is on.

    Raises:
        ValueError: the `tracing` extra is not installed.
    """
    if not options["tracing"]:
        yield ()
        return
    from preread.edge.otel import make_tracer

    tracer, shutdown = make_tracer("preread")
    from decoder_server.tracing import TracingObserver

    try:
        yield (TracingObserver(tracer),)
    finally:
        shutdown()
