"""What the gateway says about itself, before, while and after it can answer."""

from __future__ import annotations

import time

import httpx2
import pytest

from decoder_server.config import HttpConfig
from decoder_server.edge.http import app, dialects
from decoder_server.server import DecoderServer, Gateway

LIVE, READY = ("/health", "/healthz", "/livez"), ("/health/ready", "/readyz")


def test_models(running):
    (model,) = running.http.get("/v1/models").json()["data"]

    assert (model["id"], model["object"], model["owned_by"]) == (running.engine.name, "model", "preread")
    assert model["default_compression_ratio"] == running.engine.backend.settings.default_compression_ratio
    (of_infinity,) = running.http.get("/infinity/models").json()["data"]
    assert of_infinity["owned_by"] == "infinity"
    assert running.http.get("/v1/collections").json()["object"] == "list"


@pytest.mark.parametrize("path", ["/info", "/tei/info"])
def test_info(running, path):
    info = running.http.get(path).json()

    assert info["model_id"] == running.engine.name
    assert "reranker" in info["model_type"]
    assert info["max_client_batch_size"] == running.engine.limits.max_candidates


def test_metrics(running):
    running.ask()
    metrics = running.http.get("/metrics")

    assert metrics.headers["content-type"].startswith("text/plain")
    assert "preread_" in metrics.text


def test_health_is_live_at_once_and_ready_after_loading(tiny_checkpoint, run):
    """A gateway in front of a server that has not started: alive, not ready, and everything else says why."""
    with run() as one:

        async def idle_answers():
            idle = DecoderServer(one.server.config, store=one.server.store)
            gateway = Gateway(HttpConfig(port=0), idle)
            await gateway.start()
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}") as client:
                body = {"query": "q", "documents": ["d"]}
                answers = [
                    *[await client.get(path) for path in LIVE],
                    *[await client.get(path) for path in READY],
                    await client.get("/info"),
                    await client.post("/rerank", json=body),
                ]
            await gateway.stop(0)
            await gateway.stop(0)
            await idle.stop(0)
            return answers

        answers = one.call(idle_answers())
        live, waiting = answers[: len(LIVE)], answers[len(LIVE) :]
        assert [answer.status_code for answer in live] == [200] * len(LIVE)
        for draining, status in ((False, 200), (True, 503)):
            one.gateway.context.draining = draining
            for method in ("GET", "HEAD"):
                assert {one.http.request(method, path).status_code for path in LIVE} == {200}
                assert {one.http.request(method, path).status_code for path in READY} == {status}
        assert one.http.head("/readyz").content == b""
    for answer in waiting:
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["type"] == "unavailable_error"


def test_a_taken_port_is_an_error_that_names_it(run):
    with run() as one:

        async def again():
            gateway = Gateway(HttpConfig(port=one.gateway.port), one.server)
            await gateway.start()

        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{one.gateway.port}"):
            one.call(again())


def test_an_error_nobody_foresaw_is_json_and_gives_nothing_away(running, query, documents, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr(running.engine.backend._real, "prompt", fail)
    response = running.post("/rerank", {"query": query, "documents": documents})

    assert response.status_code == 500
    assert response.json()["error"]["type"] == "internal_error"
    assert "secret" not in response.text
    deadline = time.monotonic() + 5  # it is logged after it is answered
    while response.headers["x-request-id"] not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert query not in caplog.text


def test_the_openapi_document_has_every_path_and_no_other(running):
    document = running.http.get("/openapi.json").json()
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    described = {(method, path) for method, path in described if method != "PARAMETERS"}

    served = {(operation.method, operation.path.replace(":path", "")) for operation in app.OPERATIONS}
    assert described == served
    assert {("POST", path.replace(":path", "")) for path in dialects.PATHS} < served
    assert all(prefix in document["info"]["description"] for prefix in dialects.PREFIXES)
    ids = [op["operationId"] for item in document["paths"].values() for op in item.values() if isinstance(op, dict)]
    assert len(ids) == len(set(ids))
