"""`preread serve`: both halves in one process, until told to stop.

The encoder worker listens on loopback for the server beside it and for `--encoder-address` of
others on this machine. Does not know what either half does with a request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import click

from preread.cli.options import compute_options, model_option, option, store_option
from preread.cli.signals import told_to_stop

if TYPE_CHECKING:
    from cache.store import Store
    from decoder_server.config import DecoderConfig
    from decoder_server.server import DecoderServer

MIB = 1 << 20
MAX_SHOWN = 5  # collections in the start-up lines


@click.command()
@store_option
@model_option
@option(
    "--served-model-name",
    metavar="NAME",
    default="",
    help="What clients call the model.  [default: its directory's name]",
)
@option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for every interface.")
@option("--port", type=click.IntRange(0, 65535), default=50051, help="gRPC port; 0 takes a free one and prints it.")
@option(
    "--encoder-port", type=click.IntRange(0, 65535), default=50052, help="Loopback port of the encoder in this process."
)
@option("--encoder-address", metavar="HOST:PORT", help="Use this encoder worker instead of one in this process.")
@option("--no-encoder", is_flag=True, help="Answer from stored states only.")
@compute_options
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
@option("--max-candidates", type=click.IntRange(min=1), default=1000, help="Candidates of one request.")
@option("--max-message-bytes", type=click.IntRange(min=1), default=64 * MIB, help="Largest gRPC message.")
@option(
    "--cache-bytes",
    type=click.IntRange(min=0),
    default=256 * MIB,
    help="Memory for stored states read before, and as much for states of inline texts.",
)
@option(
    "--grace-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    help="How long requests under way may take to finish after SIGTERM.",
)
def command(**options: Any) -> None:
    """Start the reranking server.

    \b
    Answers gRPC on --port from the states in --store. Texts that come with a request, and ids that
    are not stored but come with a text, are encoded by a second half in this process, or by the
    worker at --encoder-address (`preread encode-worker`), or not at all with --no-encoder.

    Ready when the last line says so; SIGTERM or Ctrl-C lets requests under way finish.
    """
    if options["no_encoder"] and options["encoder_address"]:
        raise click.UsageError("--no-encoder and --encoder-address contradict each other: give one of them.")
    asyncio.run(_serve(options))


async def _serve(options: dict[str, Any]) -> None:
    from cache.store import open_store
    from checkpoint.compute import tune_process
    from decoder_server.server import DecoderServer

    started = time.monotonic()
    tune_process(options["threads"])
    stop = told_to_stop()
    store = open_store(options["store"])
    try:
        async with _encoder(options, store) as encoder_address:
            server = DecoderServer(_config(options, encoder_address), store=store)
            starting = asyncio.create_task(server.start())
            await asyncio.wait([starting, stop], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.wait([starting])
                return
            await starting
            await _introduce(server, store, options)
            click.echo(f"ready        in {time.monotonic() - started:.1f} s")
            await stop
            click.echo(f"stopping     requests under way have {options['grace_seconds']:g} s to finish")
            await server.stop(options["grace_seconds"])
    finally:
        store.close()


def _config(options: dict[str, Any], encoder_address: str) -> DecoderConfig:
    from decoder_server.config import DecoderConfig

    same = (
        "served_model_name", "host", "port", "store", "device", "dtype", "max_passage_tokens", "max_batch_tokens",
        "max_queue_requests", "max_queue_tokens", "max_candidates", "max_message_bytes",
    )  # fmt: skip
    return DecoderConfig(
        checkpoint=options["model"],
        encoder_address=encoder_address,
        max_inline_cache_bytes=options["cache_bytes"],
        max_store_cache_bytes=options["cache_bytes"],
        **{name: options[name] for name in same},
    )


@asynccontextmanager
async def _encoder(options: dict[str, Any], store: Store) -> AsyncIterator[str]:
    """The address texts are sent to; "" for none. Runs the worker where no other one is named."""
    if options["no_encoder"] or options["encoder_address"]:
        yield options["encoder_address"] or ""
        return
    from encoder_worker.config import EncoderConfig
    from encoder_worker.server import EncoderServer

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
    )
    await worker.start()
    try:
        yield f"127.0.0.1:{worker.port}"
    finally:
        await worker.stop(0)


async def _introduce(server: DecoderServer, store: Store, options: dict[str, Any]) -> None:
    """What a person wants to see before the first request."""
    from encoder_worker.service import public_url

    config = server.config
    (engine,) = server.engines.values()
    identity = engine.backend.identity()
    click.echo(
        f"model        {engine.name} ({engine.backend.name}, {config.checkpoint}, encoder {identity.fingerprint[:12]})"
    )
    click.echo(f"compute      {engine.backend.dtype_name} on {engine.backend.device_name}")
    click.echo(f"store        {public_url(config.store)}")
    click.echo(f"collections  {await asyncio.to_thread(_collections, store, identity.fingerprint)}")
    if not config.encoder_address:
        click.echo("encoder      none: what is not stored is not scored")
    else:
        where = "elsewhere" if options["encoder_address"] else "in this process"
        click.echo(f"encoder      {config.encoder_address} ({where})")
    click.echo(f"listening    {config.host}:{server.port} (gRPC)")


def _collections(store: Store, fingerprint: str) -> str:
    from cache.errors import CacheError
    from decoder_server.catalogue import describe

    try:
        described = describe(store)
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
    return "; ".join(shown) or "none yet: `preread index` makes one"
