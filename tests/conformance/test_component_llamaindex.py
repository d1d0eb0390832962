"""preread.integrations.llamaindex in llama-index: what its CohereRerank does, by id and by text."""

from __future__ import annotations

import asyncio
import pickle

import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import SimpleSummarize
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from preread.integrations.functions import NotScored
from preread.integrations.llamaindex import PrereadRerank


@pytest.fixture
def nodes(documents):
    return [NodeWithScore(node=TextNode(text=text, id_=f"d{i}"), score=0.5) for i, text in enumerate(documents)]


def seen(ranked):
    return [(int(one.node.node_id[1:]), one.score) for one in ranked]


@pytest.mark.parametrize("top_n", [1, 3, 99])
def test_nodes_are_ranked_by_text(agree, narrow, query, nodes, by_text, top_n):
    reranker = PrereadRerank(client=narrow.grpc_address, top_n=top_n)

    assert agree(seen(reranker.postprocess_nodes(nodes, QueryBundle(query))), by_text[:top_n])
    assert agree(seen(asyncio.run(reranker.apostprocess_nodes(nodes, query_str=query))), by_text[:top_n])
    assert {one.score for one in nodes} == {0.5}


@pytest.mark.parametrize("send_text", [True, False])
@pytest.mark.parametrize("id_key", [None, "key"])
def test_nodes_are_ranked_by_id(agree, narrow, query, nodes, by_id, id_key, send_text):
    if id_key:
        for i, one in enumerate(nodes):
            one.node.metadata = {"key": f"d{i}"}
            one.node.excluded_embed_metadata_keys = ["key"]
    settings = {"collection": "docs", "id_key": id_key, "send_text": send_text, "on_miss": "skip"}
    reranker = PrereadRerank(client=narrow.grpc_address, top_n=4, **settings)

    assert agree(seen(reranker.postprocess_nodes(nodes, query_str=query)), by_id)


def test_metadata_is_part_of_the_text(narrow, query):
    nodes = [NodeWithScore(node=TextNode(text="It is.", metadata={"title": title})) for title in ("Sky", "Sea")]
    reranker = PrereadRerank(client=narrow.grpc_address)

    first, second = reranker.postprocess_nodes(nodes, query_str=query)

    assert first.score > second.score


def test_a_query_engine_uses_it(agree, narrow, query, nodes, by_text):
    class Everything(BaseRetriever):
        def _retrieve(self, query_bundle):
            return nodes

    reranker = PrereadRerank(client=narrow.grpc_address, top_n=2)
    engine = RetrieverQueryEngine(
        Everything(),
        SimpleSummarize(llm=MockLLM()),
        node_postprocessors=[reranker],
    )

    assert agree(seen(engine.query(query).source_nodes), by_text[:2])
    assert agree(seen(asyncio.run(engine.aquery(query)).source_nodes), by_text[:2])


def test_callbacks_and_events(narrow, query, nodes):
    names = []

    class Names(BaseEventHandler):
        def handle(self, event, **_):
            names.append(event.class_name())

    handler = LlamaDebugHandler(print_trace_on_end=False)
    get_dispatcher().add_event_handler(Names())
    reranker = PrereadRerank(client=narrow.grpc_address, callback_manager=CallbackManager([handler]))

    reranker.postprocess_nodes(nodes, query_str=query)

    ((start, end),) = handler.get_event_pairs(CBEventType.RERANKING)
    assert (start.payload["query_str"], start.payload["top_k"], len(end.payload["nodes"])) == (query, 2, 2)
    assert names == ["ReRankStartEvent", "ReRankEndEvent"]


def test_empty_input(query, nodes):
    reranker = PrereadRerank(client="127.0.0.1:1")

    assert reranker.postprocess_nodes([], query_str=query) == []
    assert asyncio.run(reranker.apostprocess_nodes([], query_str=query)) == []
    with pytest.raises(ValueError, match="query_bundle is None; expected a query"):
        reranker.postprocess_nodes(nodes)


def test_what_cannot_be_scored_is_said(narrow, query, nodes):
    nodes.append(NodeWithScore(node=TextNode(text="", id_="d9")))
    with pytest.raises(NotScored, match=r"1 of 5 candidates could not be scored; candidates\[4\] is failed"):
        PrereadRerank(client=narrow.grpc_address).postprocess_nodes(nodes, query_str=query)
    ranked = PrereadRerank(client=narrow.grpc_address, top_n=9, on_unscored="last").postprocess_nodes(
        nodes, query_str=query
    )
    assert seen(ranked)[-1] == (9, None)


def test_it_is_serialised(agree, narrow, query, nodes, by_text):
    reranker = PrereadRerank(client=narrow.grpc_address, top_n=1)
    reranker.postprocess_nodes(nodes, query_str=query)

    data = reranker.to_dict()

    assert data["class_name"] == "PrereadRerank"
    for again in (
        PrereadRerank.from_dict(data),
        PrereadRerank.from_json(reranker.to_json()),
        pickle.loads(pickle.dumps(reranker)),
    ):
        assert agree(seen(again.postprocess_nodes(nodes, query_str=query)), by_text[:1])
