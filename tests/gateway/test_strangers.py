"""Web pages, names and addresses that are not this server's: they read nothing and write nothing."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from preread_edge.access import ApiKeys

FOREIGN = {"origin": "http://evil.example"}
JSON = {"content-type": "application/json"}
APP = "https://app.example"


def stored(one: Any, name: str) -> int:
    found = one.http.get(f"/v1/collections/{name}")
    return int(found.json()["num_passages"]) if found.status_code == 200 else 0


PASSAGES = json.dumps({"passages": [{"id": "p", "text": "crimson"}]})
# method, path, body: everything that reads or writes
CALLS = (
    ("GET", "/v1/collections", ""),
    ("GET", "/v1/models", ""),
    ("GET", "/health", ""),
    ("GET", "/metrics", ""),
    ("GET", "/", ""),
    ("GET", "/nowhere", ""),
    ("POST", "/v1/rerank", '{"query": "q", "documents": ["d"]}'),
    ("POST", "/v1/explain", '{"query": "q", "documents": ["d"]}'),
    ("POST", "/v1/collections/strange/passages", PASSAGES),
    ("DELETE", "/v1/collections/strange/passages/p", ""),
    ("DELETE", "/v1/collections/strange/passages?id=p", ""),
    ("PUT", "/v1/aliases/strange", '{"collection": "strange"}'),
    ("DELETE", "/v1/aliases/strange", ""),
    ("OPTIONS", "/v1/rerank", ""),
)


@pytest.mark.parametrize(("method", "path", "content"), CALLS, ids=[f"{method} {path}" for method, path, _ in CALLS])
@pytest.mark.parametrize("strange", [FOREIGN, {"host": "evil.example"}, {"origin": "null"}], ids=str)
def test_nothing_is_read_or_written_by_a_stranger(
    running: Any, method: str, path: str, content: str, strange: dict[str, str]
) -> None:
    kinds = ("application/json", "text/plain", "application/x-www-form-urlencoded", "application/x-ndjson")
    for kind in kinds if content else ("",):
        headers = strange | ({"content-type": kind} if kind else {})
        response = running.http.request(method, path, content=content, headers=headers)
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "permission_error"
        assert "access-control-allow-origin" not in response.headers
        assert response.headers["x-request-id"]
    assert stored(running, "strange") == 0


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "text/json", "*/*", ""]
)
def test_a_write_says_that_it_is_json(running: Any, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    for method, path, content in (
        ("POST", "/v1/collections/typed/passages", PASSAGES),
        ("PUT", "/v1/aliases/typed", '{"collection": "typed"}'),
        ("DELETE", "/v1/collections/typed/passages", '{"ids": ["p"]}'),
    ):
        response = running.http.request(method, path, content=content, headers=headers)
        assert response.status_code == 415
        assert response.json()["error"]["code"] == "unsupported_media_type"
        assert "application/json" in response.json()["message"]
    assert stored(running, "typed") == 0


def test_what_says_so_is_written(running: Any) -> None:
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        path = "/v1/collections/said/passages"
        response = running.http.post(path, content=PASSAGES, headers={"content-type": kind})
        assert response.status_code == 200, response.text
    assert stored(running, "said") == 1


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "application/json", None])
def test_curl_ranks_as_it_is(running: Any, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    content = '{"query": "q", "documents": ["d"]}'
    assert running.http.post("/v1/rerank", content=content, headers=headers).status_code == 200


def test_the_servers_own_page_may_call(running: Any) -> None:
    for host in ("127.0.0.1", "localhost"):
        name = f"{host}:{running.gateway.port}"
        headers = {"host": name, "origin": f"http://{name}", "sec-fetch-site": "same-origin"}
        assert running.post("/v1/rerank", {"query": "q", "documents": ["d"]}, headers=headers).status_code == 200


def test_a_page_that_is_named_may_do_everything_and_reads_the_errors_too(run: Any) -> None:
    with run(
        http={"allowed_origins": (APP,), "max_body_bytes": 1000}, keys=ApiKeys.parse(["a-key-0123456789abc"])
    ) as one:
        origin = {"origin": APP}
        key = {"authorization": "Bearer a-key-0123456789abc"}
        for method, headers in (("DELETE", "authorization"), ("PUT", "Content-Type, X-Fern-Language"), ("POST", "")):
            asked = {"access-control-request-method": method, "access-control-request-headers": headers}
            before = one.http.options("/v1/collections/c/passages", headers=origin | asked)
            assert before.status_code == 204
            assert before.headers["access-control-allow-origin"] == APP
            assert method in before.headers["access-control-allow-methods"]
            allowed = before.headers["access-control-allow-headers"].split(", ")
            assert {"authorization", "content-type", "x-request-id", "x-api-key", "api-key"} <= set(allowed)
            assert set(filter(None, headers.lower().split(", "))) <= set(allowed)
            assert int(before.headers["access-control-max-age"]) > 0
            assert "origin" in before.headers["vary"].lower()
        body = {"query": "q", "documents": ["d"]}
        answers = [
            one.post("/v1/rerank", body, headers=origin | key),
            one.post("/v1/rerank", body, headers=origin),
            one.post("/v1/rerank", {"query": "q"}, headers=origin | key),
            one.http.get("/nowhere", headers=origin | key),
            one.http.get("/v1/rerank", headers=origin | key),
            one.post("/v1/rerank", {"query": "q" * 2000}, headers=origin | key),
            one.http.post("/v1/collections/c/passages", content="{}", headers=origin | key),
        ]
        foreign = {"origin": "https://other.example", "access-control-request-method": "POST"}
        refused = one.http.options("/v1/rerank", headers=foreign)

    assert [answer.status_code for answer in answers] == [200, 401, 400, 404, 405, 413, 415]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == APP
        assert answer.headers["vary"] == "origin"
        assert "access-control-allow-credentials" not in answer.headers
        exposed = answer.headers["access-control-expose-headers"]
        assert all(name in exposed for name in ("x-request-id", "retry-after", "x-preread-read"))
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers


def test_with_keys_any_name_will_do_but_no_page(run: Any) -> None:
    key = {"authorization": "Bearer a-key-0123456789abc"}
    with run(keys=ApiKeys.parse(["a-key-0123456789abc"])) as one:
        body = {"query": "q", "documents": ["d"]}
        assert one.post("/v1/rerank", body, headers=key | {"host": "rank.example"}).status_code == 200
        assert one.post("/v1/rerank", body, headers=key | FOREIGN).status_code == 403


def test_a_key_may_come_without_the_word_before_it(run: Any) -> None:
    key = "a-key-0123456789abc"
    with run(keys=ApiKeys.parse([key])) as one:
        body = {"query": "q", "documents": ["d"]}
        given = (key, f"Bearer {key}", f"bearer  {key}", f"Basic {key}", f"{key} {key}", "Bearer", "")
        codes = [one.post("/v1/rerank", body, headers={"authorization": value}).status_code for value in given]
    assert codes == [200, 200, 200, 401, 401, 401, 401]


# name of the field of the texts -> whether the dialect's errors are TEI's
DIALECTS = {"documents": False, "texts": True, "passages": False, "input": False}


def is_tei(response: httpx2.Response) -> bool:
    document = response.json()
    if set(document) == {"error", "error_type"}:
        return isinstance(document["error"], str)
    assert set(document) == {"error", "message", "detail"}
    return False


@pytest.mark.parametrize("field", DIALECTS)
def test_an_error_from_outside_a_dialect_has_its_shape(run: Any, field: str) -> None:
    body = {"query": "q", field: ["d"]}
    with run(keys=ApiKeys.parse(["rerank:a-key-0123456789abc", "index:b-key-0123456789abc"])) as one:
        key = {"authorization": "Bearer a-key-0123456789abc"}
        answers = [
            one.post("/rerank", body),
            one.post("/rerank", body, headers={"authorization": "Bearer b-key-0123456789abc"}),
            one.post("/rerank", body, headers=key | FOREIGN),
            one.post("/nowhere", body, headers=key),
            one.post("/rerank", body, headers=key | {"x-request-timeout-ms": "soon"}),
            one.http.post("/rerank", content=json.dumps(body)[:-1], headers=key),
            one.post("/rerank", {"query": "q" * 100_000, **body, "model": "another"}, headers=key),
        ]
    assert [answer.status_code for answer in answers] == [401, 403, 403, 404, 400, 400, 404]
    assert [is_tei(answer) for answer in answers] == [DIALECTS[field]] * len(answers)

    with run(http={"max_body_bytes": 100, "timeout_seconds": 0.3}) as small:
        declared = small.post("/rerank", body | {field: ["d" * 200]})
        chunked = small.http.post("/rerank", content=iter([json.dumps(body | {field: ["d" * 200]}).encode()]))
        late = small.http.post("/rerank", content=slowly(json.dumps(body).encode()))
    assert [answer.status_code for answer in (declared, chunked, late)] == [413, 413, 408]
    assert [is_tei(answer) for answer in (declared, chunked, late)] == [DIALECTS[field]] * 3


def slowly(body: bytes) -> Any:
    """A body whose end takes its time."""
    import time

    yield body[:-1]
    time.sleep(1)
    yield body[-1:]


@pytest.mark.parametrize("field", DIALECTS)
def test_a_connection_too_many_is_told_so_in_its_dialect(run: Any, field: str) -> None:
    import socket

    with run(http={"max_connections": 1}) as small, socket.create_connection(("127.0.0.1", small.gateway.port)):
        response = small.post("/rerank", {"query": "q", field: ["d"]})
    assert response.status_code == 429
    assert is_tei(response) == DIALECTS[field]
