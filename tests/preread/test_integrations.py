"""preread.integrations without a framework: plain functions, lists that are split, settings, what is imported."""

from __future__ import annotations

import asyncio
import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from preread import AsyncClient, Candidate, Client, FailedPrecondition, InvalidRequest, Passage
from preread.integrations.functions import NotScored, arank, rank, rank_many
from preread.integrations.ranker import Limits, Ranker, sortable_scores, split

ROOT = Path(__file__).parents[2]
MODULES = ("langchain", "llamaindex", "haystack", "lancedb", "pyterrier", "mteb")
QUERY = "why is the sky blue"
TEXTS = [f"Colour {i}: the sky is {name}." for i, name in enumerate(("blue", "red", "grey", "black", "white", "pink"))]
IDS = [f"p{i}" for i in range(len(TEXTS))]


@pytest.fixture(scope="module")
def narrow(serving, tmp_path_factory) -> Iterator[str]:
    """The address of a server that takes four candidates a request, with the texts as a collection at ratio 4."""
    with serving(tmp_path_factory.mktemp("narrow"), "--max-candidates", "4") as pair:
        with Client(pair.address, encoder_address=pair.encoder_address) as client:
            passages = [Passage(*pair) for pair in zip(IDS, TEXTS, strict=True)]
            list(client.upsert(passages, collection="narrow", compression_ratio=4))
        yield pair.address


@pytest.fixture(scope="module")
def each(narrow: str) -> list[tuple[int, float]]:
    """The ranking of the texts, each scored by a request for it alone."""
    with Client(narrow) as client:
        scores = [client.rerank(QUERY, [text])[0].score for text in TEXTS]
    return sorted(enumerate(scores), key=lambda pair: -pair[1])


def close(ranked: list[tuple[int, float | None]], other: list[tuple[int, float | None]]) -> bool:
    return [i for i, _ in ranked] == [i for i, _ in other] and [s for _, s in ranked] == pytest.approx(
        [s for _, s in other], abs=1e-5
    )


@pytest.mark.parametrize("top_n", [None, 0, 1, 5, 99])
async def test_a_list_over_the_servers_limit_is_ranked_as_one(narrow, each, top_n) -> None:
    assert close(rank(QUERY, TEXTS, client=narrow, top_n=top_n), each[: top_n or None])
    assert close(await arank(QUERY, TEXTS, client=narrow, top_n=top_n), each[: top_n or None])


def test_without_splitting_the_server_refuses_it(narrow) -> None:
    with Client(narrow) as client, pytest.raises(InvalidRequest, match="candidates"):
        client.rerank(QUERY, TEXTS)


async def test_clients_and_objects_with_their_method_are_taken(narrow, each) -> None:
    class Through:  # as an object in this process: no limits that it would tell
        def __init__(self, client: Client) -> None:
            self.rerank = client.rerank

    with Client(narrow) as client:
        assert close(rank(QUERY, TEXTS, client=client), each)
        assert close(await arank(QUERY, TEXTS, client=client), each)
        assert len(rank(QUERY, TEXTS[:4], client=Through(client))) == 4
        assert close(rank(QUERY, TEXTS, client=client), each)  # it is open: its caller closes it
    async with AsyncClient(narrow) as client:
        assert close(await arank(QUERY, TEXTS, client=client), each)
        with pytest.raises(TypeError, match="client is async; expected a Client, an object like it, or an address"):
            rank(QUERY, TEXTS, client=client)


def test_an_async_ranker_serves_several_event_loops(narrow, each) -> None:
    ranker = Ranker(narrow)
    candidates = [Candidate(text=text) for text in TEXTS]

    async def many() -> list[list[tuple[int, float | None]]]:
        rankings = await asyncio.gather(*(ranker.arank(QUERY, candidates) for _ in range(4)))
        return [[(one.index, one.score) for one in ranking] for ranking in rankings]

    for _ in range(3):
        assert all(close(one, each) for one in asyncio.run(many()))


def test_several_queries_are_ranked_at_once(narrow, each) -> None:
    rankings = rank_many([(QUERY, TEXTS), ("red", TEXTS[:2]), ("none", [])], client=narrow)

    assert close(rankings[0], each)
    assert [len(one) for one in rankings] == [6, 2, 0]


def test_ids_stand_for_texts_and_unknown_ones_fall_back(narrow, each) -> None:
    settings = {"client": narrow, "collection": "narrow"}
    by_id = rank(QUERY, [None] * len(TEXTS), ids=IDS, **settings)
    assert [index for index, _ in by_id] == [index for index, _ in each]
    assert close(rank(QUERY, TEXTS, ids=IDS, **settings), by_id)
    mixed = rank(QUERY, TEXTS, ids=[*IDS[:4], "unknown", None], **settings)
    assert sorted(index for index, _ in mixed) == list(range(len(TEXTS)))
    with pytest.raises(NotScored, match=r"1 of 6 candidates could not be scored; candidates\[4\] \(id 'gone'\) is"):
        rank(QUERY, [None] * len(TEXTS), ids=[*IDS[:4], "gone", "p5"], **settings)
    with pytest.raises(NotScored, match="is missing"):
        rank(QUERY, TEXTS, ids=[*IDS[:4], "gone", "p5"], send_text=False, **settings)


def test_a_cascade_over_parts_ranks_what_reached_the_end_first(narrow) -> None:
    ranker = Ranker(narrow, collection="narrow", stages="8:2,4")

    results = ranker.rank(QUERY, [Candidate(one) for one in IDS])

    assert [len(one.stages) for one in results] == [2, 2, 2, 2, 1, 1]
    scores = sortable_scores(results)
    assert scores == sorted(scores, reverse=True)


def test_what_cannot_be_scored_is_said_or_last(narrow) -> None:
    texts = ["", *TEXTS[:4], ""]
    with pytest.raises(NotScored) as caught:
        rank(QUERY, texts, client=narrow)
    assert [one.index for one in caught.value.results] == [0, 5]
    assert [one.index for one in pickle.loads(pickle.dumps(caught.value)).results] == [0, 5]
    ranked = rank(QUERY, texts, client=narrow, on_unscored="last")
    assert ranked[-2:] == [(0, None), (5, None)]
    many = ["", "", "", "", ""]
    with pytest.raises(NotScored, match=r"5 of 5 .*candidates\[2\] is failed: [^;]*; and 2 more; on_unscored=\"last\""):
        rank(QUERY, many, client=narrow)


def test_an_error_of_a_later_part_says_where_it_begins(narrow) -> None:
    ids = [*IDS[:5], "gone"]
    with pytest.raises(FailedPrecondition, match=r"candidates\[1\]") as caught:
        rank(QUERY, [None] * 6, ids=ids, client=narrow, collection="narrow", on_miss="fail")
    assert caught.value.__notes__ == ["candidates[0] of this request is candidates[4] of the list, which was split"]


def test_options_of_a_call_come_before_the_settings(narrow) -> None:
    ranker, candidates = Ranker(narrow, instruction="Find colours."), [Candidate(text=TEXTS[0])]
    ours, none, other = (
        ranker.rank(QUERY, candidates, **more)[0].margin
        for more in ({}, {"instruction": None}, {"instruction": "Find names."})
    )
    assert ours == none != other


def test_nothing_to_rank_is_no_request() -> None:
    assert rank(QUERY, [], client="127.0.0.1:1") == []
    assert asyncio.run(arank(QUERY, [], client="127.0.0.1:1")) == []


def test_parts_hold_what_a_request_may() -> None:
    candidates = [Candidate(text="x" * n) for n in (3, 3, 3, 9, 1, 1)]

    def starts(limits: Limits | None) -> list[tuple[int, int]]:
        return [(start, len(some)) for start, some in split(candidates, limits)]

    assert starts(None) == [(0, 6)]
    assert starts(Limits(4, 100)) == [(0, 4), (4, 2)]
    assert starts(Limits(4, 6)) == [(0, 2), (2, 1), (3, 1), (4, 2)]  # one over the limit goes alone
    assert starts(Limits(6, 100)) == [(0, 6)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"client": "nowhere"}, "client is 'nowhere'; expected host:port"),
        (
            {"client": object()},
            "client is an object .*; expected host:port, a list, or an object with the method rerank",
        ),
        ({"on_unscored": "drop"}, r"on_unscored is a str \('drop'\); expected 'raise' or 'last'"),
        ({"send_text": False}, "send_text is False, but collection is not set"),
        ({"send_text": 1}, r"send_text is an int \(1\); expected True or False"),
        ({"id_key": "key"}, "id_key is 'key', but collection is not set"),
        ({"top_m": 1}, r"unknown arguments \['top_m'\]; known: \['client_options', 'collection'"),
        ({"ids": ["p1"]}, "ids is set, but collection is not"),
        ({"ids": ["p1"], "collection": "docs"}, "ids has 1 entries; expected 2, one for each text"),
        (
            {"ids": ["p1", 2.0], "collection": "docs"},
            r"texts\[1\].id is a float \(2.0\); expected a string or an integer",
        ),
    ],
)
def test_settings_are_checked(settings, said) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        rank(QUERY, ["a", "b"], **settings)


def test_texts_are_checked() -> None:
    with pytest.raises(TypeError, match="texts is a string; expected a list of strings"):
        rank(QUERY, "a text")
    with pytest.raises(TypeError, match=r"text of texts\[1\] is None; expected a string"):
        rank(QUERY, ["a", None])


def test_a_client_has_its_options_in_it(narrow) -> None:
    with Client(narrow) as client, pytest.raises(ValueError, match="client_options is set, but client is no address"):
        Ranker(client, client_options=object())


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_framework_is_named_with_its_extra(name: str) -> None:
    """In a process that finds no package but the client's own."""
    top = {"langchain": "langchain_core", "llamaindex": "llama_index"}.get(name, name)
    if importlib.util.find_spec(top) is not None:
        pytest.skip(f"{top} is in this environment")
    with pytest.raises(ImportError, match=rf"preread.integrations.{name} .*pip install 'preread\[{name}\]'"):
        importlib.import_module(f"preread.integrations.{name}")


def test_functions_import_no_framework() -> None:
    others = ("langchain_core", "llama_index", "haystack", "lancedb", "pyterrier", "mteb", "pydantic", "numpy", "torch")
    check = f"import preread.integrations.functions, sys; print([n for n in {others} if n in sys.modules])"
    said = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "[]"
