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
    TlsFiles,
    parse_stages,
)

HALF = "half \ud83d of a pair"


class DataFrame:
    """As pandas' and polars': iterating gives names of columns."""

    def __iter__(self):
        return iter(["id", "text"])


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
        "queries[1]": lambda bad: client.rerank_many(["q", bad], ["a"]),
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
        with pytest.raises(InvalidRequest) as at_once:
            ClientOptions(metadata=bad)
        options = ClientOptions(metadata=lambda: bad)  # noqa: B023 - called here
        with Client("127.0.0.1:1", options=options) as other, pytest.raises(InvalidRequest) as caught:
            other.list_models()
        assert str(at_once.value) == str(caught.value)
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
    ("candidates", lambda c: c.rerank("q", 3)),
    ("candidates", lambda c: c.rerank("q", b"bytes")),
    ("candidates", lambda c: c.rerank("q", Candidate("a"))),
    ("candidates", lambda c: c.rerank("q", np.array("0-dimensional"))),
    ("candidates", lambda c: c.rerank("q", DataFrame())),
    ("candidates[0]", lambda c: c.rerank("q", np.array([[1, 2], [3, 4]]))),
    ("candidates[1]", lambda c: c.rerank("q", (one for one in ("a", 3)))),
    ("candidates[1]", lambda c: c.rerank("q", ["a", Candidate()])),
    ("candidates[1]", lambda c: c.rerank("q", ["a", None])),
    ("candidates[0]", lambda c: c.rerank("q", [{}])),
    ("candidates[0]", lambda c: c.rerank("q", [{"id": None, "text": None}])),
    ("candidates[0].text", lambda c: c.rerank("q", [Candidate(text=3)])),
    ("candidates[0].passage_id", lambda c: c.rerank("q", [Candidate(3)], collection="c")),
    ("collection", lambda c: c.rerank("q", ["a"], collection=3)),
    ("collection", lambda c: c.rerank("q", ["a"], collection=np.array(["a", "b"]))),
    ("collection", lambda c: c.rerank_stream("q", ["a"], collection=b"c")),
    ("queries", lambda c: c.rerank_many("q", ["a"])),
    ("queries[0]", lambda c: c.rerank_many([1], ["a"])),
    ("candidates", lambda c: c.rerank_many(["q"], "a")),
    ("instruction", lambda c: c.warm(["a"], collection="c", instruction=3)),
    ("on_miss", lambda c: c.rerank("q", ["a"], on_miss=3)),
    ("model", lambda c: c.rerank("q", ["a"], model=3)),
    ("page_size", lambda c: c.list_passages("c", page_size="all")),
    ("timeout", lambda c: c.list_passages("c", timeout="5")),
    ("timeout", lambda c: c.upsert([], collection="c", timeout="5")),
    ("stages", lambda c: c.rerank("q", ["a"], stages=4)),
    ("stages", lambda c: c.rerank("q", ["a"], stages=0)),
    ("stages", lambda c: c.rerank("q", ["a"], stages=b"4")),
    ("stages", lambda c: c.rerank("q", ["a"], stages=Stage(4))),
    ("stages[0]", lambda c: c.rerank("q", ["a"], stages=np.array([4, 2]))),
    ("stages[1]", lambda c: c.rerank("q", ["a"], stages=[Stage(8, 2), (4, 0)])),
    ("stages", lambda c: parse_stages(4)),
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
    ("address", lambda c: Client(50051)),
    ("address[1]", lambda c: Client(["a:1", 2])),
    ("encoder_address[0]", lambda c: AsyncClient(encoder_address=[None])),
    ("api_key", lambda c: ClientOptions(api_key=b"key")),
    ("timeout_seconds", lambda c: ClientOptions(timeout_seconds="5")),
    ("budget_seconds", lambda c: RetryPolicy(budget_seconds="3")),
    ("retry", lambda c: ClientOptions(retry=3)),
    ("tls", lambda c: ClientOptions(tls="ca.pem")),
    ("metadata", lambda c: ClientOptions(metadata=[("a", "b")])),
    ("options", lambda c: Client(options={"timeout_seconds": 5})),
    ("ca_file", lambda c: TlsFiles(ca_file=b"ca.pem").credentials()),
    ("jitter", lambda c: RetryPolicy(jitter=None)),
]  # fmt: skip


@pytest.mark.parametrize(("field", "call"), WRONG)
def test_another_type_is_a_type_error_that_names_the_field(client, scripted, field: str, call: Any) -> None:
    with pytest.raises(TypeError, match=f"^{field.replace('[', '.').replace(']', '.')} (is|has)"):
        call(client)
    assert scripted.service.requests == []


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), 1e300])
def test_a_timeout_that_no_clock_can_keep_is_refused(client, timeout: float) -> None:
    with pytest.raises(InvalidRequest, match=r"^timeout is an? (float|int)"):
        client.list_models(timeout=timeout)


@pytest.mark.parametrize("field", ["top_n", "compression_ratio"])
def test_an_integer_beyond_the_wire_is_refused(client, field: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"{field} is an int \(2147483648\)"):
        client.rerank("q", ["a"], **{field: 1 << 31})


SHOWN = [
    ([3], "candidates[0] is an int (3); expected a str, a Candidate, or a mapping {id, text}"),
    (["a", None], "candidates[1] is None; expected a str, a Candidate, or a mapping {id, text}"),
    (["a", Candidate()], "candidates[1] has neither id nor text"),
    ([{"id": None}], "candidates[0] has neither id nor text; found id (None)"),
    ("one string", "candidates is a str ('one string'); expected a list"),
    (DataFrame(), "candidates is a DataFrame, which would give names of columns; "
     "expected a list, such as frame.to_dict('records')"),
]  # fmt: skip


@pytest.mark.parametrize(("candidates", "said"), SHOWN, ids=[said for _, said in SHOWN])
def test_an_error_says_what_was_given_and_what_is_expected(client, candidates: Any, said: str) -> None:
    with pytest.raises(TypeError) as caught:
        client.rerank("q", candidates)
    assert str(caught.value) == said


def test_arrays_of_strings_are_lists_of_them(client, scripted) -> None:
    client.rerank(np.str_("q"), np.array(["a", "b"]), top_n=np.int64(1), timeout=np.float64(30))
    assert [one.text for one in scripted.service.requests[0].candidates] == ["a", "b"]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ([], "address"),
        ("a", "address"),
        (["a:1", "b"], "address[1]"),
        ("a:1,b:2", "address"),
        (["a:1", ""], "address[1]"),
    ],
)
def test_a_bad_address_is_named(bad: Any, field: str) -> None:
    for name, make in (("", lambda: Client(bad)), ("encoder_", lambda: AsyncClient(encoder_address=bad))):
        with pytest.raises(InvalidRequest) as caught:
            make()
        assert caught.value.violations[0].field == f"{name}{field}"


def test_a_file_that_cannot_be_read_is_named(tmp_path) -> None:
    with pytest.raises(InvalidRequest, match=r"^ca_file is '.*none.pem'; expected a file that can be read$"):
        Client(options=ClientOptions(tls=TlsFiles(tmp_path / "none.pem")))


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
