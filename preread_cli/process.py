"""A server's process: log, keys, both halves, the lines it prints, the signals that stop it. Importing it loads all."""

import asyncio
import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import click
from prometheus_client import CollectorRegistry

from cache.errors import CacheError, StoreLocked, StoreUnavailable
from cache.open import open_store
from cache.store import Store, public_url
from checkpoint import CheckpointError
from checkpoint.compute import tune_process
from decoder_server.config import DecoderConfig, HttpConfig, ModelConfig
from decoder_server.engine.collections import describe
from decoder_server.engine.lifecycle import Observer
from decoder_server.engine.plan import plan
from decoder_server.models.backend import Backend
from decoder_server.models.cross_encoder.backend import CrossEncoder
from decoder_server.models.loading import is_fbnl, load_model
from decoder_server.server import DecoderServer, Gateway
from encoder_worker.config import EncoderConfig, WriteThroughConfig
from encoder_worker.server import EncoderServer
from preread.values import RerankRequest, format_stages
from preread_cli import flags
from preread_cli.config_file import effective_lines
from preread_edge.access import ApiKeys, Guard, join
from preread_edge.listener import metrics_listener
from preread_edge.logs import make_tracer, set_up
from preread_edge.settings import LoadConfig

Load = Callable[[ModelConfig], Backend]
log = logging.getLogger(__name__)

SPARE_FILES = 256  # for the store, the model, and what a library opens
MAX_SHOWN = 5  # collections in the start-up lines
PASSED_CHECKS = Path("~/.cache/preread/health")
_PACKAGES = ("preread", "torch", "transformers", "tokenizers", "onnxruntime")  # may change scores, as files may


async def run_server(ctx: click.Context, config: DecoderConfig, http: HttpConfig | None, begun: float) -> None:
    """Serves until a signal comes; `begun` is when the command began, by the monotonic clock."""
    process = _Process(ctx, begun)
    async with AsyncExitStack() as stack:
        opened = open_store(config.store, read_budget_seconds=config.read_budget_seconds)
        store = stack.enter_context(closing(opened))
        with suppress(StoreLocked, StoreUnavailable):  # it may come back; one that cannot be opened ends the command
            await asyncio.to_thread(store.list_collections)
        observers: tuple[Observer, ...] = ()
        if ctx.params["tracing"]:
            tracer, shutdown = make_tracer("preread")  # raises where the `tracing` extra is not installed
            stack.callback(shutdown)
            from decoder_server.tracing import TracingObserver

            observers = (TracingObserver(tracer),)
        models, registry = await process.start_encoders(config, store, stack)
        config, check = replace(config, models=models), ctx.params["check"]
        load = load_model if check is False else checked(load_model, every=bool(check))
        server = DecoderServer(config, store=store, load=load, keys=process.keys, observers=observers)
        if registry is not None:
            server.metrics.registry.register(registry)
        stack.enter_context(process.metrics(server.metrics.registry))
        gateway = Gateway(http, server) if http is not None else None
        if gateway is not None:  # it listens before the models have loaded, so that health can be asked
            await gateway.start()
            stack.push_async_callback(gateway.stop, 0)
        if not await process.starts(server.start()):
            return
        await _introduce(server, store)
        process.listens(server)
        if gateway is not None:
            scheme, keys = "https" if config.tls_cert_file else "http", " (API keys)" if process.keys.keys else ""
            _say(f"http         {scheme}://{join(gateway.config.host, gateway.port)}{keys}")
        if server.readiness.problem:
            _say(f"waiting      not ready: {server.readiness.problem}")
        grace = await process.runs(server.readiness.wait())
        await asyncio.gather(server.stop(grace), *([] if gateway is None else [gateway.stop(grace)]))


async def run_worker(ctx: click.Context, config: EncoderConfig, begun: float) -> None:
    """Encodes until a signal comes; `begun` is when the command began, by the monotonic clock."""
    process = _Process(ctx, begun)
    server = EncoderServer(config, keys=process.keys)
    with process.metrics(server.metrics.registry):
        if not await process.starts(server.start()):
            return
        encoder = server.engine.encoder
        identity = encoder.identity
        _say(f"encoder      {config.checkpoint} (encoder {identity.fingerprint[:12]}, dim {identity.dim})")
        _say(f"compute      {encoder.dtype_name} on {encoder.device_name}")
        _say(f"store        {public_url(config.store)}")
        process.listens(server)
        await server.stop(await process.runs(asyncio.sleep(0)))


class _Process:
    """Made on the server's event loop: prints which settings hold, and from then on signals stop it."""

    def __init__(self, ctx: click.Context, begun: float) -> None:
        self._options, self._begun = ctx.params, begun
        set_up(self._options["log_format"], self._options["log_level"])
        for line in effective_lines(ctx):
            _say(line)
        tune_process(self._options["threads"])
        _open_files_for(self._options["max_connections"])
        self._stop = _told_to_stop()
        keys, file = ApiKeys.parse(self._options["api_key"]), self._options["api_keys_file"]
        self.keys = keys + ApiKeys.read(file) if file else keys

    async def start_encoders(
        self, config: DecoderConfig, store: Store, stack: AsyncExitStack
    ) -> tuple[tuple[ModelConfig, ...], CollectorRegistry | None]:
        """A worker, until the stack ends, for every model that scores states and has none elsewhere.

        Returns models with their encoders' addresses, and the first worker's metrics: a scrape holds a name once.
        """
        kept = flags.from_options(WriteThroughConfig, self._options)
        models: list[ModelConfig] = []
        workers: list[EncoderServer] = []
        elsewhere, key = self._options["encoder_address"] or "", self._options["encoder_api_key"] or ""
        # A worker in this process requires the server's keys, or one made for this process.
        own = secrets.token_urlsafe(32) if self.keys.keys else ""
        accepted = self.keys + ApiKeys.parse([own]) if own else self.keys
        for model in config.models:
            if not is_fbnl(model):
                models.append(model)
            elif model.encoder_address or elsewhere:
                address = model.encoder_address or elsewhere
                models.append(replace(model, encoder_address=address, encoder_api_key=key))
                # One worker has one encoder; models of another encoder name theirs in --model.
                elsewhere = elsewhere if model.encoder_address else ""
            elif self._options["no_encoder"] or self._options["encoder_address"]:
                models.append(model)
            else:
                loaded = model.values_of(LoadConfig) | kept.values_of(WriteThroughConfig)
                loaded |= {"checkpoint": model.checkpoint, "port": 0 if workers else self._options["encoder_port"]}
                worker = EncoderServer(EncoderConfig(store=config.store, **loaded), store=store, keys=accepted)
                await worker.start()
                stack.push_async_callback(worker.stop, 0)
                workers.append(worker)
                address = f"127.0.0.1:{worker.port}"
                models.append(replace(model, encoder_address=address, encoder_api_key=own, encoder_in_process=True))
        return tuple(models), workers[0].metrics.registry if workers else None

    async def starts(self, start: Coroutine[object, object, None]) -> bool:
        """Waits for a server to start, or for a signal, which cancels the start; whether it started."""
        starting = asyncio.create_task(start)
        await asyncio.wait([starting, self._stop], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait([starting])
            return False
        await starting
        return True

    def listens(self, server: DecoderServer | EncoderServer) -> None:
        """Says where a server that has started listens, and leaves what it loaded out of garbage collections."""
        # A full one goes through half a million objects of models and libraries, and stops every thread for up to a
        # second; a body of 125,000 lists sets one off.
        gc.collect()
        gc.freeze()
        secured = (", TLS" if server.config.tls_cert_file else "") + (", API keys" if server.keys.keys else "")
        _say(f"listening    {join(server.config.host, server.port)} (gRPC{secured})")

    async def runs(self, ready: Coroutine[object, object, None]) -> float:
        """Says when the server is ready, and when a signal stops it; seconds that calls in flight may take."""
        grace: float = self._options["grace_seconds"]
        if await self.starts(ready):
            _say(f"ready        in {time.monotonic() - self._begun:.1f} s")
            await self._stop
        _say(f"stopping     calls in flight have {grace:g} s to finish")
        return grace

    @contextmanager
    def metrics(self, registry: CollectorRegistry) -> Iterator[None]:
        """Listens on --metrics-port while the block runs, if there is one."""
        port, host = self._options["metrics_port"], self._options["metrics_host"]
        if port is None:
            yield
            return
        # It requires no key, so the name counts whether or not the other ports require one.
        with metrics_listener(registry, host, port, Guard(self._options["allowed_host"])) as bound:
            _say(f"metrics      http://{join(host, bound)}/metrics")
            yield


async def _introduce(server: DecoderServer, store: Store) -> None:
    _say(f"store        {public_url(server.config.store)}")
    for model, engine in zip(server.config.models, server.engines.values(), strict=True):
        backend = engine.backend
        identity = backend.identity()
        reads = f"encoder {identity.fingerprint[:12]}" if identity is not None else "reads text"
        _say(f"model        {engine.name} ({backend.name}, {model.checkpoint}, {reads})")
        if backend.notice:
            _say(f"licence      {backend.notice}")
        if model.read_control_tokens:
            _say("texts        control tokens in queries and passages are read as such: they can write the prompt")
        _say(f"compute      {backend.dtype_name} on {backend.device_name}")
        if identity is not None:
            _say(f"collections  {await asyncio.to_thread(_collections, store, identity.fingerprint, server.config)}")
            where = "in this process" if model.encoder_in_process else "elsewhere"
            none = "none: only stored passages are scored"
            _say(f"encoder      {f'{model.encoder_address} ({where})' if model.encoder_address else none}")


def _collections(store: Store, fingerprint: str, config: DecoderConfig) -> str:
    unreadable: dict[str, str] = {}
    try:
        described = describe(store, unreadable)
    except CacheError as exc:  # it may come back; until then requests for it are UNAVAILABLE
        return f"unknown: {exc}"
    shown = []
    for one in described[:MAX_SHOWN]:
        manifest, notes = one.manifest, f", alias {', '.join(one.aliases)}" if one.aliases else ""
        if config.stages or config.read_ratio:  # as it holds for this collection
            stages = plan(RerankRequest("", ()), config, manifest.compression_ratio, 1).stages
            notes += f", scored at {format_stages(stages)}"
        refused = "" if manifest.fingerprint == fingerprint else ", REFUSED: of another encoder"
        kept = f"{one.stats.num_passages} passages, ratio {manifest.compression_ratio}, {manifest.codec}"
        shown.append(f"{manifest.collection} ({kept}{notes}{refused})")
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
        from tuning.health import health_gate

        backend = load(model)
        known = _passed_file(backend, model, passed.expanduser())
        if not every and (known is None or known.exists()):
            return backend
        _say(f"checking     {model.served_name} against its own weights in float32 (once; --no-check leaves it out)")
        report = health_gate(backend)
        if not report.passed:
            report.print(err=True)
            raise CheckpointError(report.summary())
        _say(f"checked      {model.served_name}: scores are healthy, {report.seconds:.0f} s")
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
    if not isinstance(backend, CrossEncoder) or (model.runtime == "torch" and backend.dtype_name == "float32"):
        return None
    made_of = [backend.fingerprint, model.runtime, backend.dtype_name, backend.device_name]
    for name in _PACKAGES:
        try:
            made_of.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            made_of.append(f"no {name}")
    return directory / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _say(line: str) -> None:
    """Prints; a closed terminal, a pipe without a reader or a full disk must not end a server with calls to finish."""
    try:
        click.echo(line)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())  # what is buffered goes there too, or the process would end with an error
        os.close(null)


def _told_to_stop() -> asyncio.Future[None]:
    """Done at the first SIGTERM, SIGINT or SIGHUP; a second SIGTERM or SIGINT has its usual effect.

    A SIGHUP that was ignored when the process began (nohup) stays ignored. One while the server stops changes nothing:
    service managers send it right after SIGTERM, and a closing terminal more than once.
    """
    loop = asyncio.get_running_loop()
    told = loop.create_future()

    def tell() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        if not told.done():
            told.set_result(None)

    hang_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    for number in (signal.SIGTERM, signal.SIGINT, *hang_up):
        loop.add_signal_handler(number, tell)
    return told


def _open_files_for(max_connections: int) -> None:
    """Raises the soft limit of open files, as far as the hard one allows, to what so many clients need.

    Each may have a gRPC and an HTTP connection; many systems begin processes with 1,024 files. At the limit no new
    connection is accepted, probes included.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * max_connections + SPARE_FILES
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < needed:
        text = "this process may open %d files, and --max-connections %d takes up to %d: raise its limit (ulimit -n)"
        log.warning(text, wanted, max_connections, needed)
