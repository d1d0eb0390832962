"""Servers that stop, start again, or are several: calls go on."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import grpc
import pytest

from preread import AsyncClient, Client, ClientOptions, Passage, RetryPolicy, Unavailable

QUERY, TEXTS = "why is the sky blue", ["The sky is blue.", "Grass is green."]


def _at(bound: socket.socket) -> str:
    return f"127.0.0.1:{bound.getsockname()[1]}"


class Callers:
    """Threads of one Client and tasks of one AsyncClient, each of which calls again as soon as it was answered."""

    def __init__(self, address: str, options: ClientOptions | None = None) -> None:
        self.num_answered, self.failed = 0, Counter[str]()
        self._address, self._options, self._over = address, options, threading.Event()
        self._client = Client(address, options=options)
        self._threads = [threading.Thread(target=self._call) for _ in range(4)]
        self._threads.append(threading.Thread(target=lambda: asyncio.run(self._call_all())))

    def _call(self) -> None:
        while not self._over.is_set():
            try:
                self.num_answered += len(self._client.rerank(QUERY, TEXTS)) == 2
            except Exception as exc:
                self._note(exc)

    async def _call_all(self) -> None:
        async with AsyncClient(self._address, options=self._options) as client:
            tasks = [asyncio.create_task(self._call_async(client)) for _ in range(12)]
            while not self._over.is_set():
                await asyncio.sleep(0.05)
            for one in tasks:
                one.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _call_async(self, client: AsyncClient) -> None:
        while not self._over.is_set():
            try:
                self.num_answered += len(await client.rerank(QUERY, TEXTS)) == 2
                await asyncio.sleep(0.01)
            except Exception as exc:
                self._note(exc)

    def _note(self, exc: Exception) -> None:
        if not self._over.is_set():  # afterwards calls in flight are ended
            self.failed[f"{type(exc).__name__}: {exc}"] += 1

    def wait_answered(self, num_more: int) -> None:
        """Returns when so many more calls were answered."""
        wanted = self.num_answered + num_more
        while self.num_answered < wanted:
            time.sleep(0.02)

    @contextmanager
    def calling(self) -> Iterator[None]:
        for one in self._threads:
            one.start()
        try:
            yield
        finally:
            self._over.set()
            self._client.close()
            for one in self._threads:
                one.join()


def test_no_call_fails_over_a_restart(scripted_with) -> None:
    first = scripted_with()
    callers = Callers(first.address)
    with callers.calling():
        callers.wait_answered(100)
        first.server.stop(0).wait()
        time.sleep(3)
        scripted_with(port=first.port)
        callers.wait_answered(200)

    assert not callers.failed, "\n".join(callers.failed)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "seconds"), [(signal.SIGTERM, 10), (signal.SIGKILL, 2)])
def test_no_call_fails_while_the_servers_process_is_away(
    serving, tmp_path, how: signal.Signals, seconds: float
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = _at(taken).partition(":")[2]
    with serving(tmp_path, "--port", port) as pair:
        # The default is a minute; a loaded machine may need longer to start a process that imports torch.
        options = ClientOptions(timeout_seconds=None, retry=RetryPolicy(budget_seconds=250))
        callers = Callers(pair.address, options)
        with callers.calling():
            callers.wait_answered(50)
            pair.process.send_signal(how)
            pair.process.wait(60)
            time.sleep(seconds)
            with serving(tmp_path, "--port", port):
                callers.wait_answered(100)

    assert not callers.failed, "\n".join(callers.failed)


PASSAGES = [Passage(str(i), "text") for i in range(200)]  # several messages


async def test_an_upload_waits_for_a_worker_and_each_passage_goes_there_once(scripted_with) -> None:
    first = scripted_with()
    first.server.stop(0).wait()
    own = f"127.0.0.1:{first.port}"
    async with AsyncClient(own, encoder_address=own) as other:
        with Client(own, encoder_address=own) as client, ThreadPoolExecutor(1) as pool:
            stored = pool.submit(lambda: list(client.upsert(iter(PASSAGES), collection="c")))
            others = asyncio.create_task(anext(other.upsert(iter(PASSAGES[:3]), collection="c")))
            await asyncio.sleep(1)
            second = scripted_with(port=first.port)
            assert (await others).passage_id == "0"
            assert len(await asyncio.wrap_future(stored)) == len(PASSAGES)
    assert Counter(second.worker.ids) == Counter(str(i) for i in range(200)) + Counter("012")


def test_an_upload_that_was_begun_is_not_repeated(scripted) -> None:
    scripted.worker.max_messages = 1
    with Client(encoder_address=scripted.address) as client, pytest.raises(Unavailable, match="stopping"):
        list(client.upsert(PASSAGES, collection="c"))
    assert scripted.worker.ids == [str(i) for i in range(64)]


def test_without_a_budget_a_call_is_made_once(scripted, failing) -> None:
    scripted.service.script = [failing(grpc.StatusCode.UNAVAILABLE)]
    once = ClientOptions(retry=RetryPolicy(budget_seconds=0))
    with Client(scripted.address, options=once) as client, pytest.raises(Unavailable, match="because"):
        client.rerank("q", ["a"])
    assert len(scripted.service.requests) == 1


async def test_one_of_several_servers_may_be_down(scripted_with) -> None:
    one, other = scripted_with(), scripted_with()
    addresses = ["127.0.0.1:1", one.address, other.address]
    with Client(addresses, encoder_address=["127.0.0.1:1", one.address]) as client:
        for _ in range(30):
            client.rerank("q", ["a"])
            assert len(list(client.rerank_stream("q", ["a"]))) == 1
            assert len(list(client.upsert([Passage("a", "b")], collection="c"))) == 1
    assert len(one.service.requests) + len(other.service.requests) == 60
    assert min(len(one.service.requests), len(other.service.requests)) >= 20

    async with AsyncClient(addresses) as client:
        await asyncio.gather(*(client.rerank("q", ["a"]) for _ in range(30)))
    assert len(one.service.requests) + len(other.service.requests) == 90


def test_a_server_that_takes_connections_and_says_nothing_is_passed_over(scripted) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, closing(Client([_at(silent), scripted.address])) as client:
        for _ in range(4):
            client.rerank("q", ["a"])
    assert len(scripted.service.requests) == 4


def test_another_server_answers_what_one_rejects(scripted_with, failing) -> None:
    one, other = scripted_with(), scripted_with()
    one.service.script = [failing(grpc.StatusCode.UNAVAILABLE)]
    once = ClientOptions(retry=RetryPolicy(budget_seconds=0))
    with Client([one.address, other.address], options=once) as client:
        for _ in range(10):
            client.rerank("q", ["a"])
    assert (len(one.service.requests), len(other.service.requests)) == (5, 10)


def test_several_servers_that_are_all_down_name_one() -> None:
    once = ClientOptions(retry=RetryPolicy(budget_seconds=0))
    with (
        Client(["127.0.0.1:1", "127.0.0.1:2"], options=once) as client,
        pytest.raises(Unavailable, match=r"^the server at 127.0.0.1:2 could not be reached: nothing listens there$"),
    ):
        client.list_models()
