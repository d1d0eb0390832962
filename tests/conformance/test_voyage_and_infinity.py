"""voyageai and infinity_client."""

from __future__ import annotations

import pytest
import voyageai
from infinity_client import AuthenticatedClient, Client
from infinity_client.api.default import health, models, rerank
from infinity_client.models import RerankInput
from voyageai import error


@pytest.fixture
def voyage(server):
    return voyageai.Client(api_key="anything", base_url=f"{server.url}/v1", max_retries=0)


@pytest.mark.parametrize(("top_k", "num_results"), [(None, 4), (1, 1), (99, 4)])
def test_voyage_ranks(voyage, model, query, documents, ranking, top_k, num_results):
    answer = voyage.rerank(query, documents, model=model, top_k=top_k)

    assert [(r.index, r.relevance_score) for r in answer.results] == ranking[:num_results]
    assert all(r.document == documents[r.index] for r in answer.results)
    assert answer.total_tokens > 0


def test_voyage_behind_its_prefix(server, model, query, documents, ranking):
    client = voyageai.Client(api_key="anything", base_url=f"{server.url}/voyage/v1")

    assert [r.index for r in client.rerank(query, documents, model=model).results] == [i for i, _ in ranking]


def test_voyage_over_long_input(voyage, model, query, long_text):
    assert len(voyage.rerank(query, [long_text], model=model).results) == 1
    with pytest.raises(error.InvalidRequestError, match="tokens"):
        voyage.rerank(query, [long_text], model=model, truncation=False)


def test_voyage_is_refused(voyage, guarded, model, query, documents):
    with pytest.raises(error.InvalidRequestError, match="documents is 'empty'"):
        voyage.rerank(query, [], model=model)
    with pytest.raises(error.APIError, match="served here"):
        voyage.rerank(query, documents, model="rerank-9")
    stranger = voyageai.Client(api_key="not-the-right-key-at-all", base_url=f"{guarded.url}/v1")
    with pytest.raises(error.AuthenticationError):
        stranger.rerank(query, documents, model=model)


def test_voyage_overload(guarded, key, model, query, documents, busy):
    client = voyageai.Client(api_key=key, base_url=f"{guarded.url}/v1", max_retries=0)

    def until_refused():
        for _ in range(200):
            client.rerank(query, documents, model=model)

    with pytest.raises(error.RateLimitError):
        until_refused()


@pytest.fixture(params=["", "/infinity"])
def infinity(request, server):
    return Client(base_url=server.url + request.param, raise_on_unexpected_status=True)


@pytest.mark.parametrize(("top_n", "num_results"), [(None, 4), (1, 1), (99, 4)])
def test_infinity_ranks(infinity, query, documents, ranking, top_n, num_results):
    """Without a model: its default name means whatever is served."""
    answer = rerank.sync(client=infinity, body=RerankInput(query=query, documents=documents, top_n=top_n))

    assert [(r.index, r.relevance_score) for r in answer.results] == ranking[:num_results]
    assert answer.usage.total_tokens > 0


def test_infinity_returns_documents_as_strings(server, query, documents, ranking):
    client = Client(base_url=f"{server.url}/infinity")
    answer = rerank.sync(client=client, body=RerankInput(query=query, documents=documents, return_documents=True))

    assert [r.document for r in answer.results] == [documents[index] for index, _ in ranking]


def test_infinity_asks_for_models_and_health(infinity, model):
    assert [one.id for one in models.sync(client=infinity).data] == [model]
    assert health.sync_detailed(client=infinity).status_code == 200


@pytest.mark.parametrize(("body", "status"), [({"documents": []}, 400), ({"model": "other"}, 404)])
def test_infinity_is_refused(infinity, query, documents, body, status):
    from infinity_client.errors import UnexpectedStatus

    with pytest.raises(UnexpectedStatus) as caught:
        rerank.sync(client=infinity, body=RerankInput(**{"query": query, "documents": documents} | body))
    assert caught.value.status_code == status


def test_infinity_unauthorised(guarded, key, query, documents):
    body = RerankInput(query=query, documents=documents)

    assert rerank.sync_detailed(client=Client(base_url=guarded.url), body=body).status_code == 401
    known = AuthenticatedClient(base_url=guarded.url, token=key)
    assert len(rerank.sync(client=known, body=body).results) == 4


def test_infinity_over_long_input(infinity, query, documents, long_text):
    answer = rerank.sync(client=infinity, body=RerankInput(query=query, documents=[*documents, long_text]))

    assert len(answer.results) == 5


def test_infinity_overload(guarded, key, query, documents, busy):
    """It does not try again by itself; the status and the hint are there."""
    client = AuthenticatedClient(base_url=guarded.url, token=key)
    for _ in range(200):
        answer = rerank.sync_detailed(client=client, body=RerankInput(query=query, documents=documents))
        if answer.status_code != 200:
            break
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
