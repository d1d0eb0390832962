"""Recipes of docs/engines that are built from an engine's documented contract: the requests that it sends, posted."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path

import httpx
import pytest

from preread.v1.rerank_pb2 import Candidate, RerankRequest
from tests.conformance.engine_pages import PAGES, blocks, says

QUERY = "what is the role of iron in the brain"
MAX_BYTES = 5000  # of a request with 100 candidates by id
BATCH = 32  # texts in a request of Milvus and Weaviate


@pytest.fixture(scope="module")
def candidates(server, abstracts) -> list[dict[str, str]]:
    """100 passages, stored as `docs`."""
    stored = httpx.post(f"{server.url}/v1/collections/docs/passages", json={"passages": abstracts}, timeout=60)
    assert stored.status_code == 200, stored.text
    return abstracts[:100]


def post(server, path: str, body: str) -> httpx.Response:
    return httpx.post(server.url + path, content=body.encode(), headers={"authorization": "Bearer any"}, timeout=60)


def opensearch(query: str, texts: list[str]) -> tuple[str, str]:
    """URL and body: ML Commons fills in parameters; strings are escaped and not quoted, lists are JSON."""
    (connector,) = map(json.loads, blocks("opensearch", "json"))
    (action,) = connector["actions"]
    body = action["request_body"].replace("${parameters.query}", json.dumps(query)[1:-1])
    return action["url"], body.replace("${parameters.documents}", compact(texts))


def elasticsearch(query: str, texts: list[str]) -> tuple[str, str]:
    """URL and body: templates of the service `custom` become JSON, quotes of strings included."""
    (endpoint,) = map(json.loads, blocks("elasticsearch", "json"))
    settings = endpoint["service_settings"]
    paths = {"relevance_score": "$.results[*].relevance_score", "reranked_index": "$.results[*].index"}
    assert settings["response"]["json_parser"] == paths
    body = settings["request"].replace("${query}", json.dumps(query)).replace("${input}", compact(texts))
    return settings["url"], body


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize("engine", [opensearch, elasticsearch])
class TestById:
    def test_the_request_is_the_one_that_the_page_shows(self, engine):
        url, body = engine(QUERY, ["19238542", "23180151"])

        path = url.removeprefix("http://preread.internal:8080")
        (shown,) = [one for one in blocks(engine.__name__, "") if one.startswith(f"POST {path} HTTP/1.1\n")]
        assert shown.strip().split("\n\n")[1] == body

    def test_every_candidate_has_a_score(self, engine, server, candidates):
        url, body = engine(QUERY, [one["id"] for one in candidates])

        answer = post(server, httpx.URL(url).path, body).json()
        # Both engines pair scores with hits by `index`, and fail where one is absent; OpenSearch casts to Double.
        assert sorted(one["index"] for one in answer["results"]) == list(range(100))
        assert all(isinstance(one["relevance_score"], float) for one in answer["results"])
        assert len(body.encode()) < MAX_BYTES
        says(engine.__name__, f"{len(body.encode()):,} bytes over HTTP")

    def test_by_text_as_the_page_says(self, engine, server, candidates):
        url, body = engine(QUERY, [one["text"] for one in candidates])
        by_id = {"collection", "passage_ids", "on_miss"}
        fields = json.loads(body)
        sent = {name: value for name, value in fields.items() if name not in by_id}

        answer = post(server, httpx.URL(url).path, compact(sent | {"documents": fields["passage_ids"]}))
        assert sorted(one["index"] for one in answer.json()["results"]) == list(range(100))
        assert answer.headers["x-preread-lookup"] == "100/100"

    def test_a_passage_that_is_not_stored_is_named(self, engine, server, candidates):
        url, body = engine('what is "iron"?', [candidates[0]["id"], "gone"])

        refused = post(server, httpx.URL(url).path, body)
        assert refused.status_code == 400
        assert "gone" in refused.json()["error"]["message"]


def test_uuids_as_ids_make_the_largest_request_that_the_index_names(server):
    ids = [str(uuid.uuid5(uuid.NAMESPACE_URL, f"{number}")) for number in range(100)]
    passages = [{"id": name, "text": f"Note {number}."} for number, name in enumerate(ids)]
    httpx.post(f"{server.url}/v1/collections/uuid/passages", json={"passages": passages}, timeout=60)

    body = compact({"query": QUERY, "collection": "uuid", "passage_ids": ids, "top_n": 10})
    message = RerankRequest(query=QUERY, collection="uuid", top_n=10, candidates=[Candidate(passage_id=i) for i in ids])
    assert len(post(server, "/v1/rerank", body).json()["results"]) == 10
    assert len(body) < MAX_BYTES
    index = " ".join((PAGES / "README.md").read_text().split())
    assert f"make {message.ByteSize():,} bytes over gRPC and {len(body):,} over HTTP" in index


def test_vespa(server, candidates, tmp_path, monkeypatch, capsys):
    """The page's program over a result of 100 hits in the format that the page shows."""
    first, query = blocks("vespa", "python")
    shown, body = map(json.loads, blocks("vespa", "json"))
    one = shown["root"]["children"][0]
    names = [f"id:docs:passage::{candidate['id']}" for candidate in candidates]
    shown["root"]["children"] = [one | {"id": name, "fields": {"documentid": name}} for name in names]
    monkeypatch.chdir(tmp_path)
    Path("passages.jsonl").write_text("".join(json.dumps(candidate) + "\n" for candidate in candidates))

    known: dict[str, object] = {"response": shown}
    for shown_address, real in (("127.0.0.1:50051", server.grpc_address), ("127.0.0.1:50052", server.encoder_address)):
        first = first.replace(shown_address, real)
    exec(compile(first, "vespa.md, block 1", "exec"), known)
    exec(compile(query, "vespa.md, block 2", "exec"), known)
    known["reranker"].close()

    assert [json.loads(line)["put"] for line in Path("feed.jsonl").read_text().splitlines()] == names
    sent = compact(body | {"passage_ids": [candidate["id"] for candidate in candidates]})
    answer = post(server, "/v1/rerank", sent).json()
    assert [one["id"] for one in answer["results"]] == [one.passage_id for one in known["ranking"]]
    assert len(capsys.readouterr().out.splitlines()) == 10
    says("vespa", f"{len(sent):,} bytes over HTTP")


@pytest.mark.parametrize(("block", "texts", "results"), [(0, "texts", None), (1, "documents", "results")])
def test_milvus(block, texts, results, server, candidates):
    """Both providers send every text, and read a score for each by its index."""
    shown = json.loads(blocks("milvus", "json")[block])
    assert set(shown) == {"query", texts}
    sent = compact(shown | {texts: [one["text"] for one in candidates]})

    answer = post(server, "/rerank", sent)
    scores = answer.json()[results] if results else answer.json()
    assert sorted(one["index"] for one in scores) == list(range(100))
    assert all("relevance_score" in one if results else "score" in one for one in scores)
    assert answer.headers["x-preread-lookup"] == "100/100"
    if not block:
        says("milvus", f"{len(sent.encode()) / 1000:.0f} KB")


def test_the_function_of_milvus_is_one():
    pytest.importorskip("pymilvus", reason="scripts/test-engines has it")
    (block,) = blocks("milvus", "python")
    known: dict[str, object] = {}
    exec(compile(block, "milvus.md", "exec"), known)

    assert known["ranker"].params["endpoint"] == "http://preread.internal:8080"


def test_weaviates_texts_take_four_requests(candidates):
    texts = [one["text"] for one in candidates]
    batches = [texts[begin : begin + BATCH] for begin in range(0, len(texts), BATCH)]
    sent = [compact({"query": QUERY, "documents": batch, "property": ""}) for batch in batches]

    assert len(sent) == 4
    says("weaviate", f"{sum(len(one.encode()) for one in sent) / 1000:.0f} KB")


def test_every_page_is_in_the_index():
    linked = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (PAGES / "README.md").read_text()))
    assert {page.name for page in PAGES.glob("*.md")} - {"README.md"} <= linked


def test_a_search_does_not_fail_with_its_reranker(server, candidates, capsys):
    """The index's function: over a server, over one that lacks a passage, over none."""
    (block,) = blocks("README", "python")
    known: dict[str, object] = {}
    exec(compile(block.replace("127.0.0.1:50051", server.grpc_address), "README.md", "exec"), known)
    ids = [one["id"] for one in candidates]
    try:
        best = known["order"](QUERY, [*ids[:5], "gone"])
    finally:
        known["reranker"].close()
    assert sorted(best[:5]) == sorted(ids[:5])
    assert best[5] == "gone"
    assert "not in Preread: ['gone']" in capsys.readouterr().out

    exec(compile(block.replace("127.0.0.1:50051", "127.0.0.1:1"), "README.md", "exec"), known)
    assert known["order"](QUERY, ids, top_n=3) == ids[:3]
    known["reranker"].close()
    assert "not reranked: " in capsys.readouterr().out
