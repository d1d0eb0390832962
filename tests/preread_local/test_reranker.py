"""Laws of the reranker in this process: it says and raises what a server does, and leaves nothing running."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import preread
from benchmarks.synthetic import make_cross_encoder
from cache.errors import CacheError
from checkpoint import Checkpoint, CheckpointError
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair
from encoder_worker.passage_encoder import PassageEncoder
from preread.integrations.functions import rank
from preread_local import AsyncReranker, Indexed, Reranker

TEXTS = {f"p{i}": f"passage {i} says that the decoder reads states {'once ' * i}" for i in range(12)}
QUERY = "what does the decoder read?"
COMPUTE = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> dict[str, float]:
    """The margin of each text by encoding and scoring it alone."""
    encoder = PassageEncoder.load(str(tiny_checkpoint), **COMPUTE)
    backend = FbnlBackend(Checkpoint.open(tiny_checkpoint), **COMPUTE)
    prompt, ratio = backend.prompt(QUERY), backend.settings.default_compression_ratio
    margins = {}
    for passage_id, text in TEXTS.items():
        states = encoder.encode_one(text, ratio).states
        margins[passage_id] = float(backend.score([StatePair(prompt, states)])[0])
    return margins


@pytest.fixture(scope="module")
def reranker(tiny_checkpoint: Path):
    with Reranker(tiny_checkpoint, **COMPUTE) as one:
        one.index(TEXTS, collection="docs", codec="Flat")
        yield one


def test_ids_and_texts_have_the_scores_of_their_model(reranker, expected) -> None:
    by_id = reranker.rerank(QUERY, list(TEXTS), collection="docs")
    assert {one.passage_id: one.margin for one in by_id} == pytest.approx(expected, abs=1e-4)
    assert [one.status for one in by_id] == ["hit"] * len(TEXTS)
    found = reranker.rerank(QUERY, list(TEXTS.values()))
    assert {one.found_id: one.margin for one in found} == pytest.approx(expected, abs=1e-4)
    new = reranker.rerank(QUERY, ["never indexed"])
    assert [one.status for one in new] == ["encoded"]
    streamed = reranker.rerank_stream(QUERY, list(TEXTS), collection="docs")
    assert {one.passage_id for one in streamed} == {*TEXTS}


def test_it_is_a_client(reranker) -> None:
    assert isinstance(reranker, preread.Client)
    assert [one.name for one in reranker.list_collections()] == ["docs"]
    assert sorted(reranker.list_passages("docs")) == sorted(TEXTS)
    assert reranker.stats("docs")[0].num_passages == len(TEXTS)
    assert reranker.warm(["p1"], collection="docs").num_passages == 1
    with pytest.raises(preread.NotFound, match="nowhere"):
        reranker.rerank(QUERY, ["p1"], collection="nowhere")
    with pytest.raises(preread.InvalidRequest, match="query"):
        reranker.rerank("", ["text"])
    with pytest.raises(preread.DeadlineExceeded):
        reranker.rerank(QUERY, list(TEXTS), collection="docs", timeout=1e-6)


def test_components_take_it_as_they_take_a_client(reranker, expected) -> None:
    texts = list(TEXTS.values())
    ranked = rank(QUERY, texts, ids=list(TEXTS), collection="docs", client=reranker)
    assert [list(TEXTS)[index] for index, _ in ranked] == sorted(TEXTS, key=lambda one: -expected[one])
    assert rank(QUERY, texts, client=reranker, top_n=3) == ranked[:3]


def test_index_says_what_became_of_each_passage(reranker) -> None:
    seen: list[int] = []
    passages = [{"id": "a", "text": "one"}, {"id": "b", "title": "Two", "text": "two"}, {"id": "c", "text": " "}]
    indexed = reranker.index(iter(passages), collection="some", on_progress=seen.append)
    assert (indexed.num_stored, indexed.num_unchanged) == (2, 0)
    assert [(one.passage_id, "empty" in one.message) for one in indexed.refused] == [("c", True)]
    assert seen == [1, 2, 3]
    assert reranker.index({"a": "one", "d": "four"}, collection="some") == Indexed(1, 1, ())
    with pytest.raises(TypeError, match="2"):
        reranker.index([*passages[:2], "a text"], collection="some")


def test_many_threads_may_call_it(reranker, expected) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: reranker.rerank(QUERY, [one], collection="docs"), [*TEXTS] * 4))
    for answer in answers:
        assert answer[0].margin == pytest.approx(expected[answer[0].passage_id], abs=1e-4)


def test_no_other_caller_reaches_it(reranker) -> None:
    address, encoder_address = (one.addresses[0] for one in (reranker._server, reranker._worker))
    with preread.Client(address, encoder_address=encoder_address) as stranger:
        with pytest.raises(preread.Unauthenticated):
            stranger.rerank(QUERY, ["p1"], collection="docs")
        with pytest.raises(preread.Unauthenticated):
            stranger.delete(["p1"], collection="docs")


def test_a_store_on_disk_is_there_again(tiny_checkpoint, tmp_path, expected) -> None:
    store = f"faiss:{tmp_path}/data"
    with Reranker(tiny_checkpoint, store=store, **COMPUTE) as first:
        first.index(TEXTS, collection="docs", codec="Flat")
    with Reranker(tiny_checkpoint, store=store, encode=False, **COMPUTE) as second:
        answer = second.rerank(QUERY, [*TEXTS.values(), "never indexed"])
        assert {one.found_id: one.margin for one in answer if one.margin} == pytest.approx(expected, abs=1e-4)
        assert answer[-1].status == "missing"
        with pytest.raises(ValueError, match="nothing is encoded here"):
            second.index(TEXTS, collection="docs")


def test_a_cross_encoder_reads_texts(tmp_path) -> None:
    directory = make_cross_encoder(tmp_path / "reader")
    model = open_cross_encoder(directory, **COMPUTE)
    with Reranker(directory, **COMPUTE) as reranker:
        answer = reranker.rerank(QUERY, list(TEXTS.values()))
        with pytest.raises(ValueError, match="nothing is encoded here"):
            reranker.index(TEXTS, collection="docs")
    margins = [one.margin for one in sorted(answer, key=lambda one: one.index)]
    wanted = model.score_texts([(QUERY, None, text) for text in TEXTS.values()])
    np.testing.assert_allclose(margins, wanted, atol=1e-5)


async def test_the_async_one_says_the_same(tiny_checkpoint, expected) -> None:
    async def passages():
        for passage_id, text in TEXTS.items():
            yield {"id": passage_id, "text": text}
            await asyncio.sleep(0)

    async with AsyncReranker(tiny_checkpoint, **COMPUTE) as reranker:
        assert await reranker.index(passages(), collection="docs", codec="Flat") == Indexed(len(TEXTS), 0, ())
        calls = (reranker.rerank(QUERY, [one], collection="docs") for one in TEXTS)
        answers = await asyncio.gather(*calls)
        assert {one[0].passage_id: one[0].margin for one in answers} == pytest.approx(expected, abs=1e-4)
        assert [one.status for one in await reranker.rerank(QUERY, ["never indexed"])] == ["encoded"]
    with pytest.raises(preread.Cancelled):
        await reranker.rerank(QUERY, ["text"])


def test_what_cannot_be_loaded_is_said_and_leaves_nothing_running(tiny_checkpoint, tmp_path) -> None:
    before = threading.active_count()
    wrong = [
        (CheckpointError, "nowhere", {"model": tmp_path / "nowhere"}),
        (CacheError, "expected memory:", {"store": "nonsense:"}),
        (ValueError, "device", {"device": "tpu"}),
        (ValueError, "at least 1", {"max_candidates": 0}),
        (TypeError, "did you mean 'max_candidates'", {"max_candidate": 5}),
        (ValueError, "port: of a server", {"port": 1}),
    ]
    for kind, message, given in wrong:
        with pytest.raises(kind, match=message):
            Reranker(**{"model": tiny_checkpoint, **given})
    _until(lambda: threading.active_count() <= before)


def test_one_that_is_closed_or_dropped_ends_its_threads(tiny_checkpoint) -> None:
    before = threading.active_count()
    reranker = Reranker(tiny_checkpoint, **COMPUTE)
    assert threading.active_count() > before
    reranker.close()
    reranker.close()
    with pytest.raises(preread.Cancelled):
        reranker.rerank(QUERY, ["text"])
    dropped = Reranker(tiny_checkpoint, **COMPUTE)
    del dropped
    gc.collect()
    _until(lambda: threading.active_count() <= before)


def test_a_process_that_never_closes_it_ends_quietly(tiny_checkpoint) -> None:
    program = f"""
from preread_local import Reranker
reranker = Reranker({str(tiny_checkpoint)!r}, device="cpu", dtype="float32")
print(len(reranker.rerank("a query", ["a text"])))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1\n", "")


def _until(holds) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
