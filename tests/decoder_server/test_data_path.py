"""Reads and passes do not wait for each other, what is read stays encoded, and a query is tokenized once.

Events are held up until others have happened, so an order is proven without a clock.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cache.record import Damaged, Record
from cache.states import Codes
from decoder_server.models.fbnl.kv_cache import StatePair

WAIT_SECONDS = 20  # for what must happen; what fails, fails after that


class Watched:
    """A real store whose reads can be held up."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.num_reads = 0
        self.before_read: dict[int, threading.Event] = {}  # a read by number waits for
        self.after_read: dict[int, threading.Event] = {}  # and sets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_many(self, collection: str, passage_ids: Sequence[str]) -> list[Record | Damaged | None]:
        number, self.num_reads = self.num_reads, self.num_reads + 1
        if number in self.before_read:
            assert self.before_read[number].wait(WAIT_SECONDS), f"read {number} waited in vain"
        records = self._store.get_many(collection, passage_ids)
        if number in self.after_read:
            self.after_read[number].set()
        return records


@pytest.fixture
def long_ids(texts: dict[str, str]) -> list[str]:
    """Forty passages: at a batch budget of 2,000 tokens a read takes sixteen, and a pass less than all of them."""
    return sorted(texts, key=lambda i: -len(texts[i]))[:40]


async def test_the_next_read_is_over_before_the_first_pass_is(serve, gated, store, long_ids) -> None:
    watched, read = Watched(store), threading.Event()
    watched.after_read[1] = read
    score = gated.score

    def score_after_the_read(pairs: Sequence[StatePair]) -> NDArray[np.float32]:
        assert read.wait(WAIT_SECONDS), "a read waited for the pass"
        return score(pairs)

    gated.score = score_after_the_read
    async with serve(backend=gated, over=watched, max_batch_tokens=2000, max_store_cache_bytes=0) as serving:
        answer = await serving.rerank(ids=long_ids)
        assert answer.num_scored == len(long_ids)
        assert watched.num_reads == 3
        assert len(gated.passes) > 1


async def test_the_first_pass_is_over_before_the_next_read_is(serve, gated, store, long_ids) -> None:
    watched, scored = Watched(store), threading.Event()
    watched.before_read[1] = scored
    score = gated.score

    def score_and_tell(pairs: Sequence[StatePair]) -> NDArray[np.float32]:
        margins = score(pairs)
        scored.set()
        return margins

    gated.score = score_and_tell
    async with serve(backend=gated, over=watched, max_batch_tokens=2000, max_store_cache_bytes=0) as serving:
        assert (await serving.rerank(ids=long_ids)).num_scored == len(long_ids)
        assert watched.num_reads == 3


async def test_what_is_read_as_stored_reaches_the_pass_encoded(serve, gated, long_ids) -> None:
    async with serve(backend=gated) as serving:
        await serving.rerank(ids=long_ids)
        assert all(isinstance(pair.states, Codes) for pairs in gated.passes for pair in pairs)
        gated.passes.clear()
        await serving.rerank(ids=long_ids, compression_ratio=8)
        assert all(isinstance(pair.states, np.ndarray) for pairs in gated.passes for pair in pairs)


async def test_a_query_is_tokenized_once(serve, fbnl, long_ids, texts, monkeypatch) -> None:
    """However many candidates, reads, passes and stages a request has, and whatever names a passage twice."""
    prompts = []
    prompt = fbnl.prompt

    def counted(query: str, instruction: str | None = None) -> Any:
        prompts.append(query)
        return prompt(query, instruction)

    async with serve(max_batch_tokens=2000) as serving:
        monkeypatch.setattr(fbnl, "prompt", counted)
        await serving.rerank(query="one", ids=[*long_ids, *long_ids[:5]])
        assert prompts == ["one"]
        coarse, fine = {"compression_ratio": 16, "keep": 12}, {"compression_ratio": 4}
        answer = await serving.rerank(query="two", ids=long_ids, stages=[coarse, fine])
        assert len(answer.stages) == 2
        assert prompts == ["one", "two"]
        assert serving.engine.scheduler.stats.num_passes > 4
