"""When a failed call is tried again. Pure arithmetic over a clock and a random source; knows no gRPC.

Retried are Overloaded with a server's hint and Unavailable: nothing was done, or doing it again changes
nothing. The wait is the server's hint where it gives one, else exponential, always with jitter. Two bounds:
attempts per call, and a budget shared by all calls of a client (gRPC's retry throttling, proposal A6), so
that a service in trouble is not buried under retries.
"""

from __future__ import annotations

import math
import random
import threading
from dataclasses import dataclass

from preread.client import checks
from preread.client.errors import Overloaded, PrereadError, Unavailable

# The values of A6's example: retries stop while less than half is left.
BUDGET_TOKENS = 10.0
TOKENS_PER_SUCCESS = 0.1


@dataclass(frozen=True)
class RetryPolicy:
    """Bounds of trying again. `max_attempts=1` turns it off."""

    max_attempts: int = 4
    first_wait_seconds: float = 0.1
    max_wait_seconds: float = 10.0  # a hint beyond it is the caller's to follow
    jitter: float = 0.2  # a wait is stretched by up to this share

    def __post_init__(self) -> None:
        if checks.integer("max_attempts", self.max_attempts) < 1:
            raise checks.invalid("max_attempts", str(self.max_attempts), "at least 1")
        for name in ("first_wait_seconds", "max_wait_seconds", "jitter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} is {checks.show(value)}; expected a number")
            if not 0 <= value < math.inf:
                raise checks.invalid(name, str(value), "0 or more")

    def wait_seconds(self, error: PrereadError, attempt: int, remaining_seconds: float | None) -> float | None:
        """How long to wait before the next attempt; None: do not try again.

        Args:
            attempt: how many attempts were made, from 1.
            remaining_seconds: until the caller's deadline; a wait that would not leave any of it is not begun.
        """
        if attempt >= self.max_attempts:
            return None
        if isinstance(error, Overloaded):
            if error.retry_after_seconds is None:  # a message over a size limit, a quota: it would not help
                return None
        elif not isinstance(error, Unavailable):
            return None
        wait = error.retry_after_seconds
        if wait is None:
            wait = min(self.first_wait_seconds * 2 ** (attempt - 1), self.max_wait_seconds)
        if wait > self.max_wait_seconds:
            return None
        # Jitter only stretches: coming back before the server asked would be refused again.
        wait *= 1 + self.jitter * random.random()
        if remaining_seconds is not None and wait >= remaining_seconds:
            return None
        return wait


class RetryBudget:
    """Tokens shared by all calls of one client; thread-safe. A failure costs one, a success brings a tenth."""

    def __init__(self) -> None:
        self._tokens = BUDGET_TOKENS
        self._lock = threading.Lock()

    def give(self) -> None:
        """Notes a success."""
        with self._lock:
            self._tokens = min(BUDGET_TOKENS, self._tokens + TOKENS_PER_SUCCESS)

    def take(self) -> bool:
        """Notes a failure that could be tried again; False: better not."""
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1)
            return self._tokens > BUDGET_TOKENS / 2
