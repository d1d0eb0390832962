"""Passages are listed to callers that may read them, and a listing that Redis cuts short can begin again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preread import Client, ClientOptions, InvalidRequest, NotFound, PermissionDenied, Unauthenticated, Unavailable
from preread_cli.passages import passage_ids
from preread_edge.access import ApiKeys
from tests.redis_fixture import RedisServer

READS, WRITES = "reads-0123456789ab", "writes-0123456789"


def client_of(running: Any, key: str | None = None) -> Client:
    return Client(f"127.0.0.1:{running.server.port}", options=ClientOptions(api_key=key, timeout_seconds=30.0))


def test_a_key_that_may_rerank_may_list_and_no_other(run, documents):
    passages = {"passages": [{"id": f"d{i}", "text": text} for i, text in enumerate(documents)]}
    with run(keys=ApiKeys.parse([f"rerank:{READS}", f"index:{WRITES}"])) as guarded:
        url = "/v1/collections/docs/passages"
        guarded.post(url, passages, headers={"api-key": WRITES}).raise_for_status()
        statuses = [guarded.http.get(url, headers={"api-key": key}).status_code for key in (READS, WRITES, "")]
        assert statuses == [200, 403, 401]
        assert guarded.http.get("/v1/collections/docs", headers={"api-key": WRITES}).status_code == 200
        with client_of(guarded, READS) as reader:
            assert sorted(reader.list_passages("docs")) == ["d0", "d1", "d2", "d3"]
        for key, error in ((WRITES, PermissionDenied), (None, Unauthenticated)):
            with client_of(guarded, key) as stranger, pytest.raises(error):
                list(stranger.list_passages("docs"))


def test_an_empty_collection_has_no_ids_and_an_unknown_one_is_not_found(running, documents):
    url = "/v1/collections/emptied/passages"
    running.post(url, {"passages": [{"id": "d0", "text": documents[0]}]}).raise_for_status()
    running.http.delete(f"{url}/d0").raise_for_status()
    assert running.http.get(url).json() == {"object": "list", "data": [], "next_page_token": ""}
    with client_of(running) as client:
        assert list(client.list_passages("emptied")) == []
        with pytest.raises(NotFound, match="'no-such' does not exist"):
            list(client.list_passages("no-such"))


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis whose passages outlive it."""
    server = RedisServer(tmp_path / "redis", "--appendonly", "yes", "--appendfsync", "always").start()
    yield server
    server.stop()


class Disturbed(Client):
    """Redis ends, and starts again, after the first page of the first listing."""

    redis: RedisServer
    num_listings = 0

    def list_passages(self, *arguments: Any, **settings: Any) -> Iterator[str]:
        self.num_listings += 1
        for number, one in enumerate(super().list_passages(*arguments, **settings | {"page_size": 100})):
            yield one
            if (self.num_listings, number) == (1, 0):
                self.redis.kill()
                with pytest.raises(Unavailable, match="redis:"):
                    list(super().list_passages("docs", timeout=5.0))
                self.redis.start()


def test_a_redis_that_restarts_ends_a_listing_and_the_command_begins_again(run, durable):
    ids = [f"d{i}" for i in range(400)]
    passages = [{"id": one, "text": f"text {one}"} for one in ids]
    with run(durable.url) as running:
        running.post("/v1/collections/docs/passages", {"passages": passages}).raise_for_status()
        with Disturbed(f"127.0.0.1:{running.server.port}") as client:
            client.redis = durable
            assert passage_ids(client, {"ids": None, "collection": "docs"}) == sorted(ids)
            assert client.num_listings == 2

            client.num_listings = 0
            with pytest.raises(InvalidRequest, match="Redis server has restarted"):
                list(client.list_passages("docs"))
