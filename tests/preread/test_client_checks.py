"""Arguments of the clients: whatever a message cannot carry is an error that names the field, before it is sent."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from preread import (
    AsyncClient,
    Candidate,
    Client,
    ClientOptions,
    InvalidRequest,
    Passage,
    PrereadError,
    RetryPolicy,
    Stage,
)

HALF = "half \ud83d of a pair"


class Row(NamedTuple):
    text: str
    id: str


@pytest.fixture
def client(scripted):
    with Client(scripted.address, encoder_address=scripted.address) as client:
        yield client


def _calls(client: Any) -> dict[str, Callable[..., Any]]:
    """Every call with one argument to fill in, by the name an error must have."""
    return {
        "query": lambda bad: client.rerank(bad, ["a"]),
        "candidates[1]": lambda bad: client.rerank("q", ["a", bad]),
        "candidates[0].text": lambda bad: client.rerank("q", [Candidate(text=bad)]),
        "candidates[0].passage_id": lambda bad: client.rerank("q", [Candidate(bad)], collection="c"),
        "candidates[0].title": lambda bad: client.rerank("q", [{"text": "a", "title": bad}]),
        "instruction": lambda bad: client.rerank("q", ["a"], instruction=bad),
        "collection": lambda bad: client.rerank("q", ["a"], collection=bad),
        "model": lambda bad: client.rerank_stream("q", ["a"], model=bad),
        "stages": lambda bad: client.rerank("q", ["a"], stages=bad),
        "on_miss": lambda bad: client.rerank("q", ["a"], on_miss=bad),
        "passage_ids[0]": lambda bad: client.warm([bad], collection="c"),
        "passage_ids[1]": lambda bad: client.delete(["a", bad], collection="c"),
        "passages[1].text": lambda bad: list(client.upsert([Passage("a", "b"), Passage("c", bad)], collection="c")),
        "passages[0].passage_id": lambda bad: list(client.upsert([Passage(bad, "b")], collection="c")),
        "passages[0].id": lambda bad: list(client.upsert([{"id": bad, "text": "b"}], collection="c")),
        "codec": lambda bad: client.upsert([Passage("a", "b")], collection="c", codec=bad),
        "address": lambda bad: Client(f"{bad}:1"),
        "encoder_address": lambda bad: AsyncClient(encoder_address=f"{bad}:1"),
        "api_key": lambda bad: ClientOptions(api_key=bad),
    }  # fmt: skip


@pytest.mark.parametrize("field", list(_calls(None)))
def test_half_a_surrogate_pair_anywhere_is_an_error_that_names_the_field(client, scripted, field: str) -> None:
    with pytest.raises(PrereadError) as caught:
        _calls(client)[field](HALF)

    assert isinstance(caught.value, InvalidRequest)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert field in str(caught.value)
    str(caught.value).encode()  # can itself be shown
    assert scripted.service.requests == []


def test_half_a_surrogate_pair_in_metadata_too(client) -> None:
    for bad in ({"x-id": HALF}, {HALF: "x"}, {"x-id": "two\nlines"}):
        with (
            Client("127.0.0.1:1", options=ClientOptions(metadata=bad)) as other,
            pytest.raises(InvalidRequest) as caught,
        ):
            other.list_models()
        assert "metadata" in str(caught.value)
        assert "lines" not in str(caught.value)  # it may be a secret


WRONG = [
    ("query", lambda c: c.rerank(None, ["a"])),
    ("query", lambda c: c.rerank(b"q", ["a"])),
    ("candidates", lambda c: c.rerank("q", "one string")),
    ("candidates", lambda c: c.rerank("q", None)),
    ("candidates", lambda c: c.rerank("q", {"id": "text"})),
    ("candidates[0]", lambda c: c.rerank("q", [b"bytes"])),
    ("candidates[0]", lambda c: c.rerank("q", [("id", "text")])),
    ("candidates[0]", lambda c: c.rerank("q", [1])),
    ("candidates[0]", lambda c: c.rerank("q", [float("nan")])),
    ("candidates[0]", lambda c: c.rerank("q", [{"title": "t"}])),
    ("candidates[0]", lambda c: c.rerank("q", [{"text": "t", "body": "b"}])),
    ("candidates[0].id", lambda c: c.rerank("q", [{"id": 1.0}], collection="c")),
    ("top_n", lambda c: c.rerank("q", ["a"], top_n="3")),
    ("top_n", lambda c: c.rerank("q", ["a"], top_n=True)),
    ("compression_ratio", lambda c: c.rerank("q", ["a"], compression_ratio=1.5)),
    ("return_text", lambda c: c.rerank("q", ["a"], return_text="no")),
    ("stages[0]", lambda c: c.rerank("q", ["a"], stages=[4])),
    ("stages[0].keep", lambda c: c.rerank("q", ["a"], stages=[Stage(4, "x")])),
    ("timeout", lambda c: c.rerank("q", ["a"], timeout="5")),
    ("timeout", lambda c: c.list_models(timeout=[1])),
    ("passage_ids", lambda c: c.warm("abc", collection="c")),
    ("passage_ids[0]", lambda c: c.delete([1], collection="c")),
    ("collection", lambda c: c.stats(3)),
    ("collection", lambda c: c.upsert([], collection=None)),
    ("store_text", lambda c: c.upsert([], collection="c", store_text="no")),
    ("address", lambda c: Client(None)),
    ("api_key", lambda c: ClientOptions(api_key=b"key")),
    ("timeout_seconds", lambda c: ClientOptions(timeout_seconds="5")),
    ("max_attempts", lambda c: RetryPolicy(max_attempts="3")),
    ("jitter", lambda c: RetryPolicy(jitter=None)),
]  # fmt: skip


@pytest.mark.parametrize(("field", "call"), WRONG)
def test_another_type_is_a_type_error_that_names_the_field(client, scripted, field: str, call: Any) -> None:
    with pytest.raises(TypeError, match=f"^{field.replace('[', '.').replace(']', '.')} (is|has)"):
        call(client)
    assert scripted.service.requests == []


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), 1e300])
def test_a_timeout_that_no_clock_can_keep_is_refused(client, timeout: float) -> None:
    with pytest.raises(InvalidRequest, match=r"^timeout is (float|int)"):
        client.list_models(timeout=timeout)


@pytest.mark.parametrize("field", ["top_n", "compression_ratio"])
def test_an_integer_beyond_the_wire_is_refused(client, field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} is int 2147483648"):
        client.rerank("q", ["a"], **{field: 1 << 31})


NO_PASSAGES = [
    "one string", b"bytes", {"id": "text"}, None, 3, SimpleNamespace(id="a", text="b"),
]  # fmt: skip
NO_PASSAGE = [
    "ab", b"ab", ["id", "text"], {"id", "text"}, Row("text", "id"), ("a", "b"), ("a",), ("a", "b", "c"), 1, 1.5, None,
    {"id": "a"}, {"text": "b"}, {"id": "a", "text": None}, {"id": "a", "text": "b", "body": "c"}, {},
    {"id": "a", "_id": "b", "text": "c"}, {"id": 1.5, "text": "b"}, {"id": True, "text": "b"}, {"id": "a", "text": 3},
    {"id": "a", "text": "b", "title": 3}, ("a", 3), (3, "a"), (None, "a"), Passage("a", None), Candidate("a", "b"),
    np.array(["a", "b"]), np.float64(3), float("nan"),
]  # fmt: skip


@pytest.mark.parametrize("bad", NO_PASSAGES, ids=repr)
def test_upsert_refuses_what_is_no_list_of_passages(client, bad: Any) -> None:
    with pytest.raises(TypeError, match=r"^passages is"):
        client.upsert(bad, collection="c")


@pytest.mark.parametrize("bad", NO_PASSAGE, ids=repr)
async def test_upsert_refuses_what_is_no_passage_by_its_index(client, scripted, bad: Any) -> None:
    with pytest.raises(TypeError, match=r"^passages\[1\]"):
        list(client.upsert(iter([Passage("a", "b"), bad]), collection="c"))

    async def source() -> Any:
        yield {"id": "a", "text": "b"}
        yield bad

    async with AsyncClient(scripted.address, encoder_address=scripted.address) as other:
        with pytest.raises(TypeError, match=r"^passages\[1\]"):
            _ = [one async for one in other.upsert(source(), collection="c")]
