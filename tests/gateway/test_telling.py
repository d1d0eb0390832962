"""How a dialect is told: by prefix, --dialect, path, headers, then body; and every path that reaches one."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from decoder_server.config import DIALECTS
from decoder_server.edge.http import app, dialects
from preread_edge.access import ApiKeys

PINECONE = {"x-pinecone-api-version": "2026-04"}
FERN = {"x-fern-sdk-name": "voyageai"}
LITELLM = {"user-agent": "litellm/1.83.0"}
ISAACUS = {"user-agent": "Isaacus/Python 0.22.1"}

# path, headers, what stands next to query and documents (null: nothing) -> the names of the response, or of a rank
TOLD: dict[str, tuple[str, dict[str, str], dict[str, Any], str]] = {
    "cohere": ("/v2/rerank", {}, {}, "cohere"),
    "voyage for JavaScript, by its header": ("/v1/rerank", FERN, {}, "voyage"),
    "voyage for Python, by truncation": ("/v1/rerank", {}, {"truncation": True}, "voyage"),
    "voyage, by top_k": ("/v1/rerank", {}, {"top_k": 2}, "voyage"),
    "top_k next to top_n is no sign": ("/v1/rerank", {}, {"top_k": 2, "top_n": 2}, "cohere"),
    "pinecone, by its header": ("/rerank", PINECONE, {}, "pinecone"),
    "isaacus, by its path": ("/v1/rerankings", {}, {"documents": None, "texts": ["a", "b"]}, "isaacus"),
    "isaacus, by its header": ("/rerank", ISAACUS, {"documents": None, "texts": ["a", "b"]}, "isaacus"),
    "isaacus, by a field": ("/rerank", {}, {"documents": None, "texts": ["a"], "is_iql": False}, "isaacus"),
    "tei": ("/rerank", {}, {"documents": None, "texts": ["a", "b"]}, "tei"),
    "sglang, by instruct": ("/v1/rerank", {}, {"instruct": "Find passages"}, "sglang"),
    "DashScope, by its path": ("/compatible-api/v1/reranks", {}, {"instruct": "Find passages"}, "cohere"),
    "weaviate, by property": ("/rerank", {}, {"property": ""}, "weaviate"),
    "litellm, by its header": ("/v1/rerank", LITELLM, {}, "litellm"),
    "litellm for infinity or vLLM": ("/rerank", LITELLM, {}, "cohere"),
    "litellm for TEI": ("/rerank", LITELLM, {"documents": None, "texts": ["a", "b"]}, "tei"),
    "litellm for NIM": ("/v1/ranking", LITELLM, {"documents": None, "passages": ["a", "b"]}, "nim"),
    "a prefix goes before a header": ("/cohere/rerank", PINECONE, {}, "cohere"),
    "a prefix goes before the body": ("/cohere/v1/rerank", {}, {"truncation": True}, "cohere"),
    "a header goes before the body": ("/rerank", PINECONE, {"truncation": True}, "pinecone"),
}
SHAPES = {
    "cohere": {"object", "id", "created", "model", "results", "usage", "meta"},
    "litellm": {"object", "id", "created", "model", "results", "data", "usage", "meta"},
    "voyage": {"object", "data", "model", "usage"},
    "pinecone": {"model", "data", "usage"},
    "isaacus": {"results", "usage"},
    "weaviate": {"query", "scores"},
    "nim": {"rankings"},
    "mixedbread": {"object", "data", "model", "usage"},
    "tei": {"index", "score"},  # of a rank, where the response is a list
    "sglang": {"index", "score", "document", "meta_info"},
}
LISTS = {"tei": "texts", "nim": "passages", "mixedbread": "input", "isaacus": "texts"}


def shape(response: Any) -> set[str]:
    assert response.status_code == 200, response.text
    document = response.json()
    return set(document[0] if isinstance(document, list) else document)


@pytest.mark.parametrize("case", TOLD)
def test_told(running, query, documents, case):
    path, headers, more, dialect = TOLD[case]
    response = running.post(path, {"query": query, "documents": documents} | more, headers=headers)

    assert shape(response) == SHAPES[dialect]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_prefix_in_front_of_any_path_tells(running, query, documents, dialect):
    for path in ("/rerank", "/v1/rerank", "/api/reranks"):
        body = {"query": query, LISTS.get(dialect, "documents"): documents}
        found = shape(running.post(f"/{dialect}{path}", body))
        assert found == SHAPES[{"jina": "cohere", "vllm": "cohere", "infinity": "cohere"}.get(dialect, dialect)]


def test_pairs_are_scored_behind_the_prefixes_of_servers_that_score_pairs(running, query, documents):
    plain = running.post("/score", {"text_1": query, "text_2": documents}).json()["data"]
    for path in ("/vllm/score", "/jina/v1/score", "/cohere/score"):
        assert running.post(path, {"queries": query, "documents": documents}).json()["data"] == plain
    assert running.post("/tei/score", {"text_1": query, "text_2": documents}).json()["error_type"] == "validation"


def test_names_are_those_of_the_flag():
    assert tuple(dialects.DIALECTS) == DIALECTS
    assert set(get_args(dialects.Score)) < set(dialects._BODIES)


@pytest.mark.parametrize("dialect", ["pinecone", "weaviate", "sglang", "infinity"])
def test_a_flag_fixes_one_dialect_unless_the_path_says_another(run, query, documents, dialect):
    body = {"query": query, "documents": documents}
    with run(http={"dialect": dialect}) as one:
        expected = SHAPES["cohere" if dialect == "infinity" else dialect]
        for headers, more in (({}, {}), (PINECONE, {}), (FERN, {"truncation": True}), ({}, {"top_k": 1})):
            assert shape(one.post("/v1/rerank", body | more, headers=headers)) == expected
        assert shape(one.post("/voyage/v1/rerank", body)) == SHAPES["voyage"]
        pairs = one.post("/score", {"text_1": query, "text_2": documents}).json()
        assert [item["object"] for item in pairs["data"]] == ["score"] * 4
        refused = one.http.post("/v1/rerank", content=b"{")
        assert isinstance(refused.json()["error"], str) == (dialect == "weaviate")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/v1/rerank", "/v2/v2/rerank", "/reranks", "/v1/reranks", "/v1/reranking", "/v2/rerankings", "/ranking",
        "/cohere/v2/rerank", "/openai/deployments/m/rerank", "/inference/v1/rerank", "/api/v1/rerank/", "/v1/rank",
        "/v1/v1/score", "/compatible-api/v1/reranks", "/v1/reranker",
    ],
)  # fmt: skip
def test_any_path_that_ends_in_a_rerank_word_reaches_a_dialect(running, path):
    best = [(one["index"], one["relevance_score"]) for one in running.ask()["results"]]

    assert [(one["index"], one["relevance_score"]) for one in running.ask(path)["results"]] == best
    get = running.http.get(path)
    assert (get.status_code, get.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("path", ["/v1/rerankk", "/prerank", "/v1/rerank/more", "/v1/embeddings", "/rerank.json"])
def test_no_other_path_does(running, query, documents, path):
    assert running.post(path, {"query": query, "documents": documents}).status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/v1/collections/docs/rerank", "/voyage/v1/collections/docs/rerank", "/x/v1/collections/a/b/rerank",
     "/v1/aliases/live/rerank"],
)  # fmt: skip
def test_a_key_that_may_only_index_ranks_nowhere(run, query, documents, path):
    with run(keys=ApiKeys.parse(["rerank:a-key-0123456789abc", "index:b-key-0123456789abc"])) as one:
        body = {"query": query, "documents": documents}
        codes = [
            one.post(path, body, headers={"authorization": f"Bearer {key}-key-0123456789abc"}).status_code
            for key in "ab"
        ]
    assert set(codes) <= {403, 404, 405}
    assert 200 not in codes


def test_the_path_of_nim_names_the_model_behind_a_prefix_too(running, query, documents):
    for path in ("/v1/retrieval/nvidia/other/reranking", "/nim/v1/retrieval/nvidia/other/reranking"):
        response = running.post(path, {"query": query, "passages": documents})
        assert (response.status_code, "'nvidia/other'" in response.json()["message"]) == (404, True)
    path = f"/v1/retrieval/{running.engine.name}/reranking"
    assert len(running.post(path, {"query": query, "passages": documents}).json()["rankings"]) == 4


def test_one_model(running):
    name = running.engine.name
    (listed,) = running.http.get("/v1/models").json()["data"]
    for path in (f"/v1/models/{name}", "/v1/models/default", f"/voyage/v1/models/{name}"):
        assert running.http.get(path).json() | {"stats": {}} == listed | {"stats": {}}
    assert running.http.get(f"/infinity/v1/models/{name}").json()["owned_by"] == "infinity"
    unknown = running.http.get("/v1/models/nvidia/other")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("prefix", ["", "/nim", "/weaviate"])
def test_health_of_nim_and_weaviate(running, prefix):
    for state in ("ready", "live"):
        nim = running.http.get(f"{prefix}/v1/health/{state}")
        message = f"Service is {state}."
        assert (nim.status_code, nim.json()) == (
            200,
            {"object": "health.response", "message": message, "status": state},
        )
        assert running.http.get(f"{prefix}/.well-known/{state}").status_code == 200
    assert running.http.get(f"{prefix}/meta").json()["model_id"] == running.engine.name


def test_health_needs_no_key_and_tells_that_the_server_stops(run):
    with run(keys=ApiKeys.parse(["a-key-0123456789abc"])) as one:
        for draining, status in ((False, 200), (True, 503)):
            one.gateway.context.draining = draining
            for prefix in ("", "/weaviate"):
                assert one.http.get(f"{prefix}/.well-known/live").status_code == 200
                assert one.http.get(f"{prefix}/v1/health/live").status_code == 200
                assert one.http.get(f"{prefix}/.well-known/ready").status_code == status
                assert one.http.get(f"{prefix}/v1/health/ready").status_code == status
        assert one.http.get("/meta").status_code == 401


def test_a_path_of_hostile_length_costs_little(running):
    for path in ("/" + "v1/" * 4000 + "rerank", "/" + "a" * 15_000 + "/rerank", "/" + "rerank/" * 2000):
        assert running.http.post(path, content=b"{}").status_code == 404


def test_an_error_is_read_by_weaviates_client_whatever_failed(running, query):
    """Its Go client reads `error` as a string."""
    for content in (json.dumps({"query": query, "documents": [], "property": ""}), '{"query": 1, "property": "", ['):
        assert isinstance(running.http.post("/rerank", content=content).json()["error"], str)
    assert isinstance(running.http.post("/weaviate/nowhere", content=b"").json()["error"], str)


def test_prefixes_have_no_paths_of_their_own(running):
    assert running.http.post("/voyage", content=b"{}").status_code == 404
    assert not [path for path in (one.path for one in app.OPERATIONS) if dialects.without_prefix(path) != path]
