"""The gateway as a process part: a socket, uvicorn on the loop that is running, and an end.

Serves from the first moment (health), answers 503 until the models have loaded. Does not know endpoints.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.routing import BaseRoute

from decoder_server.config import DecoderConfig, HttpConfig
from decoder_server.edge.http import errors
from decoder_server.edge.http.app import build
from decoder_server.edge.http.context import Context
from decoder_server.edge.http.envelope import Counted
from decoder_server.engine.on_demand import call_metadata
from decoder_server.server import DecoderServer
from preread import AsyncClient, ClientOptions
from preread_edge.hosts import Guard, join
from preread_edge.keys import refuse_control_tokens
from preread_edge.listener import bind, make_server


def _tls(config: DecoderConfig) -> dict[str, Any]:
    """The gRPC port's files serve here too; where it asks callers for certificates, so does this one."""
    if not config.tls_cert_file:
        return {}
    settings: dict[str, Any] = {"ssl_certfile": config.tls_cert_file, "ssl_keyfile": config.tls_key_file}
    if config.tls_client_ca_file:
        settings |= {"ssl_ca_certs": config.tls_client_ca_file, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return settings


def _metadata(api_key: str) -> dict[str, str]:
    return dict(call_metadata(api_key))


class Gateway:
    """HTTP in front of one DecoderServer. `start`, then serve on `.port`, then `stop`; not to be started twice."""

    def __init__(
        self,
        config: HttpConfig,
        server: DecoderServer,
        *,
        worker: AsyncClient | None = None,
        extra: Sequence[BaseRoute] = (),
    ) -> None:
        """
        Args:
            worker: a client of the encoder worker, for passages that come over HTTP; closed at the end.
                None: one for the address the server has, if it has one.
            extra: routes of others, such as a page at /.
        """
        self.config = config
        if any(model.read_control_tokens for model in server.config.models):
            refuse_control_tokens(config.host, server.keys)
        self.port = 0
        # Passages that come over HTTP are written by the first model that has a worker.
        writer = next((model for model in server.config.models if model.encoder_address), None)
        if worker is None and writer is not None:
            # The worker's log has the id of the request that this call serves.
            metadata = partial(_metadata, writer.encoder_api_key)
            options = ClientOptions(timeout_seconds=None, tls=server.config.encoder_tls, metadata=metadata)
            worker = AsyncClient(writer.encoder_address, encoder_address=writer.encoder_address, options=options)
        self.context = Context(
            config,
            server.engines,
            server.store,
            server.metrics.registry,
            server.readiness,
            server.threads,
            worker,
            server.keys,
            tls=server.config.tls.enabled,
        )
        guard = Guard(config.allowed_hosts, config.allowed_origins, any_host=server.keys.required)
        self._uvicorn = make_server(
            Counted(build(self.context, guard, extra), server.metrics.http),
            max_connections=config.max_connections,
            refusal=errors.refusal,
            header_seconds=config.header_seconds,
            **_tls(server.config),
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listens.

        Raises:
            OSError: the port is taken, or the address is not ours.
        """
        listener = bind(self.config.host, self.config.port, "HTTP")
        self.port = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=[listener]))
        while not self._uvicorn.started:
            if self._serving.done():
                await self._serving
                raise OSError(f"the HTTP server on {join(self.config.host, self.port)} ended during its start")
            await asyncio.sleep(0.005)

    async def stop(self, grace_seconds: float) -> None:
        """Says not ready, accepts nothing more, lets what runs finish within the grace, then stops."""
        self.context.draining = True
        if self._serving is not None:
            self._uvicorn.config.timeout_graceful_shutdown = max(1, round(grace_seconds))
            self._uvicorn.should_exit = True
            await self._serving
            self._serving = None
        if self.context.worker is not None:
            await self.context.worker.close()
