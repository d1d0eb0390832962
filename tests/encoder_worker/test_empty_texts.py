"""Laws of texts without tokens: each is an empty text on every path in, and costs nothing but itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from click.testing import CliRunner

from cache.collection import Collection
from cache.store import Store
from checkpoint import Checkpoint
from encoder_worker.passage_encoder import EncodingFailed, PassageEncoder
from preread.v1 import encoder_pb2
from preread_cli.main import cli
from tuning.rerank import EncodedStates

# What the tokenizer does not know, or what is white space to Unicode; alone, many, and both.
EMPTY = ["", " ", "\t\n\r\x0b\x0c", "\u3000\u2009\u00a0\u2028\x85\x1c", "\ufffd", "\u200b", "\ufeff", "\u0301", "\0",
         "\u200b" * 300, " \ufffd ", "\ue000", "\U0010ffff", "\u202e"]  # fmt: skip
GOOD = ["What is the capital of China?", "Gravity attracts bodies", "\ufffd A passage \u200b is read once"]
MIXED = [GOOD[0], *EMPTY, *GOOD[1:]]


@pytest.fixture
def lossy(lossy_checkpoint: Path) -> PassageEncoder:
    return PassageEncoder.load(str(lossy_checkpoint), device="cpu", dtype="float32")


@pytest.fixture
def serve(lossy_checkpoint: Path, store: Store) -> Any:
    return lambda **config: sys.modules["worker_fixture"].serve(lossy_checkpoint, store, **config)


def alone(encoder: PassageEncoder, ratio: int = 4) -> list[np.ndarray[Any, Any]]:
    return [encoder.encode_one(text, ratio).states for text in GOOD]


def test_a_text_is_empty_where_nothing_of_it_is_a_token(lossy: PassageEncoder) -> None:
    assert [lossy.is_empty(text) for text in MIXED] == [text in EMPTY for text in MIXED]
    tokenized = lossy.tokenize(MIXED)
    assert [one.failed is not None for one in tokenized] == [text in EMPTY for text in MIXED]
    for text in EMPTY:
        with pytest.raises(EncodingFailed, match="text is empty"):
            lossy.encode_one(text, 4)


def test_what_a_tokenizer_reads_is_not_empty(tiny_checkpoint: Path) -> None:
    text = Checkpoint.open(str(tiny_checkpoint)).text  # knows every byte
    odd = [text for text in EMPTY if text.strip()]
    assert odd
    assert not any(map(text.is_empty, odd))
    assert all(text.is_empty(white) for white in EMPTY if not white.strip())


@pytest.mark.parametrize("control", ["<eos>", "<end_of_turn>", "<eos>" * 50])
def test_a_control_token_read_as_plain_text_is_no_empty_text(lossy: PassageEncoder, control: str) -> None:
    assert not lossy.is_empty(control)


async def test_encode_gives_each_text_what_it_has_alone(serve: Any, lossy: PassageEncoder) -> None:
    async with serve() as to:
        answer = await to.encode(MIXED, compression_ratio=4)
        assert [p.message for p in answer.passages] == ["text is empty" if t in EMPTY else "" for t in MIXED]
        good = [p for p in answer.passages if not p.message]
        for passage, states in zip(good, alone(lossy), strict=True):
            np.testing.assert_allclose(np.frombuffer(passage.states, "<f4"), states.ravel(), atol=1e-5)
        assert [p.message for p in (await to.encode(["\u200b"])).passages] == ["text is empty"]


async def test_upsert_refuses_each_and_stores_the_others(serve: Any, lossy: PassageEncoder, store: Store) -> None:
    ids = [f"p{i}" for i in range(len(MIXED))]
    async with serve() as to:
        (response,) = await to.upsert(to.message("docs", **dict(zip(ids, MIXED, strict=True))))
        stored = encoder_pb2.UPSERT_STATUS_STORED
        assert [r.status == stored for r in response.results] == [t not in EMPTY for t in MIXED]
        assert {r.message for r in response.results if r.status != stored} == {"text is empty"}
        again = await to.upsert(*(to.message("docs", twice=text) for text in ("\u200b", "the first had no text")))
        assert [r.status == stored for response in again for r in response.results] == [False, True]
        held = Collection.open(store, "docs").get_many(ids)
        assert [states is None for states in held] == [t in EMPTY for t in MIXED]


def test_index_refuses_each_by_its_line(lossy_checkpoint: Path, tmp_path: Path) -> None:
    path, report = tmp_path / "passages.jsonl", tmp_path / "report.json"
    rows = [{"id": f"p{i}", "text": text} for i, text in enumerate(MIXED)]
    rows += [{"id": "twice", "text": "\u200b"}, {"id": "twice", "text": "the first had no text"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [
        "index",
        str(path),
        "-c",
        "docs",
        "--model",
        str(lossy_checkpoint),
        "--store",
        f"faiss:{tmp_path / 'store'}",
    ]
    line += ["--report", str(report), "--threads", "1", "--dtype", "float32"]
    result = CliRunner().invoke(cli, line, prog_name="preread")
    assert result.exit_code == 1, result.stderr
    refused = json.loads(report.read_text())["refused"]
    bad = [i + 1 for i, text in enumerate(MIXED) if text in EMPTY] + [len(MIXED) + 1]
    assert sorted((entry["line"], entry["reason"]) for entry in refused) == [(i, "empty_text") for i in bad]
    assert f"{len(rows)} read, {len(GOOD) + 1} stored" in result.stdout


def test_evaluation_reads_the_others(lossy: PassageEncoder) -> None:
    texts = {f"p{i}": text for i, text in enumerate(MIXED)}
    found = {p: s for chunk in EncodedStates(lossy, texts, 4).chunks(list(texts)) for p, s in chunk.items()}
    assert found.keys() == {p for p, text in texts.items() if text not in EMPTY}


class Poisoned:
    """A real encoder that raises where a batch has the poison in it."""

    def __init__(self, real: PassageEncoder, error: Exception) -> None:
        self._half, self._error = real._encoder, error
        self.poison = real.tokenize(["Gravity poison"])[0].windows[0]
        real._encoder = self

    def encode(self, batch: Any, ratio: int) -> Any:
        if self.poison in list(batch):
            raise self._error
        return self._half.encode(batch, ratio)


@pytest.fixture(
    params=[ZeroDivisionError("internal 1"), RuntimeError("internal 2"), IndexError("internal 3")], ids=repr
)
def poisoned(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Iterator[PassageEncoder]:
    encoder = PassageEncoder.load(str(tiny_checkpoint), device="cpu", dtype="float32")
    half = encoder._encoder
    Poisoned(encoder, request.param)
    yield encoder
    encoder._encoder = half


def test_a_sequence_that_the_model_raises_on_costs_itself(poisoned: PassageEncoder) -> None:
    batch = [one.windows[0] for one in poisoned.tokenize([GOOD[0], "Gravity poison", GOOD[1], "Gravity poison"])]
    results = poisoned.encode(batch, 4)
    assert [isinstance(result, EncodingFailed) for result in results] == [False, True, False, True]
    assert not any("internal" in str(result) for result in results if isinstance(result, EncodingFailed))


async def test_an_exception_of_the_server_is_no_text_for_a_caller(worker: Any) -> None:
    async with worker() as to:
        engine = to.server.engine
        why_not = engine.encoder.why_not

        def broken(*_: Any) -> None:
            raise KeyError("a secret path")

        engine.encoder.why_not = broken
        failures = [await to.failure(to.encode(["good"])), await to.failure(to.upsert(to.message("docs", a="good")))]
        engine.encoder.why_not = why_not
        for code, message, details in failures:
            assert code == grpc.StatusCode.INTERNAL
            assert "secret" not in message
            assert "x-request-id" in message
            assert [detail.reason for detail in details] == ["INTERNAL"]
        assert (await to.encode(["good"])).passages[0].states


def test_a_text_that_the_tokenizer_raises_on_costs_itself(lossy: PassageEncoder) -> None:
    tokenized = lossy.tokenize([GOOD[0], "half a pair \ud800", GOOD[1]])
    assert [one.failed is None for one in tokenized] == [True, False, True]
    assert str(tokenized[1].failed) == "text cannot be tokenized"
