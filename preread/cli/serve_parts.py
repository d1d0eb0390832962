"""What `preread serve` runs beside the server: the encoder half, the port for metrics, the sender of spans."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preread.cli.signals import say

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from cache.store import Store
    from decoder_server.model_config import ModelConfig
    from decoder_server.observer import Observer
    from encoder_worker.server import EncoderServer
    from preread.edge.keys import ApiKeys


@dataclass(frozen=True)
class EncoderHalves:
    """The models with the address where each one's texts are sent to, and what is counted there."""

    models: tuple[ModelConfig, ...]
    registries: tuple[CollectorRegistry, ...] = ()
    local: frozenset[str] = frozenset()  # addresses of workers in this process


@asynccontextmanager
async def encoder_halves(
    options: Mapping[str, Any], models: Sequence[ModelConfig], store: Store, keys: ApiKeys
) -> AsyncIterator[EncoderHalves]:
    """Runs a worker for every model that reads states and has none elsewhere.

    A worker here asks for the same keys, and for one made for this process.
    """
    from decoder_server.loading import is_fbnl

    placed: list[ModelConfig] = []
    registries: list[CollectorRegistry] = []
    local: list[str] = []
    elsewhere = options["encoder_address"] or ""
    own = secrets.token_urlsafe(32) if keys.required else ""
    async with AsyncExitStack() as stack:
        for model in models:
            if not is_fbnl(model):
                placed.append(model)
            elif model.encoder_address or elsewhere:
                address = model.encoder_address or elsewhere
                placed.append(replace(model, encoder_address=address, encoder_api_key=options["encoder_api_key"] or ""))
                # One worker has one encoder; models of another encoder name theirs in --model.
                elsewhere = elsewhere if model.encoder_address else ""
            elif options["no_encoder"] or options["encoder_address"]:
                placed.append(model)
            else:
                port = 0 if registries else options["encoder_port"]
                worker = await stack.enter_async_context(_worker(options, model, port, store, keys, own))
                address = f"127.0.0.1:{worker.port}"
                here = replace(model, encoder_address=address, encoder_api_key=own, encoder_in_process=True)
                placed.append(here)
                registries.append(worker.metrics.registry)
                local.append(placed[-1].encoder_address)
        # One process, one scrape: names may not repeat, so the first worker's figures are the ones shown.
        yield EncoderHalves(tuple(placed), tuple(registries[:1]), frozenset(local))


@asynccontextmanager
async def _worker(
    options: Mapping[str, Any], model: ModelConfig, port: int, store: Store, keys: ApiKeys, own: str
) -> AsyncIterator[EncoderServer]:
    from encoder_worker.config import EncoderConfig
    from encoder_worker.server import EncoderServer
    from preread.edge.keys import ApiKeys, Scope, make_key

    worker = EncoderServer(
        EncoderConfig(
            checkpoint=model.checkpoint,
            store=options["store"],
            port=port,
            device=model.device,
            dtype=model.dtype,
            max_passage_tokens=model.max_passage_tokens,
            read_control_tokens=model.read_control_tokens,
        ),
        store=store,
        keys=keys + ApiKeys((make_key(own, [Scope.ADMIN]),)) if own else keys,
    )
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop(0)


@contextmanager
def metrics_port(options: Mapping[str, Any], registry: CollectorRegistry) -> Iterator[None]:
    """Listens on --metrics-port while the block runs, if there is one."""
    if options["metrics_port"] is None:
        yield
        return
    from preread.edge.hosts import Guard, join
    from preread.edge.scrape import metrics_listener

    # It asks for no key, so the name counts whatever the other ports ask for.
    guard = Guard(options["allowed_hosts"])
    with metrics_listener(registry, options["metrics_host"], options["metrics_port"], guard) as port:
        say(f"metrics      http://{join(options['metrics_host'], port)}/metrics")
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
