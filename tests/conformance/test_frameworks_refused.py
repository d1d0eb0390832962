"""langchain and llama-index again: empty and over-long input, keys, models, overload, each in its own way."""

from __future__ import annotations

import cohere
import pytest
from infinity_client import Client
from infinity_client.errors import UnexpectedStatus
from langchain_cohere import CohereRerank
from langchain_community.document_compressors.infinity_rerank import InfinityRerank
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank as LlamaIndexCohere
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

TOP_N = 10
# The TEI postprocessor reads an error's body as if it were scores.
MISREAD = (AssertionError, TypeError)
REFUSALS = {
    "langchain cohere": (cohere.UnauthorizedError, cohere.NotFoundError, cohere.TooManyRequestsError),
    "langchain infinity": (UnexpectedStatus, UnexpectedStatus, UnexpectedStatus),
    "llama-index cohere": (cohere.UnauthorizedError, cohere.NotFoundError, cohere.TooManyRequestsError),
    "llama-index jina": (RuntimeError, RuntimeError, RuntimeError),
    "llama-index tei": (MISREAD, None, MISREAD),  # names no model
}
EVERY = pytest.mark.parametrize("name", REFUSALS)


def reranker(name, url, model, key="anything"):
    """query, texts -> texts, best first."""
    if name == "langchain cohere":
        found = CohereRerank(model=model, top_n=TOP_N, cohere_api_key=key, base_url=url)
    elif name == "langchain infinity":
        client = Client(base_url=url, headers={"authorization": f"Bearer {key}"}, raise_on_unexpected_status=True)
        found = InfinityRerank(client=client, model=model, top_n=TOP_N)
    elif name == "llama-index cohere":
        found = LlamaIndexCohere(model=model, top_n=TOP_N, api_key=key, base_url=url)
    elif name == "llama-index jina":
        found = JinaRerank(model=model, top_n=TOP_N, api_key=key, base_url=f"{url}/v1")
    else:
        found = TextEmbeddingInference(base_url=url, top_n=TOP_N, auth_token=f"Bearer {key}")

    def ask(query, texts):
        if name.startswith("langchain"):
            return [one.page_content for one in found.compress_documents([Document(text) for text in texts], query)]
        nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts]
        return [one.node.text for one in found.postprocess_nodes(nodes, QueryBundle(query))]

    return ask


@EVERY
def test_nothing_to_rank(server, model, query, name):
    assert reranker(name, server.url, model)(query, []) == []


@EVERY
def test_over_long_input(server, model, query, long_text, name):
    assert set(reranker(name, server.url, model)(query, [long_text, "short"])) == {long_text, "short"}


@EVERY
def test_unauthorised(guarded, key, model, query, documents, name):
    with pytest.raises(REFUSALS[name][0]):
        reranker(name, guarded.url, model, "not-the-right-key-at-all")(query, documents)
    assert len(reranker(name, guarded.url, model, key)(query, documents)) == 4


@pytest.mark.parametrize("name", [name for name, kinds in REFUSALS.items() if kinds[1]])
def test_unknown_model(server, query, documents, name):
    with pytest.raises(REFUSALS[name][1]):
        reranker(name, server.url, "rerank-v9")(query, documents)


@EVERY
def test_overload(guarded, key, model, query, documents, busy, name):
    ask = reranker(name, guarded.url, model, key)

    def until_refused():
        for _ in range(200):
            ask(query, documents)

    with pytest.raises(REFUSALS[name][2]):
        until_refused()
