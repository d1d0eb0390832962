"""The clients against both halves in a process of their own."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from preread import AsyncClient, Candidate, Client, FailedPrecondition, InvalidRequest, NotFound, Passage
from preread_edge.grpc_server import MAX_FIELDS

PASSAGES = {
    "sky": "The sky is blue because air scatters short waves more than long ones.",
    "grass": "Grass is green because chlorophyll absorbs red and blue light.",
    "sea": "The sea takes the colour of the sky above it.",
    "night": "At night the sky is black.",
    "long": "A passage that goes on and on. " * 20,
}
QUERY = "why is the sky blue"


@pytest.fixture(scope="module")
def client(server_pair):
    with Client(server_pair.address, encoder_address=server_pair.encoder_address) as client:
        yield client


@pytest.fixture(scope="module")
def collection(client) -> str:
    acknowledged = list(client.upsert([Passage(*pair) for pair in PASSAGES.items()], collection="client-tests"))
    assert {one.passage_id for one in acknowledged if one.status in ("stored", "unchanged")} == set(PASSAGES)
    return "client-tests"


def without_times(summary):
    return dataclasses.replace(summary, timings=None)


def check_same(results, expected) -> None:
    """The same results by candidate, in whatever order; the server may go on from what it kept of an earlier request,
    which moves the last digits of margins and scores."""
    found, wanted = ({r.index: r for r in one} for one in (results, expected))
    assert found.keys() == wanted.keys()
    for index, result in found.items():
        assert result.margin == pytest.approx(wanted[index].margin, abs=1e-5)
        assert result.score == pytest.approx(wanted[index].score, abs=1e-5)
        assert dataclasses.replace(result, margin=wanted[index].margin, score=wanted[index].score) == wanted[index]


def test_ids_texts_and_both_are_scored_alike(client, collection) -> None:
    by_id = client.rerank(QUERY, list(PASSAGES), collection=collection)
    by_text = client.rerank(QUERY, list(PASSAGES.values()))
    both = client.rerank(QUERY, [Candidate(*item) for item in PASSAGES.items()], collection=collection)

    assert [r.status for r in by_id] == ["hit"] * 5
    assert [r.status for r in by_text] == ["hit"] * 5
    assert {(r.index, r.found_id) for r in by_text} == set(enumerate(PASSAGES))
    assert (by_text.summary.num_looked_up, by_text.summary.num_found) == (5, 5)
    assert by_id[0].found_in == ""
    assert [(r.passage_id, r.status) for r in both] == [(r.passage_id, r.status) for r in by_id]
    check_same(both, by_id)
    margins = {r.index: r.margin for r in by_id}
    assert {r.index: r.margin for r in by_text} == pytest.approx(margins, abs=0.05)


def test_the_best_come_first_and_top_n_cuts(client, collection) -> None:
    every = client.rerank(QUERY, list(PASSAGES), collection=collection, return_text=True)
    two = client.rerank(QUERY, list(PASSAGES), collection=collection, top_n=2)

    scores = [r.score for r in every]
    assert scores == sorted(scores, reverse=True)
    assert [r.passage_id for r in two] == [r.passage_id for r in every][:2]
    assert all(r.text == PASSAGES[r.passage_id] for r in every)
    assert two[0].text is None
    assert two.summary.num_scored == len(every) == 5


def test_what_is_not_stored_costs_itself_only(client, collection) -> None:
    answer = client.rerank(QUERY, ["sky", "nothing"], collection=collection, on_miss="skip")

    assert [(r.passage_id, r.status) for r in answer] == [("sky", "hit"), ("nothing", "missing")]
    assert answer[1].score is None
    with pytest.raises(FailedPrecondition, match="nothing"):
        client.rerank(QUERY, ["sky", "nothing"], collection=collection, on_miss="fail")


def test_a_stream_gives_the_same_results_in_some_order(client, collection) -> None:
    stream = client.rerank_stream(QUERY, list(PASSAGES), collection=collection)
    check_same(stream, client.rerank(QUERY, list(PASSAGES), collection=collection))
    assert stream.summary is not None
    assert stream.summary.num_scored == 5


async def test_the_async_client_answers_the_same(server_pair, client, collection) -> None:
    async with AsyncClient(server_pair.address, encoder_address=server_pair.encoder_address) as other:
        answer, models, collections, info, stats = await asyncio.gather(
            other.rerank(QUERY, list(PASSAGES), collection=collection),
            other.list_models(),
            other.list_collections(),
            other.describe(),
            other.stats(collection),
        )
        stream = other.rerank_stream(QUERY, list(PASSAGES), collection=collection)
        streamed = [result async for result in stream]

    again = client.rerank(QUERY, list(PASSAGES), collection=collection)
    check_same(answer, again)
    assert without_times(answer.summary) == without_times(again.summary)
    assert models == client.list_models()
    assert collection in {one.name for one in collections}
    assert info == client.describe()
    assert stats == client.stats(collection)
    check_same(streamed, answer)
    assert stream.summary is not None


async def test_many_queries_are_answered_as_one_by_one(server_pair, client, collection) -> None:
    queries = [QUERY, "grass", "a longer question about the colour of the sea at night", QUERY]
    candidates, options = [*PASSAGES, "nothing", "sky"], {"collection": collection, "top_n": 3, "return_text": True}
    found = client.rerank_many(iter(queries), candidates, **options)
    async with AsyncClient(server_pair.address) as other:
        again = await other.rerank_many(queries, candidates, **options)
    for query, *answers in zip(queries, found, again, strict=True):
        alone = client.rerank(query, candidates, **options)
        for answer in answers:
            check_same(answer, alone)
            assert without_times(answer.summary) == without_times(alone.summary)
    assert len({answer.request_id for answer in found}) == 1
    with pytest.raises(InvalidRequest, match=r"queries\[1\] is ''; expected a query that is not empty"):
        client.rerank_many(["fine", ""], candidates, collection=collection)


def test_one_client_serves_many_threads(client, collection) -> None:
    alone = client.rerank(QUERY, list(PASSAGES), collection=collection).results
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda _: client.rerank(QUERY, list(PASSAGES), collection=collection), range(32))
        for answer in answers:
            assert [r.index for r in answer] == [r.index for r in alone]


def test_upserts_are_acknowledged_once_each_and_repeat_for_free(client) -> None:
    passages = [Passage(f"p{i}", f"Passage number {i}.") for i in range(200)]

    first = list(client.upsert(iter(passages), collection="client-upserts"))
    again = list(client.upsert([*passages, Passage("empty", " ")], collection="client-upserts"))

    assert sorted(one.passage_id for one in first) == sorted(p.passage_id for p in passages)
    assert {one.status for one in first} == {"stored"}
    assert {one.passage_id: one.status for one in again} == {p.passage_id: "unchanged" for p in passages} | {
        "empty": "refused"
    }
    (info,) = client.stats("client-upserts")
    assert info.num_passages == 200
    assert info.stores_text
    # More ids than one message may have, the stored ones at both ends.
    many = ["p0", *(f"never-{i}" for i in range(MAX_FIELDS + 1)), "p1"]
    assert client.delete(many, collection="client-upserts") == 2
    assert client.delete([], collection="client-upserts") == 0
    assert client.stats("client-upserts")[0].num_passages == 198


async def test_async_upserts_take_passages_from_both_kinds_of_iterables(server_pair) -> None:
    async def source():
        for i in range(3):
            yield Passage(f"a{i}", f"Number {i}.")

    async with AsyncClient(server_pair.address, encoder_address=server_pair.encoder_address) as client:
        first = [one async for one in client.upsert(source(), collection="client-async")]
        again = [one async for one in client.upsert([{"id": "a0", "text": "Number 0."}], collection="client-async")]
        assert await client.delete((f"a{i}" for i in range(10_001)), collection="client-async") == 3

    assert [one.status for one in first] == ["stored"] * 3
    assert [one.status for one in again] == ["unchanged"]


def test_mappings_and_values_are_stored_as_index_reads_them(client) -> None:
    passages = [
        {"id": "a", "text": "A mapping."},
        {"_id": 7, "title": "Title", "text": "and text"},
        {"passage_id": np.str_("n"), "title": None, "text": np.str_("of numpy")},
        Passage("p", "A value."),
        {"id": "a", "text": "The same id again."},
    ]
    told = list(client.upsert(passages, collection="client-mappings"))

    assert [one.status for one in told] == ["stored"] * 4 + ["refused"]
    assert "came before" in told[4].message
    ids = ["a", "7", "n", "p"]
    answer = client.rerank("what", [*ids[:3], {"id": "p"}], collection="client-mappings", return_text=True)
    texts = ["A mapping.", "Title and text", "of numpy", "A value."]
    assert {r.passage_id: r.text for r in answer} == dict(zip(ids, texts, strict=True))
    by_text = client.rerank("what", [{"title": "Title", "text": "and text"}, "Title and text"])
    assert by_text[0].margin == by_text[1].margin


def test_an_error_of_the_callers_passages_is_the_callers_own(client) -> None:
    def broken():
        yield Passage("b0", "The first one is fine.")
        raise LookupError("no more passages")

    with pytest.raises(LookupError, match="no more passages"):
        list(client.upsert(broken(), collection="client-broken"))


async def test_an_error_of_the_callers_async_passages_too(server_pair) -> None:
    async def broken():
        yield Passage("b0", "The first one is fine.")
        raise LookupError("no more passages")

    async with AsyncClient(server_pair.address, encoder_address=server_pair.encoder_address) as client:
        with pytest.raises(LookupError, match="no more passages"):
            _ = [one async for one in client.upsert(broken(), collection="client-broken")]


def test_what_is_served_says_who_it_is(client, collection, server_pair) -> None:
    (model,) = client.list_models()
    info = client.describe()
    (listed,) = [one for one in client.list_collections() if one.name == collection]

    assert model.backend == "fbnl"
    assert model.encoder == info.encoder
    assert listed.encoder.fingerprint == model.encoder.fingerprint
    assert listed == client.stats(collection)[0]
    assert model.encodes_on_demand


def test_errors_name_what_is_wrong(client, collection) -> None:
    with pytest.raises(NotFound, match="no-such") as missing:
        client.rerank(QUERY, ["sky"], collection="no-such")
    with pytest.raises(NotFound, match="no-such"):
        client.rerank(QUERY, ["sky"], collection=collection, model="no-such")
    with pytest.raises(InvalidRequest, match="top_n") as bad:
        client.rerank(QUERY, ["sky"], collection=collection, top_n=-1)

    assert missing.value.resource_name == "no-such"
    assert bad.value.violations[0].field == "top_n"


def test_importing_preread_imports_neither_torch_nor_grpc() -> None:
    check = "import sys, preread; print([name for name in ('torch', 'grpc', 'numpy') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_the_clients_need_no_torch() -> None:
    check = "import sys; from preread import Client; Client('a:1').close(); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_passages_are_listed_page_by_page(client, collection) -> None:
    ids = sorted(client.list_passages(collection))
    assert "sky" in ids
    assert sorted(client.list_passages(collection, page_size=1)) == ids
    with pytest.raises(InvalidRequest, match=r"page_size is 5001; expected 1\.\.5000"):
        list(client.list_passages(collection, page_size=5001))
    with pytest.raises(NotFound, match="no-such"):
        list(client.list_passages("no-such"))
    with pytest.raises(TypeError, match="collection is"):
        client.list_passages(7)
