"""Who may ask what, by key and scope."""

from __future__ import annotations

from preread_edge.access import ApiKeys


def test_keys_and_scopes(run, query, documents):
    keys = ApiKeys.parse(["rerank:rerank-key-0123456789", "index:index-key-01234567890"])
    body = {"query": query, "documents": documents}
    with run(keys=keys) as guarded:
        none = guarded.post("/v1/rerank", body)
        wrong = guarded.post("/tei/rerank", body, headers={"authorization": "Bearer nobody-knows-this-one"})
        other = guarded.post("/v1/rerank", body, headers={"authorization": "Bearer index-key-01234567890"})
        right = guarded.post("/v1/rerank", body, headers={"authorization": "Bearer rerank-key-0123456789"})
        named = guarded.post("/v1/rerank", body, headers={"api-key": "rerank-key-0123456789"})
        upload = guarded.post("/v1/collections/c/passages", {}, headers={"api-key": "rerank-key-0123456789"})
        health = guarded.http.get("/health")
        models = guarded.http.get("/v1/models")

    assert [r.status_code for r in (none, wrong, other, right, named, upload, health, models)] == [
        401, 401, 403, 200, 200, 403, 200, 401
    ]  # fmt: skip
    assert none.json()["error"]["code"] == "invalid_api_key"
    assert none.headers["x-request-id"]
    assert set(wrong.json()) == {"error", "error_type"}


def test_aliases_need_a_key_that_may_do_everything(run):
    keys = ApiKeys.parse(["rerank:rerank-key-0123456789", "rules-0123456789ab"])
    given = [
        {"authorization": "Bearer rerank-key-0123456789"},
        {"authorization": "Bearer rules-0123456789ab"},
        {"x-api-key": "rules-0123456789ab"},
    ]
    with run(keys=keys) as guarded:
        answers = [guarded.http.delete("/v1/aliases/none", headers=one).status_code for one in given]
    assert answers == [403, 404, 404]


def test_a_closer_look_needs_the_scope_of_asking(run, query, documents):
    keys = ApiKeys.parse(["rerank:rerank-key-0123456789", "index:index-key-01234567890"])
    body = {"query": query, "documents": documents}
    with run(keys=keys) as guarded:
        given = [{}, {"api-key": "index-key-01234567890"}, {"api-key": "rerank-key-0123456789"}]
        assert [guarded.post("/v1/explain", body, headers=one).status_code for one in given] == [401, 403, 200]
        # the page itself asks for the key
        assert guarded.http.get("/").status_code == 200


def test_a_bound_key_reaches_its_collections_alone(run, query, documents):
    keys = ApiKeys.parse(["rerank,index@docs,live:bound-key-0123456789", "admin-key-0123456789"])
    bound, admin = {"api-key": "bound-key-0123456789"}, {"api-key": "admin-key-0123456789"}
    secret = {"passages": [{"id": "s", "text": "what no other caller may know"}]}
    by_text = {"query": query, "documents": [documents[0], "what no other caller may know"]}
    with run(keys=keys) as guarded:
        own = guarded.post(
            "/v1/collections/docs/passages", {"passages": [{"id": "a", "text": documents[0]}]}, headers=bound
        )
        assert own.status_code == 200
        assert guarded.post("/v1/collections/secret/passages", secret, headers=admin).status_code == 200
        refused = [
            guarded.post("/v1/collections/secret/passages", secret, headers=bound),
            guarded.post("/v1/rerank", {"query": query, "collection": "secret", "passage_ids": ["s"]}, headers=bound),
            guarded.post("/v1/rerank", {"query": query, "collection": "none", "passage_ids": ["s"]}, headers=bound),
            guarded.http.get("/v1/collections/secret", headers=bound),
            guarded.http.get("/v1/collections/secret/passages", headers=bound),
            guarded.http.get("/metrics", headers=bound),
        ]
        assert [one.status_code for one in refused] == [403] * 6
        listed = [guarded.http.get("/v1/collections", headers=one).json()["data"] for one in (bound, admin)]
        assert [[one["id"] for one in each] for each in listed] == [["docs"], ["docs", "secret"]]
        found = [guarded.post("/v1/rerank", by_text, headers=one).headers["x-preread-lookup"] for one in (bound, admin)]
        assert found == ["1/2", "2/2"]
        again = guarded.post("/v1/rerank", by_text, headers=bound)  # and nothing that another key had encoded is told
        assert again.headers["x-preread-lookup"] == "1/2"
