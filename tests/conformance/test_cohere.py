"""cohere's own clients, both generations: /v2/rerank and /v1/rerank."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cohere
import httpx
import pytest

NO_RETRY = {"max_retries": 0}


@pytest.fixture(params=["ClientV2", "Client"])
def make(request):
    """make(url, key) gives a client."""
    return lambda url, key="anything": getattr(cohere, request.param)(api_key=key, base_url=url, timeout=60)


@pytest.fixture
def client(make, server):
    return make(server.url)


def test_ranks(client, model, query, documents, ranking):
    answer = client.rerank(model=model, query=query, documents=documents)

    assert [(r.index, r.relevance_score) for r in answer.results] == ranking
    assert answer.id
    assert answer.meta.api_version.version == "2"
    assert answer.meta.billed_units.search_units == 1


@pytest.mark.parametrize(("top_n", "num_results"), [(None, 4), (1, 1), (3, 3), (99, 4)])
def test_top_n(client, model, query, documents, ranking, top_n, num_results):
    answer = client.rerank(model=model, query=query, documents=documents, top_n=top_n)

    assert [r.index for r in answer.results] == [index for index, _ in ranking[:num_results]]


def test_a_base_that_ends_in_v1(server, model, query, documents, ranking):
    """ClientV2 then asks /v1/v2/rerank."""
    client = cohere.ClientV2(api_key="anything", base_url=f"{server.url}/v1")
    answer = client.rerank(model=model, query=query, documents=documents)

    assert [r.index for r in answer.results] == [index for index, _ in ranking]


def test_async(server, model, query, documents, ranking):
    import asyncio

    async def ask():
        client = cohere.AsyncClientV2(api_key="anything", base_url=server.url)
        return await client.rerank(model=model, query=query, documents=documents)

    assert [r.index for r in asyncio.run(ask()).results] == [index for index, _ in ranking]


def test_a_model_of_theirs_under_an_alias(client, model, query, documents):
    assert len(client.rerank(model="rerank-v3.5", query=query, documents=documents).results) == 4


def test_an_unknown_model(client, query, documents, model):
    with pytest.raises(cohere.NotFoundError) as caught:
        client.rerank(model="rerank-v9", query=query, documents=documents)
    assert model in caught.value.body["message"]


def test_empty_input(client, model, query):
    with pytest.raises(cohere.BadRequestError) as caught:
        client.rerank(model=model, query=query, documents=[])
    assert caught.value.body["error"]["param"] == "documents"


def test_over_long_input_is_cut(client, model, query, documents, long_text):
    assert len(client.rerank(model=model, query=query, documents=[*documents, long_text]).results) == 5


def test_unauthorised(make, guarded, key, model, query, documents):
    with pytest.raises(cohere.UnauthorizedError):
        make(guarded.url, "not-the-right-key-at-all").rerank(model=model, query=query, documents=documents)
    assert make(guarded.url, key).rerank(model=model, query=query, documents=documents).results


def test_overload(make, guarded, key, model, query, documents, busy):
    """Without retries the client says so; what it would wait by is there."""
    client = make(guarded.url, key)

    def until_refused():
        for _ in range(200):
            client.rerank(model=model, query=query, documents=documents, request_options=NO_RETRY)

    with pytest.raises(cohere.TooManyRequestsError) as caught:
        until_refused()
    assert int(caught.value.headers["retry-after"]) > 0
    assert int(caught.value.headers["retry-after-ms"]) > 0


def test_overload_that_passes(make, guarded, key, model, query, documents):
    """The client's own retries get it through."""
    with ThreadPoolExecutor(4) as threads:
        client = make(guarded.url, key)
        again = {"max_retries": 10}
        calls = [
            threads.submit(client.rerank, model=model, query=query, documents=documents * 20, request_options=again)
            for _ in range(8)
        ]
        assert all(len(call.result().results) == 80 for call in calls)


def test_texts_that_were_indexed_are_scored_from_stored_states(client, server, model, query):
    texts = ["Stored once, and read by every query.", "A second passage that is stored."]
    passages = [{"id": f"p{i}", "text": text} for i, text in enumerate(texts)]
    stored = httpx.post(f"{server.url}/v1/collections/found/passages", json={"passages": passages}, timeout=60)
    assert stored.status_code == 200, stored.text

    asked = client.with_raw_response.rerank(model=model, query=query, documents=[*texts, "Sent for the first time."])

    assert asked.headers["x-preread-lookup"] == "2/3"
    assert len(asked.data.results) == 3
