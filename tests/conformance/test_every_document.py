"""Empty documents among others, through the clients that count results or pair them with documents by position."""

from __future__ import annotations

import httpx
import pytest
import voyageai
from cohere import Client as CohereV1
from cohere import ClientV2 as CohereV2
from infinity_client import Client as Infinity
from langchain_cohere import CohereRerank
from langchain_community.document_compressors.infinity_rerank import InfinityRerank
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank as LlamaIndexCohere
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference


@pytest.fixture(scope="session")
def mixed(documents):
    return ["", documents[0], " \n\t", *documents[1:], "\u3000"]


@pytest.fixture(scope="session")
def expected(mixed, documents, ranking):
    """(text, score) best first: the empty ones last, in their order."""
    return [(documents[index], score) for index, score in ranking] + [(t, 0.0) for t in mixed if not t.strip()]


def cohere_v1(server, model, query, texts):
    results = CohereV1("anything", base_url=server.url).rerank(model=model, query=query, documents=texts).results
    return [(texts[one.index], one.relevance_score) for one in results]


def cohere_v2(server, model, query, texts):
    results = CohereV2("anything", base_url=server.url).rerank(model=model, query=query, documents=texts).results
    return [(texts[one.index], one.relevance_score) for one in results]


def voyage(server, model, query, texts):
    results = voyageai.Client(api_key="anything", base_url=f"{server.url}/v1").rerank(query, texts, model=model).results
    return [(texts[one.index], one.relevance_score) for one in results]


def langchain_cohere(server, model, query, texts):
    client = CohereRerank(model=model, top_n=None, cohere_api_key="anything", base_url=server.url)
    return [(texts[one["index"]], one["relevance_score"]) for one in client.rerank(texts, query)]


def langchain_infinity(server, model, query, texts):
    client = InfinityRerank(client=Infinity(base_url=server.url), top_n=len(texts))
    found = client.compress_documents([Document(text) for text in texts], query)
    return [(one.page_content, one.metadata["relevance_score"]) for one in found]


def llama_index(reranker, query, texts):
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts]
    return [(one.node.text, one.score) for one in reranker.postprocess_nodes(nodes, QueryBundle(query))]


def llama_index_cohere(server, model, query, texts):
    client = LlamaIndexCohere(model=model, top_n=len(texts), api_key="anything", base_url=server.url)
    return llama_index(client, query, texts)


def llama_index_jina(server, model, query, texts):
    client = JinaRerank(model=model, top_n=len(texts), api_key="anything", base_url=f"{server.url}/v1")
    return llama_index(client, query, texts)


def llama_index_tei(server, model, query, texts):
    """It asserts that there are as many scores as documents."""
    return llama_index(TextEmbeddingInference(base_url=server.url, top_n=len(texts)), query, texts)


CLIENTS = [
    cohere_v1, cohere_v2, voyage, langchain_cohere, langchain_infinity, llama_index_cohere, llama_index_jina,
    llama_index_tei,
]  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
def test_every_document_has_its_own_score(server, model, query, mixed, expected, client):
    found = client(server, model, query, mixed)

    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_a_client_that_pairs_by_position(server, query, mixed, expected):
    """As open-webui and a Milvus client do: results by index, put beside the documents."""
    answer = httpx.post(f"{server.url}/v1/rerank", json={"query": query, "documents": mixed, "top_n": len(mixed)})
    by_index = sorted(answer.json()["results"], key=lambda one: one["index"])
    pairs = [(text, one["relevance_score"]) for text, one in zip(mixed, by_index, strict=True)]

    assert dict(pairs) == pytest.approx(dict(expected), abs=1e-5)
