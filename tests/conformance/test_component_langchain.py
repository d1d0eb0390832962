"""preread.integrations.langchain in langchain: what CohereRerank does, by id and by text."""

from __future__ import annotations

import asyncio
import pickle
import threading

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from preread import AsyncClient, Client, ClientOptions, NotFound, Unauthenticated
from preread.integrations.functions import NotScored
from preread.integrations.langchain import PrereadRerank
from preread.integrations.ranker import Settings


@pytest.fixture
def found(documents):
    return [Document(text, id=f"d{i}", metadata={"key": f"d{i}", "tags": ["a"]}) for i, text in enumerate(documents)]


def seen(ranked):
    return [(int(one.metadata["key"][1:]), one.metadata["relevance_score"]) for one in ranked]


@pytest.mark.parametrize("top_n", [1, 3, 99, None])
def test_documents_are_ranked_by_text(agree, narrow, query, found, by_text, top_n):
    ranked = PrereadRerank(client=narrow.grpc_address, top_n=top_n).compress_documents(found, query)

    assert agree(seen(ranked), by_text[:top_n])
    assert "relevance_score" not in found[0].metadata
    assert ranked[0].metadata["tags"] is not found[seen(ranked)[0][0]].metadata["tags"]
    assert ranked[0].id == ranked[0].metadata["key"]


@pytest.mark.parametrize("settings", [{}, {"id_key": "key"}, {"id_key": "key", "send_text": False}])
def test_documents_are_ranked_by_id(agree, narrow, query, found, by_id, settings):
    compressor = PrereadRerank(client=narrow.grpc_address, collection="docs", top_n=None, on_miss="skip", **settings)

    assert agree(seen(compressor.compress_documents(found, query)), by_id)
    assert agree(seen(asyncio.run(compressor.acompress_documents(found, query))), by_id)


def test_async_calls_need_no_thread(agree, narrow, query, found, by_text):
    compressor = PrereadRerank(client=narrow.grpc_address, top_n=3)

    async def many():
        rankings = await asyncio.gather(*(compressor.acompress_documents(found, query) for _ in range(8)))
        assert not [one for one in threading.enumerate() if one.name.startswith("asyncio_")]  # of a loop's executor
        return rankings

    for _ in range(2):  # on an event loop each
        assert all(agree(seen(one), by_text[:3]) for one in asyncio.run(many()))


def test_clients_are_taken(agree, narrow, query, found, by_text):
    with Client(narrow.grpc_address) as client:
        compressor = PrereadRerank(client=client)
        assert agree(seen(compressor.compress_documents(found, query)), by_text[:3])
        assert agree(seen(asyncio.run(compressor.acompress_documents(found, query))), by_text[:3])

    async def ask():
        async with AsyncClient(narrow.grpc_address) as client:
            compressor = PrereadRerank(client=client)
            with pytest.raises(TypeError, match=r"client is async; expected a Client"):
                compressor.compress_documents(found, query)
            return await compressor.acompress_documents(found, query)

    assert agree(seen(asyncio.run(ask())), by_text[:3])


def test_a_retriever_uses_it(agree, narrow, query, found, by_text):
    class Everything(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            return found

    compressor = PrereadRerank(client=narrow.grpc_address, top_n=2)
    retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=Everything())

    assert agree(seen(retriever.invoke(query)), by_text[:2])
    assert agree(seen(asyncio.run(retriever.ainvoke(query))), by_text[:2])


def test_no_documents_are_no_request(query):
    assert PrereadRerank(client="127.0.0.1:1").compress_documents([], query) == []
    assert asyncio.run(PrereadRerank(client="127.0.0.1:1").acompress_documents([], query)) == []


def test_what_cannot_be_scored_is_said(narrow, query, found):
    with pytest.raises(NotScored, match=r"1 of 5 candidates could not be scored; candidates\[4\] is failed: "):
        PrereadRerank(client=narrow.grpc_address).compress_documents([*found, Document("")], query)
    kept = PrereadRerank(client=narrow.grpc_address, top_n=None, on_unscored="last")
    ranked = kept.compress_documents([Document("", metadata={"key": "d9"}), *found], query)
    assert seen(ranked)[-1] == (9, None)
    with pytest.raises(TypeError, match=r"documents\[0\]\['key'\] is a float \(1.0\); expected a string or an integer"):
        PrereadRerank(client=narrow.grpc_address, collection="docs", id_key="key").compress_documents(
            [Document("a", metadata={"key": 1.0})], query
        )


def test_the_server_refuses(narrow, guarded, key, query, found):
    with pytest.raises(NotFound):
        PrereadRerank(client=narrow.grpc_address, model="other").compress_documents(found, query)
    with pytest.raises(Unauthenticated):
        PrereadRerank(client=guarded.grpc_address).compress_documents(found, query)
    compressor = PrereadRerank(client=guarded.grpc_address, client_options=ClientOptions(api_key=key))
    assert len(compressor.compress_documents(found, query)) == 3
    assert key not in repr(compressor) + compressor.model_dump_json()


def test_settings_are_fields_and_survive(agree, narrow, query, found, by_text):
    assert Settings.__optional_keys__ | {"client", "top_n"} == set(PrereadRerank.model_fields)
    with pytest.raises(ValueError, match="top_m"):
        PrereadRerank(client=narrow.grpc_address, top_m=2)
    compressor = PrereadRerank(client=narrow.grpc_address, top_n=2)
    compressor.compress_documents(found, query)
    for again in (PrereadRerank(**compressor.model_dump()), pickle.loads(pickle.dumps(compressor))):
        assert agree(seen(again.compress_documents(found, query)), by_text[:2])
