"""The clients for JavaScript of Voyage and Pinecone, where there is node: each by nothing but the URL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CLIENTS = Path(__file__).with_name("clients.js")
PACKAGES = os.environ.get("PREREAD_NODE_PATH", "")  # scripts/test-conformance sets it where it found npm

pytestmark = pytest.mark.skipif(not PACKAGES or shutil.which("node") is None, reason="node and npm are not installed")


def call(client: str, url: str, model: str, **given: object) -> dict:
    """{"results": [[index, score, document]]}, or {"error"}."""
    done = subprocess.run(
        ["node", str(CLIENTS), client, url, model, json.dumps(given)],
        env=os.environ | {"NODE_PATH": PACKAGES},
        capture_output=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", ["/v1", "/voyage/v1"])
@pytest.mark.parametrize(
    "more", [{}, {"topK": 2}, {"returnDocuments": True}, {"truncation": False}], ids=lambda one: str(one)
)
def test_voyage(server, model, query, documents, ranking, path, more):
    answer = call("voyage", server.url + path, model, query=query, documents=documents, **more)

    texts = documents if more.get("returnDocuments") else [None] * 4
    assert answer["results"] == [[index, score, texts[index]] for index, score in ranking[: more.get("topK", 4)]]


@pytest.mark.parametrize("more", [{}, {"topN": 2}, {"returnDocuments": False}], ids=lambda one: str(one))
def test_pinecone(server, model, query, documents, ranking, more):
    sent = [{"text": text, "id": f"row-{i}"} for i, text in enumerate(documents)]
    answer = call("pinecone", server.url, model, query=query, documents=sent, **more)
    plain = call("pinecone", server.url, model, query=query, documents=documents, **more)

    expected = ranking[: more.get("topN", 4)]
    documents_of = [sent[index] for index, _ in expected] if more.get("returnDocuments", True) else [None] * 4
    assert answer["results"] == [[*ranks, one] for ranks, one in zip(expected, documents_of, strict=True)]
    assert [one[:2] for one in plain["results"]] == [[*ranks] for ranks in expected]


def test_an_error_says_why(server, model, query, documents):
    voyage = call("voyage", f"{server.url}/v1", "another-model", query=query, documents=documents)
    fields = {"documents": [{"text": "a"}], "rankFields": ["absent"]}
    pinecone = call("pinecone", server.url, model, query=query, **fields)

    assert "served here" in voyage["error"]
    assert "rank_fields: absent" in pinecone["error"]
