"""Pinecone, isaacus and LiteLLM's providers, each by nothing but the URL."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is fetched when the package is imported

import isaacus
import litellm
import pinecone
import pytest
from pinecone.errors import ApiError

litellm.suppress_debug_info = True


@pytest.fixture
def pc(server):
    return pinecone.Pinecone(api_key="anything", host=server.url)


@pytest.mark.parametrize(("top_n", "num_results"), [(None, 4), (1, 1), (99, 4)])
def test_pinecone_ranks(pc, model, query, documents, ranking, top_n, num_results):
    answer = pc.inference.rerank(model=model, query=query, documents=documents, top_n=top_n)

    assert [(one.index, one.score) for one in answer.data] == ranking[:num_results]
    assert [one.document for one in answer.data] == [{"text": documents[one.index]} for one in answer.data]
    assert (answer.model, answer.usage.rerank_units) == (model, 1)


def test_pinecone_gives_documents_back_as_they_were(pc, model, query, documents, ranking):
    sent = [{"id": f"row-{i}", "chunk": text, "page": i} for i, text in enumerate(documents)]
    answer = pc.inference.rerank(model=model, query=query, documents=sent, rank_fields=["chunk"])
    bare = pc.inference.rerank(model=model, query=query, documents=sent, rank_fields=["chunk"], return_documents=False)

    assert [(one.index, one.score, one.document) for one in answer.data] == [(i, s, sent[i]) for i, s in ranking]
    assert [one.document for one in bare.data] == [None] * 4


def test_pinecone_is_refused(pc, guarded, model, query, documents):
    with pytest.raises(ApiError, match="served here"):
        pc.inference.rerank(model="bge-reranker-v2-m3", query=query, documents=documents)
    with pytest.raises(ApiError, match="rank_fields: absent"):
        pc.inference.rerank(model=model, query=query, documents=[{"a": "b"}], rank_fields=["absent"])
    with pytest.raises(ApiError, match="key"):
        pinecone.Pinecone(api_key="wrong", host=guarded.url).inference.rerank(
            model=model, query=query, documents=documents
        )


@pytest.fixture(params=["", "/v1"])
def kanon(server, request):
    return isaacus.Isaacus(api_key="anything", base_url=server.url + request.param, max_retries=0)


@pytest.mark.parametrize(("top_n", "num_results"), [(None, 4), (1, 1), (99, 4)])
def test_isaacus_ranks(kanon, model, query, documents, ranking, top_n, num_results):
    answer = kanon.rerankings.create(model=model, query=query, texts=documents, top_n=top_n)

    assert [(one.index, one.score) for one in answer.results] == ranking[:num_results]
    assert answer.usage.input_tokens > 0


def test_isaacus_is_refused(kanon, guarded, model, query, documents):
    with pytest.raises(isaacus.BadRequestError, match="texts is 'empty'"):
        kanon.rerankings.create(model=model, query=query, texts=[])
    with pytest.raises(isaacus.BadRequestError, match="is_iql"):
        kanon.rerankings.create(model=model, query=query, texts=documents, is_iql=True)
    with pytest.raises(isaacus.AuthenticationError):
        isaacus.Isaacus(api_key="wrong", base_url=guarded.url).rerankings.create(
            model=model, query=query, texts=documents
        )


# provider -> what its base is under the server, whether the texts come back
PROVIDERS = {
    "voyage": ("", True),
    "cohere": ("", True),
    "jina_ai": ("", True),
    "infinity": ("", False),
    "hosted_vllm": ("", False),
    "nvidia_nim": ("", False),
    "azure_ai": ("", True),
    "litellm_proxy": ("", True),
    "infinity, by its prefix": ("/infinity", True),
    "hosted_vllm, by a prefix": ("/vllm", True),
    "voyage, by its prefix": ("/voyage", True),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("more", [{}, {"top_n": 2}, {"return_documents": False}], ids=str)
def test_litellm_by_its_default_call(server, model, query, documents, ranking, provider, more):
    base, returns = PROVIDERS[provider]
    name = f"{provider.partition(',')[0]}/{model}"
    answer = litellm.rerank(
        model=name, query=query, documents=documents, api_base=server.url + base, api_key="anything", **more
    )

    expected = ranking[: more.get("top_n", 4)]
    assert [one["index"] for one in answer.results] == [index for index, _ in expected]
    if provider != "nvidia_nim":  # which has logits
        assert [one["relevance_score"] for one in answer.results] == [score for _, score in expected]
    if returns and more.get("return_documents", True):
        assert [one["document"]["text"] for one in answer.results] == [documents[index] for index, _ in expected]


@pytest.mark.parametrize("provider", ["infinity", "hosted_vllm"])
def test_litellm_without_a_key_gets_documents(server, model, query, documents, ranking, provider, monkeypatch):
    monkeypatch.delenv("INFINITY_API_KEY", raising=False)
    answer = litellm.rerank(model=f"{provider}/{model}", query=query, documents=documents, api_base=server.url)

    assert [one["document"]["text"] for one in answer.results] == [documents[index] for index, _ in ranking]


def test_litellm_for_tei(server, query, documents, ranking):
    answer = litellm.rerank(
        model="huggingface/any", query=query, documents=documents, api_base=server.url, api_key="anything"
    )

    assert [(one["index"], one["relevance_score"]) for one in answer.results] == ranking
