"""`preread serve`'s HTTP gateway: its options, and its life beside the gRPC server's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from preread.cli.options import option

if TYPE_CHECKING:
    from decoder_server.http.gateway import Gateway
    from decoder_server.server import DecoderServer

F = TypeVar("F", bound=Callable[..., Any])

MIB = 1 << 20


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
    from decoder_server.http.config import HttpConfig
    from decoder_server.http.gateway import Gateway

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
    from preread.edge.hosts import join

    scheme = "https" if gateway.context.tls else "http"
    asks = " (API keys)" if gateway.context.keys.required else ""
    return f"http         {scheme}://{join(gateway.config.host, gateway.port)}{asks}"
