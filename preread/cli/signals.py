"""Demands of a server on its process: signals to stop, lines on standard output, open files. Knows no server."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
from collections.abc import Coroutine

import click

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
