"""A server that says what a test tells it to: the generated servicer on a real socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from preread.v1 import encoder_pb2, encoder_pb2_grpc, rerank_pb2, rerank_pb2_grpc

Answer = Callable[[Any, grpc.ServicerContext], Any]


def make_failing(code: grpc.StatusCode, message: str = "because", *details: Message) -> Answer:
    """An answer that ends the call with google.rpc details."""

    def answer(request: Any, context: grpc.ServicerContext) -> None:
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            status.details.add().Pack(detail)
        context.abort_with_status(rpc_status.to_status(status))

    return answer


def give_results(request: Any, context: grpc.ServicerContext) -> rerank_pb2.RerankResponse:
    """One result per candidate, in order, scored by position."""
    results = [
        rerank_pb2.Result(index=i, passage_id=c.passage_id, margin=-i, score=1 / (2 + i), status=1)
        for i, c in enumerate(request.candidates)
    ]
    return rerank_pb2.RerankResponse(results=results, model="scripted", num_scored=len(results))


class ScriptedService(rerank_pb2_grpc.RerankServiceServicer):
    """Takes one answer of `script` per call, the last one repeatedly; remembers the requests."""

    def __init__(self) -> None:
        self.script: list[Answer] = [give_results]
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.remaining: list[float | None] = []

    def _next(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.remaining.append(context.time_remaining())
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return answer(request, context)

    def Rerank(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return self._next(request, context)

    def RerankStream(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        answer = self._next(request.request, context)
        if isinstance(answer, rerank_pb2.RerankResponse):
            answer = [rerank_pb2.RerankStreamResponse(batch={"results": answer.results})]
        yield from answer

    def RerankMany(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        answer = self._next(request.request, context)
        if isinstance(answer, rerank_pb2.RerankResponse):
            answer = [rerank_pb2.RerankManyResponse(index=i, response=answer) for i in range(len(request.queries))]
        yield from answer


class ReadingWorker(encoder_pb2_grpc.EncoderServiceServicer):
    """Acknowledges the passages of uploads as stored; remembers their ids. Ends one after `max_messages`."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.max_messages = 1000

    def Upsert(self, request_iterator: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        for number, message in enumerate(request_iterator):
            if number == self.max_messages:
                context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")
            ids = [one.passage_id for one in message.passages]
            self.ids += ids
            yield encoder_pb2.UpsertResponse(results=[{"passage_id": one, "status": 1} for one in ids])


class Scripted:
    """The service, and where it listens."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None, port: int = 0) -> None:
        self.service, self.worker = ScriptedService(), ReadingWorker()
        self.server = grpc.server(ThreadPoolExecutor(8))
        rerank_pb2_grpc.add_RerankServiceServicer_to_server(self.service, self.server)
        encoder_pb2_grpc.add_EncoderServiceServicer_to_server(self.worker, self.server)
        add = self.server.add_insecure_port if credentials is None else self.server.add_secure_port
        self.port = add(f"127.0.0.1:{port}", *([] if credentials is None else [credentials]))
        self.address = f"127.0.0.1:{self.port}"
        self.server.start()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    running = Scripted()
    yield running
    running.server.stop(0).wait()


@pytest.fixture
def failing() -> Callable[..., Answer]:
    """failing(code, message, *details) makes an answer that ends the call."""
    return make_failing


@pytest.fixture
def answering() -> Answer:
    """The answer with one result per candidate."""
    return give_results


@pytest.fixture
def scripted_with() -> Iterator[Callable[..., Scripted]]:
    """scripted_with(credentials) listens with TLS, scripted_with(port=...) at a port."""
    started: list[Scripted] = []

    def start(*settings: Any, **more: Any) -> Scripted:
        started.append(Scripted(*settings, **more))
        return started[-1]

    yield start
    for running in started:
        running.server.stop(0).wait()
