"""preread.integrations.haystack in Haystack: what its CohereRanker does, by id and by text."""

from __future__ import annotations

import asyncio

import pytest
from haystack import Document, Pipeline
from haystack.utils import Secret

from preread import AsyncClient, Client, Stage, TlsFiles, Unauthenticated
from preread.integrations.functions import NotScored
from preread.integrations.haystack import PrereadRanker


@pytest.fixture
def found(documents):
    return [Document(content=text, id=f"d{i}", meta={"key": f"d{i}"}, score=0.5) for i, text in enumerate(documents)]


def seen(output):
    return [(int(one.id[1:]), one.score) for one in output["documents"]]


@pytest.mark.parametrize("top_k", [1, 3, 99, None])
def test_documents_are_ranked_by_text(agree, narrow, query, found, by_text, top_k):
    ranker = PrereadRanker(narrow.grpc_address, top_k=2)

    assert agree(seen(ranker.run(query=query, documents=found, top_k=top_k)), by_text[: top_k or 2])
    assert {one.score for one in found} == {0.5}


@pytest.mark.parametrize("settings", [{}, {"id_key": "key"}, {"id_key": "key", "send_text": False}])
def test_documents_are_ranked_by_id(agree, narrow, query, found, by_id, settings):
    ranker = PrereadRanker(narrow.grpc_address, collection="docs", on_miss="skip", **settings)

    assert agree(seen(ranker.run(query=query, documents=found)), by_id)
    assert agree(seen(asyncio.run(ranker.run_async(query=query, documents=found))), by_id)


def test_a_pipeline_runs_it_before_and_after_yaml(agree, narrow, query, found, by_text):
    pipeline = Pipeline()
    pipeline.add_component("ranker", PrereadRanker(narrow.grpc_address, top_k=2))

    again = Pipeline.loads(pipeline.dumps(), allowed_modules=["preread.integrations.haystack"])
    for one in (pipeline, again):
        assert agree(seen(one.run({"ranker": {"query": query, "documents": found}})["ranker"]), by_text[:2])


def test_an_async_pipeline_runs_it(agree, narrow, query, found, by_text):
    pipeline = Pipeline()
    pipeline.add_component("ranker", PrereadRanker(narrow.grpc_address, top_k=2))

    output = asyncio.run(pipeline.run_async({"ranker": {"query": query, "documents": found}}))

    assert agree(seen(output["ranker"]), by_text[:2])


def test_it_is_serialised():
    ranker = PrereadRanker(
        ["a:1", "b:1"], top_k=3, api_key=Secret.from_env_var("KEY"), tls=TlsFiles(ca_file="ca.pem"),
        collection="docs", id_key="key", stages=[Stage(8, 20), Stage(4)],
    )  # fmt: skip

    data = ranker.to_dict()

    assert data["type"] == "preread.integrations.haystack.PrereadRanker"
    assert data["init_parameters"]["stages"] == "8:20,4"
    again = PrereadRanker.from_dict(data)
    assert again.to_dict() == ranker.to_dict()
    assert again.tls == TlsFiles(ca_file="ca.pem")


def test_what_is_no_data_is_not_serialised(narrow):
    expected = "client is a Client; expected an address, to be serialised"
    with Client(narrow.grpc_address) as client, pytest.raises(ValueError, match=expected):
        PrereadRanker(client).to_dict()
    with pytest.raises(ValueError, match="client_options cannot be serialised"):
        PrereadRanker(client_options="anything")


def test_keys_come_from_the_environment(guarded, key, query, found, monkeypatch):
    with pytest.raises(Unauthenticated):
        PrereadRanker(guarded.grpc_address).run(query=query, documents=found)
    monkeypatch.setenv("PREREAD_API_KEY", key)
    ranker = PrereadRanker.from_dict(PrereadRanker(guarded.grpc_address).to_dict())
    assert len(ranker.run(query=query, documents=found)["documents"]) == 4
    assert key not in str(ranker.to_dict())


def test_clients_are_taken(agree, narrow, query, found, by_text):
    with Client(narrow.grpc_address) as client:
        assert agree(seen(PrereadRanker(client).run(query=query, documents=found)), by_text)

    async def ask():
        async with AsyncClient(narrow.grpc_address) as client:
            return await PrereadRanker(client).run_async(query=query, documents=found)

    assert agree(seen(asyncio.run(ask())), by_text)


def test_empty_and_bad_input(narrow, query, found):
    assert PrereadRanker("127.0.0.1:1").run(query=query, documents=[]) == {"documents": []}
    with pytest.raises(ValueError, match="top_k is 0; expected 1 or more"):
        PrereadRanker(narrow.grpc_address, top_k=0)
    with pytest.raises(ValueError, match="top_k is -1; expected 1 or more"):
        PrereadRanker(narrow.grpc_address).run(query=query, documents=found, top_k=-1)
    with pytest.raises(TypeError, match=r"text of documents\[0\] is None; expected a string"):
        PrereadRanker(narrow.grpc_address).run(query=query, documents=[Document(meta={"image": 1})])


def test_what_cannot_be_scored_is_said(narrow, query, found):
    found.append(Document(content="", id="d9"))
    with pytest.raises(NotScored, match=r"1 of 5 candidates could not be scored; candidates\[4\] is failed"):
        PrereadRanker(narrow.grpc_address).run(query=query, documents=found)
    output = PrereadRanker(narrow.grpc_address, on_unscored="last").run(query=query, documents=found)
    assert seen(output)[-1] == (9, None)
