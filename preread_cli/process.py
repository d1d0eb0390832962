"""A server's process: its log, keys, metrics port and open files, the lines it prints, and the signals that stop it."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from preread_cli import flags
from preread_cli.config_file import effective_lines
from preread_cli.flags import option

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from decoder_server.server import DecoderServer
    from encoder_worker.server import EncoderServer
    from preread_edge.access import ApiKeys

log = logging.getLogger(__name__)

SPARE_FILES = 256  # for the store, the model, and what a library opens

process_options = flags.options_of(
    flags.threads,
    option(
        "--api-key",
        multiple=True,
        metavar="[SCOPES:]KEY",
        help="A key that may call: everything, or rerank, index, admin. Several: again, or with spaces between them in "
        "the environment. Without any key every client that reaches the port may call.",
    ),
    option("--api-keys-file", type=flags.FILE, help="Keys that may call, one a line: SCOPES KEY."),
    option("--log-format", type=click.Choice(["text", "json"]), default="text", help="For people or machines."),
    option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        help="What is logged, on standard error; info is a line per call.",
    ),
    option("--metrics-port", type=flags.PORT, help="Answer Prometheus here; 0 takes a free port."),
    option("--metrics-host", default="127.0.0.1", help="Address of --metrics-port."),
    option(
        "--grace-seconds",
        type=click.FloatRange(min=0),
        default=30.0,
        help="How long calls in flight may take to finish after SIGTERM or SIGHUP.",
    ),
)


class Process:
    """The process that a server runs in; it begins on the server's event loop, and from then on signals stop it."""

    def __init__(self, ctx: click.Context) -> None:
        """Sets up the log, and prints which settings hold and where they came from."""
        from preread_edge.logs import set_up

        self._options: Mapping[str, Any] = ctx.params
        self._started = time.monotonic()
        set_up(self._options["log_format"], self._options["log_level"])
        for line in effective_lines(ctx):
            say(line)

    def begin(self) -> ApiKeys:
        """Tunes the process, and from now on notes signals; the keys that may call.

        Raises OSError or ValueError: a file or a key that cannot be used.
        """
        from checkpoint.compute import tune_process
        from preread_edge.access import ApiKeys

        tune_process(self._options["threads"])
        _open_files_for(self._options["max_connections"])
        self._stop = _told_to_stop()
        keys, file = ApiKeys.parse(self._options["api_key"]), self._options["api_keys_file"]
        return keys + ApiKeys.read(file) if file else keys

    async def starts(self, start: Coroutine[object, object, None]) -> bool:
        """Waits for a server to start, or for a signal, which cancels the start; whether it started, or its error."""
        starting = asyncio.create_task(start)
        await asyncio.wait([starting, self._stop], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait([starting])
            return False
        await starting
        return True

    def listens(self, server: DecoderServer | EncoderServer) -> None:
        """Says where a server that has started listens."""
        from preread_edge.access import join

        secured = (", TLS" if server.config.has_tls else "") + (", API keys" if server.keys.required else "")
        say(f"listening    {join(server.config.host, server.port)} (gRPC{secured})")

    async def runs(self) -> None:
        """Says that the server is ready; returns when a signal stops it."""
        say(f"ready        in {time.monotonic() - self._started:.1f} s")
        await self._stop

    def stops(self) -> float:
        """Says that the server stops; seconds that calls in flight may take."""
        grace: float = self._options["grace_seconds"]
        say(f"stopping     calls in flight have {grace:g} s to finish")
        return grace

    @contextmanager
    def metrics(self, registry: CollectorRegistry) -> Iterator[None]:
        """Listens on --metrics-port while the block runs, if there is one."""
        port, host = self._options["metrics_port"], self._options["metrics_host"]
        if port is None:
            yield
            return
        from preread_edge.access import Guard, join
        from preread_edge.listener import metrics_listener

        # It requires no key, so the name counts whether or not the other ports require one.
        with metrics_listener(registry, host, port, Guard(self._options["allowed_host"])) as bound:
            say(f"metrics      http://{join(host, bound)}/metrics")
            yield


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


def _told_to_stop() -> asyncio.Future[None]:
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
