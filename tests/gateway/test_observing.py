"""What an operator sees of HTTP: every answer is counted, and the log has the id that the answer carries."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from decoder_server.edge.http.app import Envelope
from preread_edge.access import ApiKeys, Guard
from preread_edge.logs import set_up


@pytest.fixture
def log_lines():
    """What was logged as JSON, by a separate handler."""
    stream = io.StringIO()
    set_up("json", "info", stream)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_the_log_has_the_id_of_the_answer_and_no_text(running, log_lines) -> None:
    body = {"query": "velvet", "documents": ["crimson", "indigo"]}
    answer = running.post("/v1/rerank", body, headers={"x-request-id": "order-66"})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "order-66"
    (line,) = [line for line in log_lines() if (line["message"], line.get("request_id")) == ("rerank", "order-66")]
    assert (line["code"], line["num_candidates"]) == ("ok", 2)
    everything = json.dumps(log_lines())
    assert not any(word in everything for word in ("velvet", "crimson", "indigo"))


def test_every_answer_is_counted(running) -> None:
    def count(status: int) -> float:
        value = running.server.metrics.registry.get_sample_value("preread_http_answers_total", {"status": str(status)})
        return value or 0.0

    before = {status: count(status) for status in (200, 400, 404)}
    running.post("/v1/rerank", {"query": "q", "documents": ["d"]})
    running.post("/v1/rerank", {"query": "q", "documents": []})
    running.http.get("/nowhere")
    assert {status: count(status) - before[status] for status in before} == {200: 1, 400: 1, 404: 1}


@pytest.mark.parametrize("breaks", ["nowhere", "before the end", "while the last part is sent"])
async def test_an_answer_is_counted_once_and_before_its_caller_has_all_of_it(breaks: str) -> None:
    told: list[int] = []
    counted_at_the_end: list[int] = []

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        assert told == []
        if breaks == "before the end":
            raise ConnectionError
        await send({"type": "http.response.body", "body": b"end"})

    async def send(message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            counted_at_the_end.append(len(told))
            if breaks == "while the last part is sent":
                raise ConnectionError

    counted = Envelope(app, ApiKeys(), Guard(any_host=True), lambda status, seconds: told.append(status))
    with contextlib.suppress(ConnectionError):
        await counted({"type": "http", "method": "GET", "path": "/", "headers": []}, None, send)
    assert told == [200]
    assert counted_at_the_end == ([] if breaks == "before the end" else [1])


def test_the_workers_log_has_the_id_too(running, log_lines) -> None:
    passages = {"passages": [{"id": "p", "text": "crimson"}]}
    headers = {"x-request-id": "order-67"}
    assert running.post("/v1/collections/noted/passages", passages, headers=headers).status_code == 200
    url = "/v1/collections/noted/passages/p"
    assert running.http.delete(url, headers={"x-request-id": "order-68"}).status_code == 200

    found = {line["method"]: line["request_id"] for line in log_lines() if line["message"] == "call"}
    assert found == {"EncoderService/Upsert": "order-67", "EncoderService/Delete": "order-68"}
