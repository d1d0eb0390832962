"""Long work on one message, in steps that leave the interpreter to others.

Parsing holds the interpreter, so a thread alone does not keep the event loop, or the model's thread, going. What
runs here calls its `step` often; two thirds of the time then belong to others, whatever its number of callers.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Messages below are parsed where they are: at worst (an array of empty arrays) 64 KiB take 4 ms.
SMALL_BYTES = 64 << 10
SLICE_SECONDS = 0.003
REST = 2.0  # for every second of work
MAX_AT_ONCE = 4  # the others wait, so that a short message is not behind more than so many long ones

Step = Callable[[], None]

_turn = threading.Lock()
_threads = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="steps")


class _Steps:
    """One piece of work. One at a time has the turn, also while it rests."""

    abandoned = False
    _since = 0.0

    def __enter__(self) -> None:
        _turn.acquire()
        self._since = time.thread_time()

    def __exit__(self, *_: object) -> None:
        time.sleep(REST * min(1.0, time.thread_time() - self._since))
        _turn.release()

    def __call__(self) -> None:
        if time.thread_time() - self._since >= SLICE_SECONDS:
            self.__exit__()
            time.sleep(0.0005)  # those that wait for the turn get it
            self.__enter__()
            if self.abandoned:
                raise asyncio.CancelledError  # the result is not waited for any more


async def stepped(function: Callable[Concatenate[Step, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(step, ...)` on a thread; it calls `step` between any two pieces of work of a millisecond."""
    steps = _Steps()

    def run() -> T:
        with steps:
            return function(steps, *args, **kwargs)

    try:
        return await asyncio.get_running_loop().run_in_executor(_threads, run)
    except asyncio.CancelledError:
        steps.abandoned = True
        raise


class Pauses:
    """On the event loop: work in short parts, with a rest for others in between."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    async def worked(self) -> None:  # after each part
        seconds = time.perf_counter() - self._since
        if seconds >= SLICE_SECONDS:
            await asyncio.sleep(REST * min(seconds, SLICE_SECONDS * 4))
            self._since = time.perf_counter()
