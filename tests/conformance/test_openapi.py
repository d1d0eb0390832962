"""The OpenAPI document is one, and real answers are what it says."""

from __future__ import annotations

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

TEXTS = ["some text", "another text"]
BODIES = [
    ("Rerank", "/v1/rerank", {"query": "q", "documents": TEXTS, "return_documents": True, "return_margins": True}),
    ("Rerank", "/infinity/rerank", {"query": "q", "documents": TEXTS, "return_documents": True}),
    ("Tei", "/rerank", {"query": "q", "texts": TEXTS, "return_text": True, "truncation_direction": "Right"}),
    ("Nim", "/v1/ranking", {"query": {"text": "q"}, "passages": [{"text": text} for text in TEXTS]}),
    ("Voyage", "/v1/rerank", {"query": "q", "documents": TEXTS, "top_k": 1, "truncation": True}),
    ("Mixedbread", "/v1/reranking", {"query": "q", "input": TEXTS, "return_input": True}),
    ("Score", "/score", {"text_1": "q", "text_2": TEXTS}),
    ("Score", "/score", {"queries": ["q", "r"], "items": TEXTS}),
    ("Score", "/score", {"data_1": "q", "data_2": TEXTS}),
    ("Rerank", "/v1/rerank", {"query": "q", "documents": [{"id": 7, "a": "b"}], "rank_fields": ["a"]}),
    ("Pinecone", "/pinecone/rerank", {"query": "q", "documents": [{"text": "a", "n": [1]}], "return_documents": True}),
    ("Sglang", "/sglang/rerank", {"query": "q", "documents": TEXTS, "instruct": "Find"}),
    ("Isaacus", "/v1/rerankings", {"query": "q", "texts": TEXTS, "is_iql": False}),
    ("Weaviate", "/rerank", {"query": "q", "documents": [*TEXTS, ""], "property": ""}),
]


@pytest.fixture(scope="module")
def document(server):
    return httpx.get(f"{server.url}/openapi.json").json()


@pytest.fixture(scope="module")
def check(document):
    """check(name, value): value is an instance of that schema."""

    def check(name, value):
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        Draft202012Validator(schema).validate(value)

    return check


def test_it_is_an_openapi_document(document):
    validate(document)


@pytest.mark.parametrize(("name", "path", "body"), BODIES)
def test_bodies_and_answers_are_as_described(server, check, name, path, body):
    check(f"{name}Request", body)
    answer = httpx.post(server.url + path, json=body)
    assert answer.status_code == 200, answer.text
    check(f"{name}Answer", answer.json())


@pytest.mark.parametrize(
    ("path", "name"),
    [("/v1/models", "Models"), ("/info", "Info"), ("/health", "State"), ("/v1/collections", "Collections"),
     ("/v1/aliases", "Aliases"), ("/nowhere", "Error"), ("/tei/nowhere", "TeiError")],
)  # fmt: skip
def test_other_answers_are_as_described(server, check, path, name):
    check(name, httpx.get(server.url + path).json())


def test_passages_are_as_described(server, check):
    url = f"{server.url}/v1/collections/described"
    upload = {"passages": [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}], "compression_ratio": 8}
    check("UploadRequest", upload)
    check("Upload", httpx.post(f"{url}/passages", json=upload, timeout=30).json())
    check("Collection", httpx.get(url).json())
    check("Alias", httpx.put(f"{server.url}/v1/aliases/now", json={"collection": "described"}).json())
    check("Deleted", httpx.delete(f"{url}/passages/a").json())
    check("AliasDeleted", httpx.delete(f"{server.url}/v1/aliases/now").json())
