"""Search by words and throw-away collections over HTTP: what the page at / calls."""

from __future__ import annotations

from typing import Any

from preread_edge.access import ApiKeys
from tests.redis_fixture import RedisServer

TEXTS = {"sky": "The sky is blue.", "grass": "Grass is green.", "sea": "The sea is blue, as is the sky: blue."}


def store(running: Any, name: str, texts: dict[str, str] = TEXTS, **settings: Any) -> None:
    passages = [{"id": one, "text": text} for one, text in texts.items()]
    response = running.post(f"/v1/collections/{name}/passages", {"passages": passages, **settings})
    assert response.json()["num_stored"] == len(texts), response.text


def search(running: Any, name: str, **body: Any) -> Any:
    return running.post(f"/v1/collections/{name}/search", {"query": "blue sky"} | body)


def ids(response: Any) -> list[str]:
    assert response.status_code == 200, response.text
    return [one["id"] for one in response.json()["data"]]


def test_passages_are_found_by_words_under_a_name_or_an_alias(running):
    store(running, "words")
    running.http.put("/v1/aliases/live-words", json={"collection": "words"}).raise_for_status()
    found = search(running, "words").json()
    assert (found["object"], found["collection"]) == ("list", "words")
    assert [one["id"] for one in found["data"]] == ["sky", "sea"]
    assert found["data"][0]["score"] > found["data"][1]["score"] > 0
    assert ids(search(running, "live-words", top_n=1)) == ["sky"]
    assert ids(search(running, "words", query="of the unheard")) == []


def test_a_change_is_found_and_what_was_deleted_is_not(running):
    store(running, "changing")
    assert ids(search(running, "changing", query="green")) == ["grass"]
    store(running, "changing", {"moss": "Moss is green, green moss."})
    running.http.delete("/v1/collections/changing/passages/grass").raise_for_status()
    assert ids(search(running, "changing", query="green")) == ["moss"]


def test_what_cannot_be_searched_names_field_value_and_expectation(running):
    store(running, "mute", store_text=False)
    store(running, "spoken")
    limit = running.engine.limits.max_query_bytes
    for status, name, body, message in [
        (400, "mute", {}, "collection is 'mute'; expected a collection that stores its texts"),
        (400, "spoken", {"query": " "}, "query is ' '; expected words to search for"),
        (400, "spoken", {"query": "x" * (limit + 1)}, f"query is '{limit + 1} bytes'; expected at most {limit}"),
        (400, "spoken", {"query": 3}, "query is 'a number'; expected a string"),
        (400, "spoken", {"top_n": 1001}, "top_n is 1001; expected 0..1000"),
        (400, "spoken", {"topn": 1}, "topn is 1; expected a known field: did you mean top_n?"),
        (404, "nowhere", {}, "'nowhere' does not exist"),
        (400, "-", {}, "expected 1 to 128 of letters"),
    ]:
        response = search(running, name, **body)
        assert response.status_code == status, response.text
        assert message in response.json()["message"]


def test_an_index_over_its_budget_is_refused(run):
    with run(http={"max_search_bytes": 2000}) as one:
        store(one, "docs", {f"p{i}": f"word{i} other{i}" for i in range(40)})
        refused = search(one, "docs")
        assert refused.status_code == 400
        assert "whose index fits --search-cache-bytes (2,000)" in refused.json()["message"]
    with run(http={"max_search_bytes": 0}) as one:
        assert "--search-cache-bytes is 0" in search(one, "docs").json()["message"]


def test_searching_needs_the_scope_of_ranking_and_a_collection_of_the_key(run):
    scoped = ["rerank:rerank-key-0123456789", "index:index-key-01234567890", "rerank@docs:bound-key-0123456789"]
    keys = ApiKeys.parse([*scoped, "admin-key-0123456789"])
    with run(keys=keys) as guarded:
        guarded.http.headers["api-key"] = "admin-key-0123456789"
        store(guarded, "docs")
        store(guarded, "secret")
        del guarded.http.headers["api-key"]
        statuses = {}
        for key in ("", "index-key-01234567890", "rerank-key-0123456789", "bound-key-0123456789"):
            body = {"query": "sky"}
            statuses[key[:5]] = [
                guarded.post(f"/v1/collections/{name}/search", body, headers={"api-key": key}).status_code
                for name in ("docs", "secret")
            ]
    assert statuses == {"": [401, 401], "index": [403, 403], "reran": [200, 200], "bound": [200, 403]}


def test_a_throw_away_collection_is_dropped_by_those_who_may_write_and_no_other_is(run):
    keys = ApiKeys.parse(["rerank:rerank-key-0123456789", "index:index-key-01234567890", "admin-key-0123456789"])
    with run(keys=keys) as guarded:
        guarded.http.headers["api-key"] = "index-key-01234567890"
        store(guarded, "throwaway-1")
        store(guarded, "kept")
        url = "/v1/collections/throwaway-1"
        for key in ("rerank-key-0123456789", ""):
            assert guarded.http.delete(url, headers={"api-key": key}).status_code in (401, 403)
        answers = [guarded.http.delete(one) for one in ("/v1/collections/kept", url, url)]
        assert [one.status_code for one in answers] == [400, 200, 404]
        expected = "a name that begins with throwaway-; `preread collection drop` removes others"
        assert answers[0].json()["message"] == f"collection is 'kept'; expected {expected}"
        assert answers[1].json() == {"object": "collection.dropped", "collection": "throwaway-1", "num_passages": 3}
        left = guarded.http.get("/v1/collections").json()["data"]
        assert [one["id"] for one in left] == ["kept"]


def test_one_that_an_alias_points_at_stays(running):
    store(running, "throwaway-used")
    running.http.put("/v1/aliases/used", json={"collection": "throwaway-used"}).raise_for_status()
    refused = running.http.delete("/v1/collections/throwaway-used")
    assert refused.status_code == 400
    assert "is in use by the aliases ['used']" in refused.json()["message"]


def test_texts_are_not_looked_up_in_a_throw_away_collection(run, documents):
    with run() as one:
        store(one, "throwaway-1", {"d0": documents[0]}, compression_ratio=8)
        answer = one.post("/v1/rerank", {"query": "q", "documents": documents})
        assert answer.headers.get("x-preread-lookup", "") == ""
        assert answer.headers["x-preread-read"] == "4"  # the model's default


def test_redis_is_searched_too(run, tmp_path):
    server = RedisServer(tmp_path / "redis").start()
    try:
        with run(server.url, read_budget_seconds=20.0) as one:
            store(one, "docs")
            assert ids(search(one, "docs")) == ["sky", "sea"]
    finally:
        server.stop()
