"""A registry on a port of its own, for Prometheus. Knows no server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server


@contextmanager
def metrics_listener(registry: CollectorRegistry, host: str, port: int) -> Iterator[int]:
    """Answers GET /metrics on a thread until the block ends; yields the port, which 0 leaves to the system.

    Raises:
        OSError: the port is taken.
    """
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as exc:
        raise OSError(f"cannot listen on {host}:{port} for metrics: {exc.strerror or exc}") from exc
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
