"""`preread serve`, both halves in one process, and `preread encode-worker`, the encoder for other machines."""

import asyncio
import time
from typing import Any

import click

from decoder_server.config import DecoderConfig, HttpConfig, KvCacheConfig, ModelConfig
from encoder_worker.config import EncoderConfig, WriteThroughConfig
from preread_cli import flags
from preread_cli.flags import option
from preread_cli.models import model_option, models_option, parse_models

_GRACE = click.FloatRange(min=0)
_LEVELS = click.Choice(["debug", "info", "warning", "error"])
_MODEL_FLAGS = (
    "name", "device", "dtype", "max_passage_tokens", "read_control_tokens", "encoder_address", "encoder_api_key",
)  # fmt: skip
_process_options = flags.options_of(
    flags.threads,
    option(
        "--api-key",
        multiple=True,
        metavar="[SCOPES[@COLLECTIONS]:]KEY",
        help="A key that may call: everything, or rerank, index, admin. Several: again, or with spaces between them in "
        "the environment. Without any key every client that reaches the port may call.",
    ),
    option("--api-keys-file", type=flags.FILE, help="Keys that may call, one a line: SCOPES[@COLLECTIONS] KEY."),
    option("--log-format", type=click.Choice(["text", "json"]), default="text", help="For people, or for machines."),
    option("--log-level", type=_LEVELS, default="info", help="Log level, on standard error; info: a line per call."),
    option("--metrics-port", type=flags.PORT, help="Port for Prometheus metrics; 0 takes a free one."),
    option("--metrics-host", default="127.0.0.1", help="Address of --metrics-port."),
    option("--grace-seconds", type=_GRACE, default=30.0, help="How long calls in flight have after SIGTERM or SIGHUP."),
)


@click.command()
@models_option
@flags.knob_options(ModelConfig, only=_MODEL_FLAGS)
@flags.no_encoder
@option("--encoder-port", type=flags.PORT, default=50052, help="Loopback port of the encoder in this process.")
@flags.knob_options(DecoderConfig, KvCacheConfig, HttpConfig, WriteThroughConfig, without_default=["--http-port"])
@option(
    "--check/--no-check",
    default=None,
    help="Refuse to start with a model whose scores are wrong (`preread check`): every model, or none. By "
    "default only cross-encoders that do not run in plain float32 are checked, once each.",
)
@option("--tracing", is_flag=True, help="Send OpenTelemetry spans to where the OTEL_* variables say.")
@_process_options
@click.pass_context
def serve(ctx: click.Context, /, **options: Any) -> None:
    """Start the reranking server.

    \b
    Answers gRPC on --port, and HTTP on --http-port, from the states in --store. Texts that come
    with a request, and ids that are not stored but come with a text, are encoded by an encoder
    in this process, or by the worker at --encoder-address (`preread encode-worker`), or not at all
    with --no-encoder.

    Ready when the last line says so; SIGTERM, SIGHUP or Ctrl-C lets requests in flight finish.
    """
    begun = time.monotonic()
    if options["no_encoder"] and options["encoder_address"]:
        raise click.UsageError("--no-encoder and --encoder-address are mutually exclusive.")
    if options["no_encoder"] and options["write_through"]:
        raise click.UsageError("--no-encoder and --write-through are mutually exclusive: nothing would be kept.")
    models = parse_models(options, kv_caches=flags.from_options(KvCacheConfig, options))
    config = flags.from_options(DecoderConfig, options, models=models)
    flags.from_options(WriteThroughConfig, options).check_store(config.store)
    http = flags.from_options(HttpConfig, options) if options["http_port"] is not None else None
    from preread_cli.process import run_server

    asyncio.run(run_server(ctx, config, http, begun))


@click.command()
@model_option
@flags.knob_options(EncoderConfig)
@flags.knob_options(HttpConfig, only=["allowed_hosts"])  # of --metrics-port
@_process_options
@click.pass_context
def encode_worker(ctx: click.Context, /, **options: Any) -> None:
    """Keep an encoder running for other machines to send passages to.

    \b
    Answers gRPC on --port: passages are encoded and put into --store, and texts that a reranking
    server has no states of are encoded for it (`preread serve --encoder-address`).

    Ready when the last line says so; SIGTERM, SIGHUP or Ctrl-C lets calls in flight finish.
    """
    begun = time.monotonic()
    config = flags.from_options(EncoderConfig, options, checkpoint=options["model"])
    from preread_cli.process import run_worker

    asyncio.run(run_worker(ctx, config, begun))
