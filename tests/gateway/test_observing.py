"""What an operator sees of HTTP: every answer is counted, and the log has the id that the answer carries."""

from __future__ import annotations

import io
import json
import logging

import pytest

from preread.edge.logs import set_up


@pytest.fixture
def log_lines():
    """What was logged as JSON, by a handler of its own."""
    root = logging.getLogger()
    before, stream = root.handlers[:], io.StringIO()
    set_up("json", "info", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:] = before
    for package in ("preread", "decoder_server", "encoder_worker", "cache", "checkpoint"):
        logging.getLogger(package).setLevel(logging.NOTSET)


def test_the_log_has_the_id_of_the_answer_and_no_text(running, log_lines) -> None:
    body = {"query": "velvet", "documents": ["crimson", "indigo"]}
    answer = running.post("/v1/rerank", body, headers={"x-request-id": "order-66"})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "order-66"
    (line,) = [line for line in log_lines() if line["message"] == "rerank"]
    assert (line["request_id"], line["code"], line["num_candidates"]) == ("order-66", "ok", 2)
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


def test_the_workers_log_has_the_id_too(running, log_lines) -> None:
    passages = {"passages": [{"id": "p", "text": "crimson"}]}
    headers = {"x-request-id": "order-67"}
    assert running.post("/v1/collections/noted/passages", passages, headers=headers).status_code == 200
    url = "/v1/collections/noted/passages/p"
    assert running.http.delete(url, headers={"x-request-id": "order-68"}).status_code == 200

    found = {line["method"]: line["request_id"] for line in log_lines() if line["message"] == "call"}
    assert found == {"EncoderService/Upsert": "order-67", "EncoderService/Delete": "order-68"}
