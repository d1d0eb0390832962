"""`preread encode-worker`: an encoder that other machines send passages and texts to, until told to stop.

Does not know what the worker does with a call.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import click

from preread_cli.config_file import config_option, effective_lines
from preread_cli.options import (
    allow_clipped_option,
    compute_options,
    control_tokens_option,
    model_option,
    option,
    store_option,
)
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
    from encoder_worker.server import EncoderServer

MIB = 1 << 20


@click.command()
@config_option
@store_option
@model_option
@option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for every interface.")
@option("--port", type=click.IntRange(0, 65535), default=50052, help="gRPC port; 0 takes a free one and prints it.")
@compute_options
@control_tokens_option
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
@allow_clipped_option
@access_options
@observe_options
@grace_option
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Keep an encoder running for other machines to send passages to.

    \b
    Answers gRPC on --port: passages are encoded and put into --store, and texts that a reranking
    server has no states of are encoded for it (`preread serve --encoder-address`).

    Ready when the last line says so; SIGTERM, SIGHUP or Ctrl-C lets calls in flight finish.
    """
    from preread_edge.logs import set_up

    set_up(options["log_format"], options["log_level"])
    for line in effective_lines(ctx):
        say(line)
    asyncio.run(_work(options))


async def _work(options: dict[str, Any]) -> None:
    from checkpoint.compute import tune_process
    from encoder_worker.config import EncoderConfig
    from encoder_worker.server import EncoderServer
    from preread_cli.serve import metrics_port

    started = time.monotonic()
    tune_process(options["threads"])
    open_files_for(options["max_connections"])
    same = (
        "store", "host", "port", "device", "dtype", "max_passage_tokens", "read_control_tokens", "max_batch_tokens",
        "max_message_bytes", "max_queue_tokens", "max_unacknowledged_passages", "max_connections", "allow_clipped",
    )  # fmt: skip
    config = EncoderConfig(checkpoint=options["model"], **tls_files(options), **{name: options[name] for name in same})
    told = told_to_stop()
    server = EncoderServer(config, keys=api_keys(options))
    with metrics_port(options, server.metrics.registry):
        await _run(server, told, options["grace_seconds"], started)


async def _run(server: EncoderServer, told: asyncio.Future[None], grace_seconds: float, started: float) -> None:
    config = server.config
    from checkpoint.compute import keep_loaded

    if not await started_unless_told(server.start(), told):
        return
    keep_loaded()
    engine = server.engine
    identity = engine.encoder.identity
    say(f"encoder      {config.checkpoint} (encoder {identity.fingerprint[:12]}, dim {identity.dim})")
    say(f"compute      {engine.encoder.dtype_name} on {engine.encoder.device_name}")
    say(f"store        {server.public_store}")
    say(listening_line(server))
    say(f"ready        in {time.monotonic() - started:.1f} s")
    await told
    say(f"stopping     calls in flight have {grace_seconds:g} s to finish")
    await server.stop(grace_seconds)
