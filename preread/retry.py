"""When a failed call is made again: RetryPolicy for one call, Throttle for all calls of a client together.

Retried are Unavailable and, where the server hints when, Overloaded: nothing was done, or doing it again changes
nothing.
"""

import random
import threading
from dataclasses import dataclass

from preread.arguments import Argument
from preread.errors import Overloaded, PrereadError, Unavailable

RETRIES_PER_SECOND = 10  # of a client, next to those that successes pay for
RETRIES_PER_SUCCESS = 0.2
BURST = 20  # retries at a time after a quiet while


@dataclass(frozen=True)
class RetryPolicy:
    """Bounds of retries. `budget_seconds=0` turns them off, except at other servers; a time limit ends them too."""

    budget_seconds: float = 60.0  # from the start of a call: the last attempt begins within it
    first_wait_seconds: float = 0.1  # doubles with every attempt
    max_wait_seconds: float = 2.0  # where the server gives no hint
    jitter: float = 0.2  # a wait is stretched by up to this share

    def __post_init__(self) -> None:
        for name in ("budget_seconds", "first_wait_seconds", "max_wait_seconds", "jitter"):
            Argument(name, getattr(self, name)).number()

    def may_help(self, error: PrereadError) -> bool:
        """Overloaded without a hint is a message over a size limit, or a quota: it would fail again."""
        is_full = isinstance(error, Overloaded) and error.retry_after_seconds is not None
        return is_full or isinstance(error, Unavailable)

    def wait_seconds(self, error: PrereadError, attempt: int) -> float:
        """Seconds until the next attempt, after those made."""
        wait = error.retry_after_seconds
        if wait is None:
            wait = min(self.first_wait_seconds * 2 ** min(attempt - 1, 60), self.max_wait_seconds)
        # Jitter only stretches: a retry before the server's hint would be rejected again.
        return wait * (1 + self.jitter * random.random())


class Throttle:
    """Spaces the retries of a client, so that a server in trouble is not buried under them; thread-safe.

    A retry waits for its turn and does not fail for lack of one, unless the call's time would be over by then: a client
    with few calls in flight is never slowed. Retries that reach no server are free, and not counted here.
    """

    def __init__(self) -> None:
        self._lock, self._next = threading.Lock(), -float("inf")  # when the next retry has its turn, less the burst

    def succeeded(self) -> None:
        with self._lock:
            self._next -= RETRIES_PER_SUCCESS / RETRIES_PER_SECOND

    def wait_seconds(self, wait: float, now: float, remaining_seconds: float) -> float:
        """`wait`, or longer; takes a turn where that leaves time to use it."""
        with self._lock:
            turn = max(self._next, now - BURST / RETRIES_PER_SECOND)
            wait = max(wait, turn - now)
            if wait < remaining_seconds:
                self._next = turn + 1 / RETRIES_PER_SECOND
            return wait
