"""How a running server is told to stop. Knows signals, not servers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine


def told_to_stop() -> asyncio.Future[None]:
    """Done at the first SIGTERM or SIGINT; a second one has its usual effect."""
    loop = asyncio.get_running_loop()
    told = loop.create_future()

    def tell() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        if not told.done():
            told.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
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
