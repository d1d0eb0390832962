"""langchain and llama-index: rerankers of theirs that take a base URL."""

from __future__ import annotations

import cohere
import pytest
from infinity_client import Client
from langchain_cohere import CohereRerank
from langchain_community.document_compressors.infinity_rerank import InfinityRerank
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank as LlamaIndexCohere
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference


@pytest.fixture
def nodes(documents):
    return [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=0.5) for i, text in enumerate(documents)]


def texts_of(ranking, documents, top_n):
    return [documents[index] for index, _ in ranking[:top_n]]


@pytest.mark.parametrize("top_n", [1, 3, 99])
def test_langchain_cohere(server, model, query, documents, ranking, top_n):
    compressor = CohereRerank(model=model, top_n=top_n, cohere_api_key="anything", base_url=server.url)
    found = compressor.compress_documents([Document(text) for text in documents], query)

    assert [one.page_content for one in found] == texts_of(ranking, documents, top_n)
    assert [one.metadata["relevance_score"] for one in found] == [score for _, score in ranking[:top_n]]


def test_langchain_cohere_cuts_documents(server, model, query, documents, long_text):
    compressor = CohereRerank(model=model, cohere_api_key="anything", base_url=server.url)

    assert len(compressor.rerank([*documents, long_text], query, max_tokens_per_doc=4, top_n=None)) == 5


def test_langchain_cohere_is_refused(server, guarded, model, query, documents):
    with pytest.raises(cohere.NotFoundError):
        CohereRerank(model="other", cohere_api_key="anything", base_url=server.url).rerank(documents, query)
    with pytest.raises(cohere.UnauthorizedError):
        CohereRerank(model=model, cohere_api_key="wrong", base_url=guarded.url).rerank(documents, query)


@pytest.mark.parametrize("top_n", [1, 3, 99])
def test_langchain_infinity(server, query, documents, ranking, top_n):
    compressor = InfinityRerank(client=Client(base_url=server.url), top_n=top_n)
    found = compressor.compress_documents([Document(text) for text in documents], query)

    assert [one.page_content for one in found] == texts_of(ranking, documents, top_n)


@pytest.mark.parametrize("top_n", [1, 3, 99])
def test_llama_index_cohere(server, model, query, documents, nodes, ranking, top_n):
    reranker = LlamaIndexCohere(model=model, top_n=top_n, api_key="anything", base_url=server.url)
    found = reranker.postprocess_nodes(nodes, QueryBundle(query))

    assert [one.node.text for one in found] == texts_of(ranking, documents, top_n)
    assert [one.score for one in found] == [score for _, score in ranking[:top_n]]


@pytest.mark.parametrize("top_n", [1, 3, 99])
def test_llama_index_jina(server, model, query, documents, nodes, ranking, top_n):
    reranker = JinaRerank(model=model, top_n=top_n, api_key="anything", base_url=f"{server.url}/v1")
    found = reranker.postprocess_nodes(nodes, QueryBundle(query))

    assert [one.node.text for one in found] == texts_of(ranking, documents, top_n)


def test_llama_index_jina_says_why_it_was_refused(server, guarded, model, query, nodes):
    with pytest.raises(RuntimeError, match=f"served here: {model}"):
        JinaRerank(model="other", api_key="x", base_url=f"{server.url}/v1").postprocess_nodes(nodes, QueryBundle(query))
    with pytest.raises(RuntimeError, match="API key"):
        JinaRerank(model=model, api_key="x", base_url=f"{guarded.url}/v1").postprocess_nodes(nodes, QueryBundle(query))


@pytest.mark.parametrize("top_n", [1, 3, 99])
@pytest.mark.parametrize("prefix", ["", "/tei"])
def test_llama_index_tei(server, query, documents, nodes, ranking, prefix, top_n):
    reranker = TextEmbeddingInference(base_url=server.url + prefix, top_n=top_n)
    found = reranker.postprocess_nodes(nodes, QueryBundle(query))

    assert [one.node.text for one in found] == texts_of(ranking, documents, top_n)


def test_llama_index_over_long_input(server, query, long_text):
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in (long_text, "short")]
    reranker = TextEmbeddingInference(base_url=server.url, top_n=2)

    assert len(reranker.postprocess_nodes(nodes, QueryBundle(query))) == 2
