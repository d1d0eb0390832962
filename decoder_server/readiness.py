"""State of a server, for probes: ready, alive, and whether its encoders answer.

A remote encoder may fail later without costing readiness: stored states are ranked without it, and every server would
go out of service together. One that never answered is a wrong address, key or proxy, at which a rollout should stop.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpc_health.v1 import health, health_pb2

from decoder_server.engine.on_demand import EncoderClient
from preread.channel import proxy_variable
from preread.errors import Unavailable

log = logging.getLogger(__name__)

# Names for health checks, besides those of services: loaded, and no restart would help; every encoder answers now.
LIVE, ENCODER = "live", "encoder"
WATCH_SECONDS = 5.0  # between two checks of an encoder that answers
RETRY_SECONDS = 1.0  # of one that does not


@dataclass(eq=False, slots=True)
class _Encoder:
    client: EncoderClient
    model: str
    in_process: bool
    answered: bool = False  # at any time
    problem: str = "has not been checked"  # "": it answered its last check


class Readiness:
    """Readiness of one server, and the servicer of gRPC's health checks."""

    def __init__(self, services: Sequence[str], encoder_up: Callable[[str, bool], None]) -> None:
        """`services` are SERVING where the server is ready; `encoder_up(model, answers)` is called at every check."""
        self.servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in grpc-stubs
        self._services = ("", *services)
        self._encoder_up = encoder_up
        self._encoders: list[_Encoder] = []
        self._loaded = self._stopping = False
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    @property
    def problem(self) -> str:
        """Why the server is not ready, without addresses; "" where it is."""
        if self._stopping:
            return "the server is stopping"
        if not self._loaded:
            return "the model is loading"
        if any(one.problem and (one.in_process or not one.answered) for one in self._encoders):
            return "an encoder does not answer; the server's log has the cause"
        return ""

    @property
    def degraded(self) -> str:
        """Present limitation of a ready server; "" where it can do everything."""
        text = "an encoder does not answer: texts are not encoded on demand, stored passages are ranked"
        return text if any(one.problem for one in self._encoders) else ""

    async def wait(self) -> None:
        """Returns when the server is ready."""
        while self.problem:
            self._changed.clear()
            await self._changed.wait()

    async def add(self, client: EncoderClient, model: str, *, in_process: bool) -> None:
        """Watches an encoder, beginning with a check; raises ValueError where the model was made for another one."""
        one = _Encoder(client, model, in_process)
        self._encoders.append(one)
        await self._check(one)

    async def loaded(self) -> None:
        """The models have; encoders are watched from here on."""
        self._loaded = True
        await self.publish()
        self._watching = asyncio.create_task(self._watch()) if self._encoders else None

    async def stop(self) -> None:
        """Not ready from here on."""
        self._stopping = True
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self.servicer.enter_graceful_shutdown()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(RETRY_SECONDS if any(one.problem for one in self._encoders) else WATCH_SECONDS)
            for one in self._encoders:
                await self._check(one, Exception)  # such as another encoder than the model's; the watch goes on
            await self.publish()

    async def _check(self, one: _Encoder, expected: type[Exception] = Unavailable) -> None:
        try:
            await one.client.check()
            problem = ""
        except expected as exc:
            problem = str(exc) or type(exc).__name__
        if problem and one.problem != problem:
            proxy = proxy_variable(one.client.address)
            hint = f" ({proxy} is set, so it is called through that proxy; no_proxy exempts hosts)" if proxy else ""
            log.warning("%s%s", problem, hint)
        elif one.problem and not problem and one.answered:
            log.warning("encoder worker %s answers again", one.client.address)
        one.problem, one.answered = problem, one.answered or not problem
        self._encoder_up(one.model, not problem)

    async def publish(self) -> None:
        """Tells health checks the present state."""
        broken = any(one.problem and one.in_process for one in self._encoders)
        serves = dict.fromkeys(self._services, not self.problem) | {LIVE: self._loaded and not broken}
        if self._encoders:
            serves[ENCODER] = not self.degraded
        status = health_pb2.HealthCheckResponse
        for name, well in serves.items():
            await self.servicer.set(name, status.SERVING if well else status.NOT_SERVING)
        self._changed.set()
