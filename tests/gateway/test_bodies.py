"""Bodies as clients without a package of their own send them: each case of each, in their own words, in and out."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from preread_edge.access import ApiKeys

LONG = "network " * 5000

# client -> path, the fields next to the query, the field of the texts, the field that limits the answer
CLIENTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "4D AI Kit": ("/v1/rerank", {"model": "default"}, "documents", "top_n"),
    "4D AI Kit, newer": ("/v1/rerank", {"model": "default", "return_documents": True}, "documents", "top_n"),
    "4D AI Kit, of type TEI": ("/v1/rerank", {"model": "default", "return_text": True}, "texts", "top_n"),
    "llama.cpp": ("/v1/reranking", {"model": "default"}, "documents", "top_n"),
    "vLLM": ("/rerank", {"model": "default", "truncate_prompt_tokens": None}, "documents", "top_n"),
    "NIM": ("/v1/ranking", {"model": "default"}, "passages", "top_n"),
    "mixedbread": ("/v1/reranking", {"model": "default"}, "input", "top_k"),
    "Voyage": ("/v1/rerank", {"model": "default", "truncation": True}, "documents", "top_k"),
}
EVERY = pytest.mark.parametrize("client", CLIENTS)


def sent(client: str, query: str, texts: list[str], **more: Any) -> tuple[str, dict[str, Any]]:
    """Path and body."""
    path, fields, texts_field, _ = CLIENTS[client]
    if client == "NIM":
        return path, {**fields, "query": {"text": query}, texts_field: [{"text": text} for text in texts], **more}
    return path, {**fields, "query": query, texts_field: texts, **more}


def order(answer: Any) -> list[int]:
    """Indexes, best first, wherever this dialect has them."""
    ranks = (
        answer if isinstance(answer, list) else next(answer[n] for n in ("results", "data", "rankings") if n in answer)
    )
    return [rank["index"] for rank in ranks]


@EVERY
@pytest.mark.parametrize(("top", "num"), [("absent", 4), (None, 4), (0, 4), (1, 1), (3, 3), (99, 4)])
def test_ranks(running: Any, query: str, documents: list[str], client: str, top: Any, num: int) -> None:
    best = [result["index"] for result in running.ask()["results"]]
    more = {} if top == "absent" else {CLIENTS[client][3]: top}
    response = running.post(*sent(client, query, documents, **more))

    assert response.status_code == 200, response.text
    assert order(response.json()) == best[:num]


@EVERY
@pytest.mark.parametrize(
    ("texts", "more", "status"),
    [
        ([], {}, 400),
        (["a text"], {"model": "another-model"}, 404),
        (["short", LONG], {}, 200),
        (["short", ""], {}, 200),
        ([""], {}, 200),
        (["a text"], {"top": -1}, 400),
    ],
    ids=["empty", "unknown model", "over-long", "one empty text", "only empty texts", "negative"],
)
def test_what_is_asked_wrongly(running: Any, client: str, texts: list[str], more: dict[str, Any], status: int) -> None:
    more = {CLIENTS[client][3] if name == "top" else name: value for name, value in more.items()}
    response = running.post(*sent(client, "q", texts, **more))

    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    if status != 200:
        check_error(client, response.json())


def test_strangers(run: Any, query: str, documents: list[str]) -> None:
    with run(keys=ApiKeys.parse(["rerank:rerank-key-0123456789"])) as guarded:
        for client in CLIENTS:
            path, body = sent(client, query, documents)
            none = guarded.post(path, body)
            right = guarded.post(path, body, headers={"authorization": "Bearer rerank-key-0123456789"})
            assert (none.status_code, right.status_code) == (401, 200), client
            assert none.headers["www-authenticate"] == "Bearer"
            assert none.json()["error"]


def test_a_full_queue(run: Any, query: str, documents: list[str]) -> None:
    with run(max_queue_requests=1) as one:
        one.backend.gate.clear()
        first = threading.Thread(target=one.ask)
        first.start()
        assert one.backend.entered.wait(10)
        try:
            for client in CLIENTS:
                response = one.post(*sent(client, query, documents))
                assert response.status_code == 429, client
                assert int(response.headers["retry-after"]) >= 1
                assert int(response.headers["retry-after-ms"]) >= 1
                check_error(client, response.json())
        finally:
            one.backend.gate.set()
            first.join()


def check_error(client: str, error: Any) -> None:
    if CLIENTS[client][2] == "texts":
        assert set(error) == {"error", "error_type"}
        assert isinstance(error["error"], str)
    else:
        assert set(error) == {"error", "message", "detail"}
        assert set(error["error"]) == {"message", "type", "param", "code"}
        assert error["detail"] == error["message"] == error["error"]["message"] != ""
