"""Margins to scores, windows to passages, results to an order."""

from __future__ import annotations

import numpy as np
import pytest

from cache.collection import Collection, StoredPassage
from cache.states import PassageStates, text_digest
from cache.store import Store
from checkpoint import TokenizedPrompt
from decoder_server.engine.fetch import FetchedPassage
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair


def fetched(index: int, windows: tuple[int, ...]) -> FetchedPassage:
    states = PassageStates(np.zeros((sum(windows), 4), np.float32), windows, 1, False, text_digest("x"))
    prompt = TokenizedPrompt([1, 2, 3], 1, False)
    pairs = [StatePair(prompt, window) for window in states.windows()]
    return FetchedPassage(index, f"p{index}", "hit", states, pairs=[pairs])


# P(yes) of published margins, reference of KaLM-Reranker-V1-Nano.
@pytest.mark.parametrize(("margin", "score"), [(8.78125, 0.99984646), (-14.1875, 6.8936e-07), (0.0, 0.5)])
def test_score_is_the_sigmoid_of_the_margin(fbnl: FbnlBackend, margin: float, score: float) -> None:
    assert fbnl.activate(margin) == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize("margin", [1e4, -1e4, 88.8, -88.8, -103.9])
def test_sigmoid_never_overflows(fbnl: FbnlBackend, margin: float) -> None:
    assert 0.0 <= fbnl.activate(margin) <= 1.0


def test_the_best_window_counts(fbnl: FbnlBackend) -> None:
    result = fetched(3, (2, 5)).scored([-1.0, 2.0], 1, 3, fbnl.activate)
    assert (result.index, result.margin, result.num_states, result.num_passage_tokens) == (3, 2.0, 7, 7)
    assert result.score == pytest.approx(1 / (1 + np.exp(-2.0)))


@pytest.mark.parametrize(("bad", "says"), [(float("nan"), "not finite"), (None, "the model failed on it")])
def test_a_window_without_a_margin_fails_its_passage(fbnl: FbnlBackend, bad: float | None, says: str) -> None:
    result = fetched(0, (2, 5)).scored([1.0, bad], 1, 3, fbnl.activate)
    assert (result.status, result.margin) == ("failed", None)
    assert says in result.message


async def test_ties_keep_request_order_and_unscored_come_last_whatever_top_n_says(
    serve, store: Store, encoding, texts: dict[str, str]
) -> None:
    same = encoding.encode(texts["p4"], 4)
    Collection.open(store, "docs").put_many([StoredPassage(f"same{i}", same, None) for i in range(3)])
    ids = ["same2", "nobody", "p9", "same0", "p4", "nowhere", "same1"]
    async with serve() as serving:
        every = (await serving.rerank(ids=ids)).results
        margins = {one.index: one.margin for one in every if one.HasField("margin")}
        ranking = sorted(margins, key=lambda i: (-margins[i], i))
        assert len({margins[i] for i in (0, 3, 4, 6)}) == 1
        assert [one.index for one in every] == [*ranking, 1, 5]
        best = (await serving.rerank(ids=ids, top_n=3)).results
        assert [one.index for one in best] == [*ranking[:3], 1, 5]
