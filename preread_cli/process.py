"""Demands of a server on its process: signals to stop, lines on standard output, open files. Knows no server.

Options that both servers share: who may call, with which certificates, what is said, where metrics are.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preread_cli.options import F, option

if TYPE_CHECKING:
    from decoder_server.server import DecoderServer
    from encoder_worker.server import EncoderServer
    from preread_edge.keys import ApiKeys


log = logging.getLogger(__name__)

SPARE_FILES = 256  # for the store, the model, and what a library opens


def told_to_stop() -> asyncio.Future[None]:
    """Done at the first SIGTERM, SIGINT or SIGHUP; a second SIGTERM or SIGINT has its usual effect.

    A SIGHUP that was ignored when the process began (nohup) stays ignored. One that comes while the server stops
    changes nothing: service managers send it right after SIGTERM, and a closing terminal more than once.
    """
    loop = asyncio.get_running_loop()
    told = loop.create_future()

    def tell() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        if not told.done():
            told.set_result(None)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, tell)
    return told


async def started_unless_told(start: Coroutine[object, object, None], told: asyncio.Future[None]) -> bool:
    """Waits for a server to start, or for the word to stop, which cancels the start; whether it started.

    Raises:
        Whatever the start raised.
    """
    starting = asyncio.create_task(start)
    await asyncio.wait([starting, told], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])
        return False
    await starting
    return True


def open_files_for(max_connections: int) -> None:
    """Raises the soft limit of open files, as far as the hard one allows, to what so many callers need.

    Each may have a gRPC and an HTTP connection; many systems begin processes with 1,024 files. At the limit no one new
    is accepted, probes included.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * max_connections + SPARE_FILES
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < needed:
        log.warning(
            "this process may open %d files, and --max-connections %d takes up to %d: raise its limit (ulimit -n)",
            wanted,
            max_connections,
            needed,
        )


def say(line: str) -> None:
    """One line on standard output, which may have no reader any more.

    A terminal that was closed, a pipe whose reader has ended or a full disk must not end a server, least of all one
    that is told to stop by SIGHUP and has requests to finish.
    """
    try:
        click.echo(line)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())  # what is buffered goes there too, or the process would end with an error
        os.close(null)


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
    from preread_edge.keys import parse_keys, read_keys

    keys = parse_keys(options["api_key"])
    return keys + read_keys(Path(options["api_keys_file"])) if options["api_keys_file"] else keys


def tls_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """The TLS fields of either server's configuration."""
    return {name: options[name] or "" for name in ("tls_cert_file", "tls_key_file", "tls_client_ca_file")}


def listening_line(server: DecoderServer | EncoderServer) -> str:
    """Where a server that has started listens, for its start-up lines."""
    from preread_edge.hosts import join

    secured = ", TLS" if server.config.tls.enabled else ""
    asks = ", API keys" if server.keys.required else ""
    return f"listening    {join(server.config.host, server.port)} (gRPC{secured}{asks})"
