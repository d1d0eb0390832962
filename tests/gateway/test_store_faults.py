"""A Redis that hangs or sends garbage, seen by a caller: bounded in time, and never an internal error."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.redis_server import redis_url
from benchmarks.reliability.redis_wire import Proxy, pass_on

BOUND_SECONDS = 5.0  # of a budget of 0.5; a step outside it takes 30
NAME = "faults"


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with redis_url() as url:
        proxy = Proxy(int(url.rpartition(":")[2]))
        yield proxy
        proxy.close()


@pytest.fixture
def serving(run, proxy, documents):
    """A gateway over the proxy, with a collection of the documents."""
    with run(proxy.url, read_budget_seconds=0.5, max_store_cache_bytes=0) as running:
        passages = [{"id": f"d{i}", "text": text} for i, text in enumerate(documents)]
        running.post(f"/v1/collections/{NAME}/passages", {"passages": passages}).raise_for_status()
        running.ask(documents=None, passage_ids=["d0"], collection=NAME)
        yield running


def hang(proxy: Proxy) -> None:
    proxy.fault = lambda number, reply, send: proxy.closing.wait(60) and False


def garble(proxy: Proxy) -> None:
    proxy.fault = lambda number, reply, send: send(b"\x00garbage \xff" * 7 + b"\r\n") is None


@pytest.mark.parametrize("fault", [hang, garble])
def test_a_redis_that_fails_costs_what_needs_it_and_no_more_than_its_budget(serving, proxy, documents, fault):
    with_text = [{"id": f"d{i}", "text": text} for i, text in enumerate(documents)]
    fault(proxy)
    for path, body, expected in (
        ("/v1/rerank", {"passage_ids": ["d0", "d1"], "collection": NAME}, {200, 503}),
        ("/v1/rerank", {"documents": with_text, "collection": NAME}, {200}),
        ("/v1/rerank", {"documents": documents}, {200}),
        ("/v1/rerank", {"passage_ids": ["d0"], "collection": "never-opened"}, {503}),
    ):
        started = time.monotonic()
        response = serving.post(path, {"query": "q"} | body)
        assert time.monotonic() - started < BOUND_SECONDS, body
        assert response.status_code in expected, response.text
        assert "garbage" not in response.text
    for path in ("/v1/collections", f"/v1/collections/{NAME}", "/v1/aliases", "/metrics"):
        started = time.monotonic()
        response = serving.http.get(path)
        assert time.monotonic() - started < BOUND_SECONDS, path
        assert response.status_code == (200 if path == "/metrics" else 503), response.text
    proxy.fault = pass_on
    time.sleep(1.1)  # the breaker's cooldown
    found = serving.ask(documents=None, passage_ids=["d0", "d1"], collection=NAME)
    assert len(found["results"]) == 2


def test_many_callers_wait_for_a_hanging_redis_together_and_not_in_turn(serving, proxy):
    hang(proxy)
    slowest: list[float] = []

    def ask(i: int) -> None:
        started = time.monotonic()
        serving.post("/v1/rerank", {"query": "q", "passage_ids": ["d0"], "collection": f"unknown{i}"})
        slowest.append(time.monotonic() - started)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(slowest) == 20
    assert max(slowest) < BOUND_SECONDS


def test_what_changes_a_hanging_redis_does_not_hold_up_what_needs_none(serving, proxy, documents):
    hang(proxy)
    passages = {"passages": [{"id": "new", "text": "a passage"}]}
    changes = [("PUT", f"/v1/aliases/a{i}", {"collection": NAME}) for i in range(8)]
    changes += [("POST", f"/v1/collections/new{i}/passages", passages) for i in range(8)]
    threads = [
        threading.Thread(target=serving.http.request, args=(method, path), kwargs={"json": body})
        for method, path, body in changes
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.5)  # they wait now, and have 30 s
    started = time.monotonic()
    serving.ask(documents=documents)
    assert time.monotonic() - started < BOUND_SECONDS
    assert any(thread.is_alive() for thread in threads)
    proxy.closing.set()
    for thread in threads:
        thread.join()


def test_one_damaged_manifest_costs_its_collection_only(serving, proxy, redis_client):
    redis_client.hset("preread:manifests", "damaged", b"{}")
    listed = serving.http.get("/v1/collections").json()["data"]
    assert [one["id"] for one in listed] == [NAME]
    response = serving.post("/v1/rerank", {"query": "q", "passage_ids": ["d0"], "collection": "damaged"})
    assert response.status_code == 400, response.text


@pytest.fixture
def redis_client(proxy):
    import redis

    with redis.Redis(port=proxy.upstream) as client:
        yield client
