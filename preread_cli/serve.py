"""`preread serve`'s options of what is kept in memory between requests.

`preread serve`'s options of what is read when a request does not say.

`preread serve`'s HTTP gateway: its options, and its life beside the gRPC server's.

What `preread serve` runs beside the server: the encoder half, the port for metrics, the sender of spans.

`preread serve`: both halves in one process, until told to stop.

The encoder worker listens on loopback for the server beside it and for `--encoder-address` of
others on this machine. Does not know what either half does with a request.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from preread_cli.config_file import config_option, effective_lines
from preread_cli.model_specs import models_option, parse_models
from preread_cli.options import compute_options, control_tokens_option, option, store_option
from preread_cli.process import (
    access_options,
    api_keys,
    grace_option,
    listening_line,
    observe_options,
    open_files_for,
    say,
    started_unless_told,
    tls_files,
    told_to_stop,
)

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from cache.store import Store
    from decoder_server.config import DecoderConfig, ModelConfig, TierBudgets
    from decoder_server.engine.engine import Engine
    from decoder_server.engine.lifecycle import Observer
    from decoder_server.gateway import Gateway
    from decoder_server.server import DecoderServer
    from encoder_worker.server import EncoderServer
    from preread_edge.keys import ApiKeys


F = TypeVar("F", bound=Callable[..., Any])

MIB = 1 << 20


def tiers_options(function: F) -> F:
    """--cache-bytes, --keys-cache-bytes, --prefix-cache-bytes, --cache-format."""
    for decorate in (
        option(
            "--cache-format",
            type=click.Choice(["auto", "bfloat16", "int8"]),
            default="auto",
            help="How --keys-cache-bytes and --prefix-cache-bytes hold numbers; auto: as computed. int8 holds nearly "
            "twice as much as bfloat16 and moves scores a little.",
        ),
        option(
            "--prefix-cache-bytes",
            type=click.IntRange(min=0),
            default=256 * MIB,
            help="Memory for instructions already read over passages, per model: a query under the same instruction "
            "goes on from there; 0: none is kept.",
        ),
        option(
            "--keys-cache-bytes",
            type=click.IntRange(min=0),
            default=256 * MIB,
            help="Memory for what the model computes of passages before it reads a prompt, per model; 0: none is kept.",
        ),
        option(
            "--cache-bytes",
            type=click.IntRange(min=0),
            default=256 * MIB,
            help="Memory for stored states read before, and as much for states of inline texts.",
        ),
    ):
        function = decorate(function)
    return function


def budgets(options: Mapping[str, Any]) -> TierBudgets:
    """Of every model."""
    from decoder_server.config import TierBudgets

    return TierBudgets(options["keys_cache_bytes"], options["prefix_cache_bytes"], options["cache_format"])


STAGES_METAVAR = "RATIO:KEEP,..."


def reading_options(function: F) -> F:
    """--read-ratio, --stages, --degrade, --degrade-queue-share."""
    for decorate in (
        option(
            "--degrade-queue-share",
            type=click.FloatRange(0, 1),
            default=0.5,
            metavar="SHARE",
            help="With --degrade: how full the queue may be, of what it may hold, before requests are read coarser.",
        ),
        option(
            "--degrade",
            is_flag=True,
            help="Read a request coarser than asked when it would miss its deadline, or the queue fills; its answer "
            "says so, and preread_degraded_requests_total counts it.",
        ),
        option(
            "--stages",
            metavar=STAGES_METAVAR,
            help="A cascade for requests that name no ratio: 32:100,4:20,1 reads every candidate at ratio 32, the "
            "best 100 at 4, the best 20 of those at 1.",
        ),
        option(
            "--read-ratio",
            type=click.IntRange(min=1),
            help="Ratio to read at when a request names none; where a collection is stored coarser, its next multiple. "
            " [default: as stored]",
        ),
    ):
        function = decorate(function)
    return function


def reading(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of DecoderConfig.

    Raises:
        click.UsageError: both are given, or stages cannot be read.
    """
    from preread.types import parse_stages

    if options["stages"] and options["read_ratio"] is not None:
        raise click.UsageError("--stages and --read-ratio contradict each other: give one of them.")
    try:
        stages = parse_stages(options["stages"]) if options["stages"] else ()
    except ValueError as exc:
        raise click.UsageError(f"--stages: {exc}") from exc
    same = ("read_ratio", "degrade", "degrade_queue_share")
    return {"stages": stages} | {name: options[name] for name in same}


def http_options(function: F) -> F:
    """--http-port and what goes with it."""
    for decorate in (
        option(
            "--max-body-bytes",
            type=click.IntRange(min=1),
            default=64 * MIB,
            help="Largest HTTP request body; NDJSON uploads are read line by line and may be longer.",
        ),
        option(
            "--http-timeout-seconds",
            type=click.FloatRange(min=0, min_open=True),
            default=120.0,
            help="Longest time an HTTP reranking request may take.",
        ),
        option(
            "--http-header-seconds",
            type=click.FloatRange(min=0, min_open=True),
            default=10.0,
            help="Longest time until the header of an HTTP request is complete.",
        ),
        option(
            "--allow-origin",
            "allowed_origins",
            multiple=True,
            metavar="ORIGIN",
            help="Web pages of this origin (https://app.example.com) may call, beside the server's own. '*': of any, "
            "where keys are required. May be repeated.",
        ),
        option(
            "--model-alias",
            "model_aliases",
            multiple=True,
            metavar="NAME",
            help="HTTP clients may ask for the model by this name too; '*': by any. May be repeated.",
        ),
        option(
            "--http-port",
            type=click.IntRange(0, 65535),
            help="Answer HTTP here too, on --host: Cohere, Jina, vLLM, TEI, NIM, Voyage and other dialects. "
            "0 takes a free port and prints it.",
        ),
    ):
        function = decorate(function)
    return function


@asynccontextmanager
async def http_gateway(options: dict[str, Any], server: DecoderServer) -> AsyncIterator[Gateway | None]:
    """Listens before the model has loaded, so that health can be asked; None without --http-port.

    Stops at the end without grace, if nobody has stopped it with some before.

    Raises:
        OSError: the port is taken.
    """
    if options["http_port"] is None:
        yield None
        return
    from decoder_server.config import HttpConfig
    from decoder_server.gateway import Gateway

    config = HttpConfig(
        host=options["host"],
        port=options["http_port"],
        model_aliases=options["model_aliases"],
        max_body_bytes=options["max_body_bytes"],
        max_connections=options["max_connections"],
        timeout_seconds=options["http_timeout_seconds"],
        header_seconds=options["http_header_seconds"],
        allowed_hosts=options["allowed_hosts"],
        allowed_origins=options["allowed_origins"],
    )
    gateway = Gateway(config, server)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop(0)


def gateway_line(gateway: Gateway) -> str:
    """Where it listens, for the start-up lines."""
    from preread_edge.hosts import join

    scheme = "https" if gateway.context.tls else "http"
    asks = " (API keys)" if gateway.context.keys.required else ""
    return f"http         {scheme}://{join(gateway.config.host, gateway.port)}{asks}"


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
    from decoder_server.models.loading import is_fbnl

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
    from preread_edge.keys import ApiKeys, Scope, make_key

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
    from preread_edge.hosts import Guard, join
    from preread_edge.listener import metrics_listener

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
    from preread_edge.logs import make_tracer

    tracer, shutdown = make_tracer("preread")
    from decoder_server.tracing import TracingObserver

    try:
        yield (TracingObserver(tracer),)
    finally:
        shutdown()


MAX_SHOWN = 5  # collections in the start-up lines
_FILE = click.Path(exists=True, dir_okay=False)


@click.command()
@config_option
@store_option
@option(
    "--read-budget-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=0.1,
    help="How long a request waits for each read of a Redis store, the collection's name and manifest too; bytes that "
    "come earn 10 ms a megabyte. Then what needed the store is FAILED, or encoded where its text came along.",
)
@models_option
@option(
    "--served-model-name",
    metavar="NAME",
    default="",
    help="What clients call the (first) model.  [default: its directory's name]",
)
@option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for every interface.")
@option("--port", type=click.IntRange(0, 65535), default=50051, help="gRPC port; 0 takes a free one and prints it.")
@http_options
@option(
    "--encoder-port", type=click.IntRange(0, 65535), default=50052, help="Loopback port of the encoder in this process."
)
@option("--encoder-address", metavar="HOST:PORT", help="Use this encoder worker instead of one in this process.")
@option("--encoder-api-key", metavar="KEY", help="Shown to the worker at --encoder-address.")
@option("--encoder-tls-ca-file", type=_FILE, help="Reach that worker with TLS, trusting this certificate (PEM).")
@option("--encoder-tls-cert-file", type=_FILE, help="Show that worker this certificate (PEM), for mutual TLS.")
@option("--encoder-tls-key-file", type=_FILE, help="The key of --encoder-tls-cert-file (PEM).")
@option("--no-encoder", is_flag=True, help="Answer from stored states only.")
@compute_options
@reading_options
@control_tokens_option
@option(
    "--max-passage-tokens",
    type=click.IntRange(min=1),
    help="Passage limit, if the collections were indexed with another than the checkpoint's.",
)
@option(
    "--max-batch-tokens",
    type=click.IntRange(min=1),
    help="Prompt tokens and states per batch.  [default: measured]",
)
@option(
    "--max-queue-requests",
    type=click.IntRange(min=1),
    default=256,
    help="Requests under way before new ones are turned away.",
)
@option(
    "--max-queue-tokens",
    type=click.IntRange(min=1),
    default=1_000_000,
    help="Tokens under way before new requests are turned away.",
)
@option(
    "--max-queue-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    help="Seconds of work under way, at the measured rate, before new requests are turned away; 0: no such limit.",
)
@option("--max-candidates", type=click.IntRange(min=1), default=1000, help="Candidates of one request.")
@option(
    "--max-request-tokens",
    type=click.IntRange(min=1),
    help="Prompt tokens and states of one request, over all its candidates.  [default: no limit]",
)
@option(
    "--max-query-bytes",
    type=click.IntRange(min=1),
    default=MIB,
    help="Longest query, and longest instruction, that is tokenized. A query over the model's token limit, far below, "
    "is cut, and the answer says so.",
)
@option(
    "--max-instruction-tokens",
    type=click.IntRange(min=1),
    default=512,
    help="Longest instruction; a longer one is refused: half an instruction may say the opposite.",
)
@option("--max-text-bytes", type=click.IntRange(min=1), default=MIB, help="Longest text of one candidate.")
@option("--max-message-bytes", type=click.IntRange(min=1), default=64 * MIB, help="Largest gRPC message.")
@tiers_options
@option(
    "--max-connection-age-seconds",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Then a gRPC client is asked to connect anew, and so to find servers that were added; 0: never.",
)
@access_options
@observe_options
@option(
    "--check/--no-check",
    default=None,
    help="Refuse to start with a model whose scores are wrong (`preread check`): every model, or none. Without it, "
    "cross-encoders that are not run in plain float32, once each.",
)
@option("--log-text", is_flag=True, help="Log queries and instructions too; passages never.")
@option("--tracing", is_flag=True, help="Send OpenTelemetry spans to where the OTEL_* variables say.")
@grace_option
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Start the reranking server.

    \b
    Answers gRPC on --port, and HTTP on --http-port, from the states in --store. Texts that come
    with a request, and ids that are not stored but come with a text, are encoded by a second half
    in this process, or by the worker at --encoder-address (`preread encode-worker`), or not at all
    with --no-encoder.

    Ready when the last line says so; SIGTERM, SIGHUP or Ctrl-C lets requests in flight finish.
    """
    if options["no_encoder"] and options["encoder_address"]:
        raise click.UsageError("--no-encoder and --encoder-address contradict each other: give one of them.")
    reading(options)  # said before anything is loaded
    from preread_edge.logs import set_up

    set_up(options["log_format"], options["log_level"])
    for line in effective_lines(ctx):
        say(line)
    asyncio.run(_serve(options))


async def _serve(options: dict[str, Any]) -> None:
    from cache.open import open_store
    from checkpoint.compute import tune_process
    from decoder_server.models.loading import load_model
    from decoder_server.server import DecoderServer
    from preread_cli.serve_check import checked

    started = time.monotonic()
    tune_process(options["threads"])
    open_files_for(options["max_connections"])
    stop = told_to_stop()
    keys = api_keys(options)
    models = parse_models(options, tiers=budgets(options))
    store = open_store(options["store"], read_budget_seconds=options["read_budget_seconds"])
    try:
        await asyncio.to_thread(_check_opens, store)
        with tracing(options) as observers:
            async with encoder_halves(options, models, store, keys) as halves:
                load = load_model if options["check"] is False else checked(load_model, every=bool(options["check"]))
                server = DecoderServer(_config(options, halves), store=store, load=load, keys=keys, observers=observers)
                for registry in halves.registries:
                    server.metrics.registry.register(registry)
                with metrics_port(options, server.metrics.registry):
                    await _run(server, store, halves, options, stop, started)
    finally:
        store.close()


def _check_opens(store: Store) -> None:
    """Raises what is wrong with a store that cannot be opened; one that does not answer may come back."""
    from cache.errors import StoreLocked, StoreUnavailable

    with suppress(StoreLocked, StoreUnavailable):
        store.list_collections()


async def _run(
    server: DecoderServer,
    store: Store,
    halves: EncoderHalves,
    options: dict[str, Any],
    stop: asyncio.Future[None],
    started: float,
) -> None:
    from checkpoint.compute import keep_loaded

    async with http_gateway(options, server) as gateway:
        if not await started_unless_told(server.start(), stop):
            return
        keep_loaded()
        await _introduce(server, store, halves.local)
        if gateway is not None:
            say(gateway_line(gateway))
        if server.readiness.problem:
            say(f"waiting      not ready: {server.readiness.problem}")
        if await started_unless_told(server.readiness.wait(), stop):
            say(f"ready        in {time.monotonic() - started:.1f} s")
            await stop
        say(f"stopping     requests in flight have {options['grace_seconds']:g} s to finish")
        stops = [server.stop(options["grace_seconds"])]
        if gateway is not None:
            stops.append(gateway.stop(options["grace_seconds"]))
        await asyncio.gather(*stops)


def _config(options: dict[str, Any], halves: EncoderHalves) -> DecoderConfig:
    from decoder_server.config import DecoderConfig

    same = (
        "host", "port", "store", "max_batch_tokens",
        "max_queue_requests", "max_queue_tokens", "max_queue_seconds", "max_candidates", "max_message_bytes",
        "max_request_tokens", "max_query_bytes", "max_instruction_tokens", "max_text_bytes",
        "log_text", "max_connection_age_seconds", "max_connections", "read_budget_seconds",
    )  # fmt: skip
    worker_tls = ("encoder_tls_ca_file", "encoder_tls_cert_file", "encoder_tls_key_file")
    return DecoderConfig(
        models=halves.models,
        **dict[str, Any]({name: options[name] or "" for name in worker_tls}),
        **tls_files(options),
        **reading(options),
        max_inline_cache_bytes=options["cache_bytes"],
        max_store_cache_bytes=options["cache_bytes"],
        **{name: options[name] for name in same},
    )


async def _introduce(server: DecoderServer, store: Store, local: Collection[str]) -> None:
    """What a person wants to see before the first request."""
    from cache.store import public_url

    config = server.config
    say(f"store        {public_url(config.store)}")
    for model, engine in zip(config.models, server.engines.values(), strict=True):
        await _introduce_model(model, engine, store, local=model.encoder_address in local)
    say(listening_line(server))


async def _introduce_model(model: ModelConfig, engine: Engine, store: Store, *, local: bool) -> None:
    backend = engine.backend
    identity = backend.identity()
    what = f"encoder {identity.fingerprint[:12]}" if identity is not None else "reads text"
    say(f"model        {engine.name} ({backend.name}, {model.checkpoint}, {what})")
    if backend.notice:
        say(f"licence      {backend.notice}")
    if model.read_control_tokens:
        say("texts        control tokens in queries and passages are read as such: they can write the prompt")
    say(f"compute      {backend.dtype_name} on {backend.device_name}")
    if identity is None:
        return
    say(f"collections  {await asyncio.to_thread(_collections, store, identity.fingerprint)}")
    where = f"{model.encoder_address} ({'in this process' if local else 'elsewhere'})"
    say(f"encoder      {where if model.encoder_address else 'none: what is not stored is not scored'}")


def _collections(store: Store, fingerprint: str) -> str:
    from cache.errors import CacheError
    from decoder_server.engine.collections import survey

    try:
        described, unreadable = survey(store)
    except CacheError as exc:  # it may come back; until then requests for it are UNAVAILABLE
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
