"""CircuitBreaker: stops asking a server that keeps failing, so that callers fail at once instead of waiting each.

Knows no server: it is told of successes and failures.
"""

import threading
import time

from cache.errors import StoreUnavailable


class CircuitBreaker:
    """Opens after `max_failures` in a row; then every `cooldown_seconds` one call is let through to try."""

    def __init__(self, max_failures: int = 5, cooldown_seconds: float = 1.0) -> None:
        self._max_failures = max_failures
        self._cooldown_seconds = cooldown_seconds
        self._lock = threading.Lock()
        self._num_failures = 0
        self._open_until = 0.0
        self._reason = ""

    @property
    def is_open(self) -> bool:
        return self._num_failures >= self._max_failures

    def check(self) -> None:
        """Raises StoreUnavailable where the call should not be made."""
        with self._lock:
            if not self.is_open:
                return
            wait_seconds = self._open_until - time.monotonic()
            if wait_seconds > 0:
                raise StoreUnavailable(
                    f"not asked: {self._num_failures} failures in a row, next try in {wait_seconds:.1f} s; "
                    f"last: {self._reason}"
                )
            self._open_until = time.monotonic() + self._cooldown_seconds  # this call tries, others wait for it

    def succeeded(self) -> None:
        with self._lock:
            self._num_failures = 0

    def failed(self, reason: str) -> None:
        with self._lock:
            self._num_failures += 1
            self._reason = reason
            self._open_until = time.monotonic() + self._cooldown_seconds
