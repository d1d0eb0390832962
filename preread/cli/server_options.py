"""Options that both servers share: who may call, with which certificates, what is said, where metrics are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preread.cli.options import F, option

if TYPE_CHECKING:
    from decoder_server.server import DecoderServer
    from encoder_worker.server import EncoderServer
    from preread.edge.keys import ApiKeys

_FILE = click.Path(exists=True, dir_okay=False)


def access_options(function: F) -> F:
    """--api-key, --api-keys-file, --tls-cert-file, --tls-key-file, --tls-client-ca-file, --allowed-host,
    --max-connections."""
    for decorate in (
        option(
            "--max-connections",
            type=click.IntRange(min=1),
            default=1024,
            help="gRPC calls, and HTTP connections, at once; more are told to come back. Probes always get in.",
        ),
        option(
            "--allowed-host",
            "allowed_hosts",
            multiple=True,
            metavar="NAME",
            help="A name that HTTP callers may use for this server (.example.com: and every name below it), beside "
            "loopback's and the address of the connection. Where keys are required, any will do. May be repeated.",
        ),
        option("--tls-client-ca-file", type=_FILE, help="Callers must show a certificate of this authority (PEM)."),
        option("--tls-key-file", type=_FILE, help="The key of --tls-cert-file (PEM)."),
        option("--tls-cert-file", type=_FILE, help="Speak TLS with this certificate (PEM)."),
        option("--api-keys-file", type=_FILE, help="Keys that may call, one a line: SCOPES KEY."),
        option(
            "--api-key",
            multiple=True,
            metavar="[SCOPES:]KEY",
            help="A key that may call: everything, or rerank, index, admin. Several: again, or with spaces between "
            "them in the environment. Without any key whoever reaches the port may call.",
        ),
    ):
        function = decorate(function)
    return function


def observe_options(function: F) -> F:
    """--log-format, --log-level, --metrics-port, --metrics-host."""
    for decorate in (
        option("--metrics-host", default="127.0.0.1", help="Address of --metrics-port."),
        option("--metrics-port", type=click.IntRange(0, 65535), help="Answer Prometheus here; 0 takes a free port."),
        option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"]),
            default="info",
            help="What is logged, on standard error; info is a line per call.",
        ),
        option("--log-format", type=click.Choice(["text", "json"]), default="text", help="For people or machines."),
    ):
        function = decorate(function)
    return function


def grace_option(function: F) -> F:
    """--grace-seconds."""
    return option(
        "--grace-seconds",
        type=click.FloatRange(min=0),
        default=30.0,
        help="How long calls in flight may take to finish after SIGTERM or SIGHUP.",
    )(function)


def api_keys(options: Mapping[str, Any]) -> ApiKeys:
    """The keys of `access_options`.

    Raises:
        OSError, ValueError: a file or a key that cannot be used.
    """
    from preread.edge.keys import parse_keys, read_keys

    keys = parse_keys(options["api_key"])
    return keys + read_keys(Path(options["api_keys_file"])) if options["api_keys_file"] else keys


def tls_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """The TLS fields of either server's configuration."""
    return {name: options[name] or "" for name in ("tls_cert_file", "tls_key_file", "tls_client_ca_file")}


def listening_line(server: DecoderServer | EncoderServer) -> str:
    """Where a server that has started listens, for its start-up lines."""
    from preread.edge.hosts import join

    secured = ", TLS" if server.config.tls.enabled else ""
    asks = ", API keys" if server.keys.required else ""
    return f"listening    {join(server.config.host, server.port)} (gRPC{secured}{asks})"
