"""Equal servers of one gRPC service: a channel to each, calls that go round, and what follows a failed attempt."""

import itertools
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from preread import wire
from preread.arguments import Argument
from preread.channel import CONNECT_ONE_OF_SEVERAL_SECONDS, CONNECT_SECONDS, LOCAL_ADDRESS, ClientOptions
from preread.errors import Cancelled, PrereadError, Unavailable
from preread.retry import Throttle
from preread.v1.encoder_pb2_grpc import EncoderServiceStub
from preread.v1.rerank_pb2_grpc import RerankServiceStub
from preread.values import REQUEST_ID, USABLE_REQUEST_ID

log = logging.getLogger(__name__)

TELL_SECONDS, QUIET_SECONDS = 5.0, 10.0  # a log line says that calls may wait for so long; not again for so long


class Service:
    """A gRPC service at equal addresses: channels, and the throttle that all its calls share; thread-safe."""

    def __init__(
        self, addresses: Sequence[str], options: ClientOptions, maker: Any, stub: Callable[[Any], Any]
    ) -> None:
        """`maker` is grpc or grpc.aio, `stub` the class of the service's generated stub."""
        self.addresses, self.options, self.throttle = addresses, options, Throttle()
        connect_seconds = CONNECT_SECONDS if len(addresses) == 1 else CONNECT_ONE_OF_SEVERAL_SECONDS
        self.channels = [options.channel(maker, address, connect_seconds) for address in addresses]
        self.stubs = [stub(channel) for channel in self.channels]
        self.turns = itertools.count()
        self.tell_after = -math.inf  # a log line says that calls wait
        self.is_closed = False

    def seconds(self, timeout: float | None) -> float:
        """Time limit of a call: its own, else the one of all calls, else inf."""
        own = Argument("timeout", timeout).seconds() or self.options.timeout_seconds
        return math.inf if own is None else own

    def metadata(self) -> dict[str, str]:
        """Of a call, with its id: the caller's where a server would keep it."""
        given = self.options.metadata
        entries = dict(Argument("metadata", given() if callable(given) else given).metadata())
        if not USABLE_REQUEST_ID.fullmatch(entries.get(REQUEST_ID, "")):
            entries[REQUEST_ID] = secrets.token_hex(16)
        if self.options.api_key is not None:
            entries.setdefault("authorization", f"Bearer {self.options.api_key}")
        return entries


class Attempts:
    """One call of a method: its servers in turn, its time limit and id, and when it is made again.

    Another server is tried immediately; after each was, the policy says whether and when the next round begins.
    """

    def __init__(self, service: Service, method: str, request: object, seconds: float | None) -> None:
        """`request` is a message, or a function that makes the messages of a stream; `seconds` None or inf: no end."""
        self._service, self._method, self.request = service, method, request
        self._seconds = math.inf if seconds is None else seconds
        self._metadata = service.metadata()
        self.request_id = self._metadata[REQUEST_ID]
        self._call: Any = None
        self._is_cancelled = False
        self._turn, self._num_failed = next(service.turns), 0
        self.begin()

    def begin(self) -> None:
        """Starts the clock; once more for another call under the same id, to the server that answered."""
        now = time.monotonic()
        self._deadline, self._retry_until = now + self._seconds, now + self._service.options.retry.budget_seconds
        self._turn, self._num_failed = self._server, 0

    @property
    def _server(self) -> int:
        return (self._turn + self._num_failed) % len(self._service.addresses)

    def start(self) -> Any:
        """gRPC's call: for a blocking client the response."""
        if self._is_cancelled or self._service.is_closed:
            raise self._cancelled()
        remaining = self._deadline - time.monotonic()
        timeout = None if math.isinf(remaining) else max(0.0, remaining)
        method = getattr(self._service.stubs[self._server], self._method)
        request = self.request() if callable(self.request) else self.request
        self._call = method(request, timeout=timeout, metadata=tuple(self._metadata.items()))
        return self._call

    def cancel(self) -> None:
        """Ends the stream in flight, and lets none follow."""
        self._is_cancelled = True
        if hasattr(self._call, "cancel"):
            self._call.cancel()

    def succeeded(self) -> None:
        self._service.throttle.succeeded()

    def wait_seconds(self, exc: BaseException, *, may_repeat: bool = True) -> float:
        """Seconds until the attempt after a failed one; raises PrereadError, or `exc`, where none follows."""
        if self._is_cancelled or self._service.is_closed:
            raise self._cancelled() from exc
        if not isinstance(exc, grpc.RpcError):
            raise exc  # of asyncio: the caller's task was cancelled
        address, policy = self._service.addresses[self._server], self._service.options.retry
        error, answered = wire.translate(exc, address, self.request_id)
        self._num_failed += 1
        if not may_repeat or not policy.may_help(error):
            raise error from exc
        rounds, others = divmod(self._num_failed, len(self._service.addresses))
        now = time.monotonic()
        remaining = (self._deadline if others else min(self._deadline, self._retry_until)) - now
        wait = 0.0 if others else policy.wait_seconds(error, rounds)
        if answered:
            wait = self._service.throttle.wait_seconds(wait, now, remaining)
        if wait >= remaining:
            raise error from exc
        if not others:
            self._tell(error, now, remaining)
        return wait

    def _tell(self, error: PrereadError, now: float, remaining: float) -> None:
        """A wait of a minute for a mistyped address should say so immediately; once for all calls."""
        if isinstance(error, Unavailable) and remaining >= TELL_SECONDS and now >= self._service.tell_after:
            self._service.tell_after = now + QUIET_SECONDS
            log.warning("%s; retrying for up to %.0f s", error.message, remaining)

    def _cancelled(self) -> PrereadError:
        message = "the client is closed" if self._service.is_closed else "the call was cancelled"
        return Cancelled(message, address=self._service.addresses[0], request_id=self.request_id)


class BaseClient:
    """Calls a reranking server and, where `encoder_address` is given, an encoder worker; raises PrereadError.

    Connects at the first call. Client is thread-safe; AsyncClient belongs to the event loop it was made on.
    """

    _grpc: Any  # grpc or grpc.aio

    def __init__(
        self,
        address: str | Sequence[str] = LOCAL_ADDRESS,
        *,
        encoder_address: str | Sequence[str] | None = None,
        options: ClientOptions | None = None,
    ) -> None:
        """`address` is host:port of the reranking server, or a list: equal servers, of which calls take the next.

        upsert, delete, stats and describe go to `encoder_address`, likewise.
        """
        if options is not None and not isinstance(options, ClientOptions):
            raise Argument("options", options).wrong("ClientOptions")
        options = options or ClientOptions()
        servers = Argument("address", address).addresses()
        workers = None if encoder_address is None else Argument("encoder_address", encoder_address).addresses()
        self._server = Service(servers, options, self._grpc, RerankServiceStub)
        self._worker = None if workers is None else Service(workers, options, self._grpc, EncoderServiceStub)

    def _encoder(self) -> Service:
        if self._worker is None:
            raise ValueError("encoder_address is not set; upsert, delete, stats and describe need an encoder worker")
        return self._worker
