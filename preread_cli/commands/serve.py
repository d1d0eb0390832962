"""`preread serve`, both halves in one process, and `preread encode-worker`, the encoder for other machines.

With `serve` the encoder listens on loopback for the server in this process, and for `--encoder-address` of others on
this machine. A model that is not run as published is checked once before it serves.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cache import errors
from decoder_server.config import DecoderConfig, HttpConfig, KvCacheConfig, ModelConfig
from encoder_worker.config import EncoderConfig
from preread_cli import flags
from preread_cli.config_file import config_option
from preread_cli.flags import option
from preread_cli.models import model_option, models_option, parse_models
from preread_cli.process import Process, process_options, say
from preread_edge.settings import LoadConfig

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from cache.store import Store
    from decoder_server.engine.lifecycle import Observer
    from decoder_server.models.backend import Backend
    from decoder_server.server import DecoderServer, Gateway
    from encoder_worker.server import EncoderServer
    from preread_edge.access import ApiKeys

    Load = Callable[[ModelConfig], Backend]

log = logging.getLogger(__name__)

MAX_SHOWN = 5  # collections in the start-up lines
PASSED_CHECKS = Path("~/.cache/preread/health")
# What may change scores, other than the model's own files.
_PACKAGES = ("preread", "torch", "transformers", "tokenizers", "onnxruntime")
_MODEL_FLAGS = (
    "name", "device", "dtype", "max_passage_tokens", "read_control_tokens", "encoder_address", "encoder_api_key",
)  # fmt: skip


@click.command()
@config_option
@models_option
@flags.knob_options(ModelConfig, only=_MODEL_FLAGS)
@option("--no-encoder", is_flag=True, help="Answer from stored states only.")
@option("--encoder-port", type=flags.PORT, default=50052, help="Loopback port of the encoder in this process.")
@flags.knob_options(DecoderConfig, KvCacheConfig, HttpConfig, without_default=["--http-port"])
@option(
    "--check/--no-check",
    default=None,
    help="Refuse to start with a model whose scores are wrong (`preread check`): every model, or none. By "
    "default only cross-encoders that do not run in plain float32 are checked, once each.",
)
@option("--tracing", is_flag=True, help="Send OpenTelemetry spans to where the OTEL_* variables say.")
@process_options
@click.pass_context
def serve(ctx: click.Context, /, **options: Any) -> None:
    """Start the reranking server.

    \b
    Answers gRPC on --port, and HTTP on --http-port, from the states in --store. Texts that come
    with a request, and ids that are not stored but come with a text, are encoded by a second half
    in this process, or by the worker at --encoder-address (`preread encode-worker`), or not at all
    with --no-encoder.

    Ready when the last line says so; SIGTERM, SIGHUP or Ctrl-C lets requests in flight finish.
    """
    if options["no_encoder"] and options["encoder_address"]:
        raise click.UsageError("--no-encoder and --encoder-address are mutually exclusive.")
    models = parse_models(options, kv_caches=flags.from_options(KvCacheConfig, options))
    config = flags.from_options(DecoderConfig, options, models=models)
    http = flags.from_options(HttpConfig, options) if options["http_port"] is not None else None
    asyncio.run(_serve(options, config, http, Process(ctx)))


async def _serve(options: Mapping[str, Any], config: DecoderConfig, http: HttpConfig | None, process: Process) -> None:
    from cache.open import open_store
    from checkpoint.compute import keep_loaded
    from decoder_server.models.loading import load_model
    from decoder_server.server import DecoderServer, Gateway
    from preread_edge.logs import make_tracer

    keys = process.begin()
    async with AsyncExitStack() as stack:
        opened = open_store(config.store, read_budget_seconds=config.read_budget_seconds)
        store = stack.enter_context(closing(opened))
        with suppress(errors.StoreLocked, errors.StoreUnavailable):  # which may end
            await asyncio.to_thread(store.list_collections)
        observers: tuple[Observer, ...] = ()
        if options["tracing"]:
            tracer, shutdown = make_tracer("preread")  # raises where the `tracing` extra is not installed
            stack.callback(shutdown)
            from decoder_server.tracing import TracingObserver

            observers = (TracingObserver(tracer),)
        models, registry = await _start_encoders(options, config, store, keys, stack)
        config = replace(config, models=models)
        load = load_model if options["check"] is False else checked(load_model, every=bool(options["check"]))
        server = DecoderServer(config, store=store, load=load, keys=keys, observers=observers)
        if registry is not None:
            server.metrics.registry.register(registry)
        stack.enter_context(process.metrics(server.metrics.registry))
        gateway = Gateway(http, server) if http is not None else None
        if gateway is not None:  # it listens before the models have loaded, so that health can be asked
            await gateway.start()
            stack.push_async_callback(gateway.stop, 0)
        if not await process.starts(server.start()):
            return
        keep_loaded()
        await _introduce(server, store, gateway, process)
        if server.readiness.problem:
            say(f"waiting      not ready: {server.readiness.problem}")
        if await process.starts(server.readiness.wait()):
            await process.runs()
        grace = process.stops()
        await asyncio.gather(server.stop(grace), *([] if gateway is None else [gateway.stop(grace)]))


async def _start_encoders(
    options: Mapping[str, Any], config: DecoderConfig, store: Store, keys: ApiKeys, stack: AsyncExitStack
) -> tuple[tuple[ModelConfig, ...], CollectorRegistry | None]:
    """A worker, until the stack ends, for every model that scores states and has none elsewhere.

    Returns the models with the addresses of their encoders, and the metrics of the first worker: one process, one
    scrape, and names may not repeat there.
    """
    from decoder_server.models.loading import is_fbnl
    from encoder_worker.server import EncoderServer
    from preread_edge.access import ApiKeys

    models: list[ModelConfig] = []
    workers: list[EncoderServer] = []
    elsewhere = options["encoder_address"] or ""
    # A worker in this process requires the server's keys, or one made for this process.
    own = secrets.token_urlsafe(32) if keys.required else ""
    accepted = keys + ApiKeys.parse([own]) if own else keys
    for model in config.models:
        if not is_fbnl(model):
            models.append(model)
        elif model.encoder_address or elsewhere:
            address = model.encoder_address or elsewhere
            models.append(replace(model, encoder_address=address, encoder_api_key=options["encoder_api_key"] or ""))
            # One worker has one encoder; models of another encoder name theirs in --model.
            elsewhere = elsewhere if model.encoder_address else ""
        elif options["no_encoder"] or options["encoder_address"]:
            models.append(model)
        else:
            loaded = {one.name: getattr(model, one.name) for one in LoadConfig.knobs()}
            loaded |= {"checkpoint": model.checkpoint, "port": 0 if workers else options["encoder_port"]}
            worker = EncoderServer(EncoderConfig(store=config.store, **loaded), store=store, keys=accepted)
            await worker.start()
            stack.push_async_callback(worker.stop, 0)
            workers.append(worker)
            address = f"127.0.0.1:{worker.port}"
            models.append(replace(model, encoder_address=address, encoder_api_key=own, encoder_in_process=True))
    return tuple(models), workers[0].metrics.registry if workers else None


async def _introduce(server: DecoderServer, store: Store, gateway: Gateway | None, process: Process) -> None:
    from cache.store import public_url
    from preread_edge.access import join

    say(f"store        {public_url(server.config.store)}")
    for model, engine in zip(server.config.models, server.engines.values(), strict=True):
        backend = engine.backend
        identity = backend.identity()
        reads = f"encoder {identity.fingerprint[:12]}" if identity is not None else "reads text"
        say(f"model        {engine.name} ({backend.name}, {model.checkpoint}, {reads})")
        if backend.notice:
            say(f"licence      {backend.notice}")
        if model.read_control_tokens:
            say("texts        control tokens in queries and passages are read as such: they can write the prompt")
        say(f"compute      {backend.dtype_name} on {backend.device_name}")
        if identity is not None:
            say(f"collections  {await asyncio.to_thread(_collections, store, identity.fingerprint)}")
            where = "in this process" if model.encoder_in_process else "elsewhere"
            none = "none: only stored passages are scored"
            say(f"encoder      {f'{model.encoder_address} ({where})' if model.encoder_address else none}")
    process.listens(server)
    if gateway is not None:
        scheme = "https" if server.config.has_tls else "http"
        keys = " (API keys)" if server.keys.required else ""
        say(f"http         {scheme}://{join(gateway.config.host, gateway.port)}{keys}")


def _collections(store: Store, fingerprint: str) -> str:
    from decoder_server.engine.collections import describe

    unreadable: dict[str, str] = {}
    try:
        described = describe(store, unreadable)
    except errors.CacheError as exc:  # it may come back; until then requests for it are UNAVAILABLE
        return f"unknown: {exc}"
    shown = []
    for one in described[:MAX_SHOWN]:
        aliases = f", alias {', '.join(one.aliases)}" if one.aliases else ""
        refused = "" if one.manifest.fingerprint == fingerprint else ", REFUSED: of another encoder"
        shown.append(
            f"{one.manifest.collection} ({one.stats.num_passages} passages, ratio {one.manifest.compression_ratio}, "
            f"{one.manifest.codec}{aliases}{refused})"
        )
    if len(described) > MAX_SHOWN:
        shown.append(f"{len(described) - MAX_SHOWN} more")
    shown += [f"{name} (UNREADABLE: {reason})" for name, reason in unreadable.items()]
    return "; ".join(shown) or "none yet: `preread index` makes one"


def checked(load: Load, *, every: bool = True, passed: Path = PASSED_CHECKS) -> Load:
    """`load`, and then the health check of the loaded model, on the thread that will score.

    Checks every model, and now; or else only one that is not run as published (a cross-encoder in bfloat16 or through
    ONNX Runtime), and only the first time: the directory `passed` remembers.
    """

    def load_and_check(model: ModelConfig) -> Backend:
        from rich.console import Console

        from checkpoint import CheckpointError
        from tuning.health import health_gate

        backend = load(model)
        known = _passed_file(backend, model, passed.expanduser())
        if not every and (known is None or known.exists()):
            return backend
        say(f"checking     {model.served_name} against its own weights in float32 (once; --no-check leaves it out)")
        report = health_gate(backend)
        if not report.passed:
            report.print(Console(stderr=True))
            raise CheckpointError(report.summary())
        say(f"checked      {model.served_name}: scores are healthy, {report.seconds:.0f} s")
        if known is not None:
            try:
                known.parent.mkdir(parents=True, exist_ok=True)
                known.touch()
            except OSError as exc:  # a file system that cannot be written to costs time at the next start, no more
                log.warning("the passed check could not be remembered: %s", exc)
        return backend

    return load_and_check


def _passed_file(backend: Backend, model: ModelConfig, directory: Path) -> Path | None:
    """The file that says this model passed; None where it is run as published."""
    from decoder_server.models.cross_encoder.backend import CrossEncoder

    if not isinstance(backend, CrossEncoder) or (model.runtime == "torch" and backend.dtype_name == "float32"):
        return None
    made_of = [backend.fingerprint, model.runtime, backend.dtype_name, backend.device_name]
    for name in _PACKAGES:
        try:
            made_of.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            made_of.append(f"no {name}")
    return directory / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


@click.command()
@config_option
@model_option
@flags.knob_options(EncoderConfig)
@flags.knob_options(HttpConfig, only=["allowed_hosts"])  # of --metrics-port
@process_options
@click.pass_context
def encode_worker(ctx: click.Context, /, **options: Any) -> None:
    """Keep an encoder running for other machines to send passages to.

    \b
    Answers gRPC on --port: passages are encoded and put into --store, and texts that a reranking
    server has no states of are encoded for it (`preread serve --encoder-address`).

    Ready when the last line says so; SIGTERM, SIGHUP or Ctrl-C lets calls in flight finish.
    """
    config = flags.from_options(EncoderConfig, options, checkpoint=options["model"])
    asyncio.run(_work(config, Process(ctx)))


async def _work(config: EncoderConfig, process: Process) -> None:
    from cache.store import public_url
    from checkpoint.compute import keep_loaded
    from encoder_worker.server import EncoderServer

    server = EncoderServer(config, keys=process.begin())
    with process.metrics(server.metrics.registry):
        if not await process.starts(server.start()):
            return
        keep_loaded()
        encoder = server.engine.encoder
        identity = encoder.identity
        say(f"encoder      {config.checkpoint} (encoder {identity.fingerprint[:12]}, dim {identity.dim})")
        say(f"compute      {encoder.dtype_name} on {encoder.device_name}")
        say(f"store        {public_url(config.store)}")
        process.listens(server)
        await process.runs()
        await server.stop(process.stops())
