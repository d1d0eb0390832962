"""Which requests of a model are under way: who hears how each ended, and when a server that stops may go.

Does not know what a request does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from decoder_server.errors import Unavailable, code_of
from decoder_server.observer import Answered, Observer, Trail
from decoder_server.request import RerankRequest


class Running:
    """Made and used on the event loop."""

    def __init__(self, model: str, observers: Sequence[Observer]) -> None:
        """
        Args:
            observers: hear of every request that ends.
        """
        self._model = model
        self._observers = observers
        self._num_running = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self, request: RerankRequest, kind: str = "rerank") -> Iterator[Trail]:
        """Around a request: observers hear how it ended, and a server that stops waits for it.

        Raises:
            Unavailable: this server is stopping.
        """
        started, trail, code = time.monotonic(), Trail(), "internal"
        self._num_running += 1
        self._idle.clear()
        try:
            if self._draining:
                raise Unavailable("this server is shutting down")
            yield trail
            code = "ok"
        except BaseException as exc:
            code = code_of(exc)
            raise
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self._idle.set()
            answered = Answered(request, self._model, code, started, time.monotonic(), trail.timings, trail, kind)
            for observer in self._observers:
                observer.answered(answered)

    async def drain(self, grace_seconds: float) -> bool:
        """Accepts nothing more and waits for what runs; False when the time was up first."""
        self._draining = True
        try:
            async with asyncio.timeout(grace_seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
