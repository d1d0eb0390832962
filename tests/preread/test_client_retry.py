"""Trying again: only what may help, not before the server asked for it, and never without end."""

from __future__ import annotations

import logging
import threading
import time

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from hypothesis import given
from hypothesis import strategies as st

from preread import (
    AsyncClient,
    Cancelled,
    Client,
    ClientOptions,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RetryPolicy,
    Unavailable,
)
from preread.retry import BURST, RETRIES_PER_SECOND, RETRIES_PER_SUCCESS, Throttle
from preread.v1 import rerank_pb2

FAST = ClientOptions(retry=RetryPolicy(first_wait_seconds=0.01))
BRIEF = ClientOptions(retry=RetryPolicy(budget_seconds=1.0, first_wait_seconds=0.01, max_wait_seconds=0.05))


def hint(seconds: float) -> RetryInfo:
    info = RetryInfo()
    info.retry_delay.FromNanoseconds(int(seconds * 1e9))
    return info


def test_it_comes_back_after_the_hint_and_not_before(scripted, failing, answering) -> None:
    scripted.service.script = [failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", hint(0.3)), answering]
    started = time.monotonic()
    with Client(scripted.address) as client:
        assert len(client.rerank("q", ["a", "b"])) == 2

    assert time.monotonic() - started >= 0.3
    assert len(scripted.service.requests) == 2


async def test_the_async_client_comes_back_too(scripted, failing, answering) -> None:
    scripted.service.script = [failing(grpc.StatusCode.UNAVAILABLE), failing(grpc.StatusCode.UNAVAILABLE), answering]
    async with AsyncClient(scripted.address, options=FAST) as client:
        assert len(await client.rerank("q", ["a", "b"])) == 2

    assert len(scripted.service.requests) == 3


def test_attempts_end_with_the_budget(scripted, failing) -> None:
    scripted.service.script = [failing(grpc.StatusCode.UNAVAILABLE)]
    with Client(scripted.address, options=BRIEF) as client, pytest.raises(Unavailable, match="because"):
        client.rerank("q", ["a"])

    assert len(scripted.service.requests) > 1


def test_a_wait_that_may_be_long_is_told_once(scripted, failing, answering, caplog) -> None:
    with Client(scripted.address, options=FAST) as client, caplog.at_level(logging.WARNING, "preread"):
        for _ in range(2):
            scripted.service.script = [failing(grpc.StatusCode.UNAVAILABLE)] * 2 + [answering]
            client.rerank("q", ["a"])

    assert [one.message for one in caplog.records] == [f"{scripted.address}: because; retrying for up to 60 s"]


@pytest.mark.parametrize(("code", "error"), [("INVALID_ARGUMENT", InvalidRequest), ("RESOURCE_EXHAUSTED", Overloaded)])
def test_what_would_fail_again_is_not_tried_again(scripted, failing, code: str, error: type[Exception]) -> None:
    """RESOURCE_EXHAUSTED without a hint is a size limit or a quota."""
    scripted.service.script = [failing(grpc.StatusCode[code])]
    with Client(scripted.address, options=FAST) as client, pytest.raises(error):
        client.rerank("q", ["a"])

    assert len(scripted.service.requests) == 1


def test_the_timeout_is_for_all_attempts_together(scripted, failing) -> None:
    scripted.service.script = [failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", hint(0.2))]
    with Client(scripted.address) as client, pytest.raises(Overloaded):
        client.rerank("q", ["a"], timeout=0.5)

    first, *later = scripted.service.remaining
    assert all(remaining < first for remaining in later)


def test_a_server_that_does_not_answer_costs_the_timeout_once(scripted) -> None:
    over = threading.Event()
    scripted.service.script = [lambda request, context: over.wait(60)]
    try:
        with Client(scripted.address) as client, pytest.raises(DeadlineExceeded, match="time limit") as caught:
            client.rerank("q", ["a"], timeout=0.5)
    finally:
        over.set()

    assert len(scripted.service.requests) == 1
    assert caught.value.request_id == scripted.service.metadata[0]["x-request-id"]


def test_every_attempt_has_the_id_of_the_call(scripted, failing, answering) -> None:
    scripted.service.script = [failing(grpc.StatusCode.UNAVAILABLE), answering]
    with Client(scripted.address, options=FAST) as client:
        found = client.rerank("q", ["a"])

    assert [one["x-request-id"] for one in scripted.service.metadata] == [found.request_id] * 2


def event(index: int) -> rerank_pb2.RerankStreamResponse:
    results = [rerank_pb2.Result(index=index, margin=0, score=0.5, status=1)]
    return rerank_pb2.RerankStreamResponse(batch=rerank_pb2.RerankStreamResponse.Batch(results=results))


async def test_a_stream_is_retried_until_its_first_result(scripted, failing) -> None:
    unavailable = failing(grpc.StatusCode.UNAVAILABLE)

    def breaks(request, context):
        yield event(0)
        yield from unavailable(request, context)

    script = [unavailable, breaks, lambda request, context: [event(1)]]
    scripted.service.script = script[:]
    with Client(scripted.address, options=FAST) as client, client.rerank_stream("q", ["a"]) as stream:
        assert next(stream).index == 0
        with pytest.raises(Unavailable):
            next(stream)
    assert len(scripted.service.requests) == 2

    scripted.service.script = [unavailable, script[2]]
    async with AsyncClient(scripted.address, options=FAST) as client, client.rerank_stream("q", ["a"]) as stream:
        assert [one.index async for one in stream] == [1]


async def test_a_call_of_many_is_retried_as_a_whole(scripted, failing, answering) -> None:
    """Also after some of its messages, since none was given out."""
    unavailable = failing(grpc.StatusCode.UNAVAILABLE)

    def breaks(request, context):
        yield rerank_pb2.RerankManyResponse()
        yield from unavailable(request, context)

    scripted.service.script = [unavailable, breaks, answering]
    with Client(scripted.address, options=FAST) as client:
        found = client.rerank_many(["one", "two"], ["a", "b", "c"])
    assert [len(ranking) for ranking in found] == [3, 3]
    assert {one["x-request-id"] for one in scripted.service.metadata} == {found[1].request_id}

    scripted.service.script = [breaks, answering]
    async with AsyncClient(scripted.address, options=FAST) as other:
        assert await other.rerank_many(["one", "two"], ["a", "b", "c"]) == found
    scripted.service.script = [failing(grpc.StatusCode.INVALID_ARGUMENT)]
    with Client(scripted.address, options=FAST) as client, pytest.raises(InvalidRequest):
        client.rerank_many(["one"], ["a"])


async def test_a_cancelled_stream_says_so_and_is_not_retried(scripted, failing) -> None:
    over = threading.Event()
    scripted.service.script = [lambda request, context: iter([over.wait(60)])]
    try:
        with Client(scripted.address) as client:
            stream = client.rerank_stream("q", ["a"])
            stream.cancel()
            with pytest.raises(Cancelled, match="the call was cancelled"):
                list(stream)
        async with AsyncClient(scripted.address) as other:
            stream = other.rerank_stream("q", ["a"])
            stream.cancel()
            with pytest.raises(Cancelled, match="the call was cancelled"):
                _ = [one async for one in stream]
    finally:
        over.set()


def test_many_calls_of_a_service_in_trouble_send_few_retries(scripted, failing) -> None:
    """Each would send about six in the time: it has the time for its turn of the throttle, and no more."""
    scripted.service.script = [failing(grpc.StatusCode.UNAVAILABLE)]
    num_calls, started = 40, time.monotonic()
    with Client(scripted.address, options=BRIEF) as client:

        def call() -> None:
            with pytest.raises(Unavailable):
                client.rerank("q", ["a"])

        threads = [threading.Thread(target=call) for _ in range(num_calls)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()

    elapsed = time.monotonic() - started
    assert len(scripted.service.requests) <= num_calls + BURST + elapsed * RETRIES_PER_SECOND + 1


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 20)), max_size=60))
def test_turns_of_a_throttle_keep_the_rate(steps: list[tuple[float, int]]) -> None:
    """Of retries that all want to be immediate, no more have a turn by any time than burst, rate and successes give."""
    throttle, now, turns, num_successes = Throttle(), 0.0, [], 0
    for pause, successes in steps:
        now += pause
        for _ in range(successes):
            throttle.succeeded()
        num_successes += successes
        turns.append(now + throttle.wait_seconds(0.0, now, float("inf")))
    for turn in turns:
        most = BURST + RETRIES_PER_SECOND * turn + RETRIES_PER_SUCCESS * num_successes
        assert sum(one <= turn for one in turns) <= most + 1


def test_a_turn_that_comes_too_late_is_not_taken() -> None:
    throttle = Throttle()
    waits = [throttle.wait_seconds(0.0, 0.0, 1.0) for _ in range(100)]
    assert sum(wait < 1.0 for wait in waits) == BURST + RETRIES_PER_SECOND
    assert throttle.wait_seconds(0.5, 100.0, 1.0) == 0.5  # a quiet while later nothing is owed


@given(attempt=st.integers(1, 2000), asked=st.none() | st.integers(0, 10_000).map(lambda n: n / 100))
def test_a_wait_is_bounded_from_both_sides(attempt: int, asked: float | None) -> None:
    policy = RetryPolicy(first_wait_seconds=0.1, max_wait_seconds=2.0, jitter=0.5)
    error = Unavailable.received("away", retry_after_seconds=asked)

    least = asked if asked is not None else min(2.0, 0.1 * 2 ** min(attempt - 1, 9))
    assert least <= policy.wait_seconds(error, attempt) <= least * 1.5
    assert policy.may_help(error)


@pytest.mark.parametrize("bad", [{"budget_seconds": -1}, {"jitter": -1.0}, {"max_wait_seconds": -1.0}])
def test_a_policy_names_its_bad_value(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        RetryPolicy(**bad)
