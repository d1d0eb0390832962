"""`preread encode-worker`: an encoder that other machines send passages and texts to, until told to stop.

Does not know what the worker does with a call.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import click

from preread.cli.options import compute_options, model_option, option, store_option

MIB = 1 << 20


@click.command()
@store_option
@model_option
@option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for every interface.")
@option("--port", type=click.IntRange(0, 65535), default=50052, help="gRPC port; 0 takes a free one and prints it.")
@compute_options
@option("--max-passage-tokens", type=click.IntRange(min=1), help="Passage limit.  [default: the checkpoint's]")
@option("--max-batch-tokens", type=click.IntRange(min=1), help="Tokens per forward pass.  [default: by device]")
@option("--max-message-bytes", type=click.IntRange(min=1), default=64 * MIB, help="Largest gRPC message.")
@option(
    "--max-queue-tokens",
    type=click.IntRange(min=1),
    default=1_000_000,
    help="On-demand tokens under way before new calls are turned away.",
)
@option(
    "--max-unacknowledged-passages",
    type=click.IntRange(min=1),
    default=1024,
    help="Passages of one upload that are read before the first is stored.",
)
@option(
    "--grace-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    help="How long calls under way may take to finish after SIGTERM.",
)
def command(**options: Any) -> None:
    """Keep an encoder running for other machines to send passages to.

    \b
    Answers gRPC on --port: passages are encoded and put into --store, and texts that a reranking
    server has no states of are encoded for it (`preread serve --encoder-address`).

    Ready when the last line says so; SIGTERM or Ctrl-C lets calls under way finish.
    """
    asyncio.run(_work(options))


async def _work(options: dict[str, Any]) -> None:
    from checkpoint.compute import tune_process
    from encoder_worker.config import EncoderConfig
    from encoder_worker.server import EncoderServer
    from preread.cli.signals import told_to_stop

    started = time.monotonic()
    tune_process(options.pop("threads"))
    grace_seconds = options.pop("grace_seconds")
    config = EncoderConfig(checkpoint=options.pop("model"), **options)
    told = told_to_stop()
    server = EncoderServer(config)
    starting = asyncio.create_task(server.start())
    await asyncio.wait([starting, told], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])
        return
    await starting
    engine = server.engine
    identity = engine.encoder.identity
    click.echo(f"encoder      {config.checkpoint} (encoder {identity.fingerprint[:12]}, dim {identity.dim})")
    click.echo(f"compute      {engine.encoder.dtype_name} on {engine.encoder.device_name}")
    click.echo(f"store        {server.public_store}")
    click.echo(f"listening    {config.host}:{server.port} (gRPC)")
    click.echo(f"ready        in {time.monotonic() - started:.1f} s")
    await told
    click.echo(f"stopping     calls under way have {grace_seconds:g} s to finish")
    await server.stop(grace_seconds)
