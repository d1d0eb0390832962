"""Trying again: only what may help, not before the server asked for it, and never without end."""

from __future__ import annotations

import contextlib
import math
import threading
import time

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from hypothesis import given
from hypothesis import strategies as st

from preread import (
    AsyncClient,
    Client,
    ClientOptions,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RetryPolicy,
    Unavailable,
)

FAST = ClientOptions(retry=RetryPolicy(max_attempts=4, first_wait_seconds=0.01))


def hint(seconds: float) -> RetryInfo:
    info = RetryInfo()
    info.retry_delay.FromNanoseconds(int(seconds * 1e9))
    return info


def overloaded(retry_after_seconds: float | None) -> Overloaded:
    return Overloaded("full", retry_after_seconds)


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


def test_attempts_are_bounded(scripted, failing) -> None:
    scripted.service.script = [failing(grpc.StatusCode.UNAVAILABLE)]
    with Client(scripted.address, options=FAST) as client, pytest.raises(Unavailable):
        client.rerank("q", ["a"])

    assert len(scripted.service.requests) == 4


@pytest.mark.parametrize(("code", "error"), [("INVALID_ARGUMENT", InvalidRequest), ("RESOURCE_EXHAUSTED", Overloaded)])
def test_what_would_fail_again_is_not_tried_again(scripted, failing, code: str, error: type[Exception]) -> None:
    """RESOURCE_EXHAUSTED without a hint is a size limit or a quota."""
    scripted.service.script = [failing(grpc.StatusCode[code])]
    with Client(scripted.address, options=FAST) as client, pytest.raises(error):
        client.rerank("q", ["a"])

    assert len(scripted.service.requests) == 1


def test_the_timeout_is_for_all_attempts_together(scripted, failing) -> None:
    scripted.service.script = [failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", hint(0.2))]
    started = time.monotonic()
    with Client(scripted.address) as client, pytest.raises(Overloaded):
        client.rerank("q", ["a"], timeout=0.5)

    assert time.monotonic() - started < 10
    first, *later = scripted.service.remaining
    assert all(remaining < first for remaining in later)


def test_a_server_that_does_not_answer_costs_the_timeout_once(scripted) -> None:
    over = threading.Event()
    scripted.service.script = [lambda request, context: over.wait(60)]
    started = time.monotonic()
    try:
        with Client(scripted.address) as client, pytest.raises(DeadlineExceeded):
            client.rerank("q", ["a"], timeout=0.5)
        assert time.monotonic() - started < 30
    finally:
        over.set()

    assert len(scripted.service.requests) == 1


def test_a_client_whose_calls_all_fail_stops_retrying(scripted, failing) -> None:
    """The budget holds ten failures; retries stop while less than half is left."""
    scripted.service.script = [failing(grpc.StatusCode.UNAVAILABLE)]
    with Client(scripted.address, options=FAST) as client:
        for _ in range(8):
            with pytest.raises(Unavailable):
                client.rerank("q", ["a"])

    assert len(scripted.service.requests) == 8 + 4


def test_successes_fill_the_budget_again(scripted, failing, answering) -> None:
    """Five failures take half of it; twenty successes bring two back, of which one retry is paid."""
    with Client(scripted.address, options=FAST) as client:
        for answer, num_calls in ((failing(grpc.StatusCode.UNAVAILABLE), 2), (answering, 20)):
            scripted.service.script = [answer]
            for _ in range(num_calls):
                with contextlib.suppress(Unavailable):
                    client.rerank("q", ["a"])
        scripted.service.script = [failing(grpc.StatusCode.UNAVAILABLE)]
        scripted.service.requests.clear()
        with pytest.raises(Unavailable):
            client.rerank("q", ["a"])

    assert len(scripted.service.requests) == 2


@given(
    attempt=st.integers(1, 10),
    asked=st.none() | st.integers(0, 10_000).map(lambda n: n / 100),
    remaining=st.just(math.inf) | st.integers(0, 10_000).map(lambda n: n / 100),
)
def test_a_wait_is_bounded_from_both_sides(attempt: int, asked: float | None, remaining: float) -> None:
    policy = RetryPolicy(max_attempts=5, max_wait_seconds=2.0, jitter=0.5)

    wait = policy.wait_seconds(overloaded(asked), attempt, remaining)

    if wait is None:
        assert attempt >= 5 or asked is None or asked > 2.0 or remaining <= asked * 1.5
    else:
        assert asked <= wait <= asked * 1.5
        assert wait < remaining


@pytest.mark.parametrize("bad", [{"max_attempts": 0}, {"jitter": -1.0}, {"max_wait_seconds": -1.0}])
def test_a_policy_names_its_bad_value(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        RetryPolicy(**bad)
