"""preread.integrations.pyterrier in PyTerrier: pipelines and experiments, by id and by text; none starts Java."""

from __future__ import annotations

import math

import pandas as pd
import pyterrier as pt
import pytest

from preread.integrations.functions import NotScored
from preread.integrations.pyterrier import PrereadReranker


@pytest.fixture
def first_stage(query, documents):
    """All documents for two queries, the second one with the first document alone, in the reverse order of rows."""
    rows = [("q1", query, f"d{i}", text) for i, text in enumerate(documents)] + [("q2", "sun", "d1", documents[1])]
    return pd.DataFrame(rows[::-1], columns=["qid", "query", "docno", "text"]).assign(score=1.0, rank=0)


def seen(ranked, qid="q1"):
    rows = ranked[ranked.qid == qid]
    return [(int(one.docno[1:]), 1 / (1 + math.exp(-one.score))) for one in rows.itertuples()]


def test_candidates_are_ranked_by_text(agree, narrow, first_stage, by_text):
    ranked = PrereadReranker(narrow.grpc_address)(first_stage)

    assert agree(seen(ranked), by_text)
    assert list(ranked[ranked.qid == "q1"]["rank"]) == [0, 1, 2, 3]
    assert [docno for docno, _ in seen(ranked, "q2")] == [1]
    assert list(ranked.columns) == list(first_stage.columns)


@pytest.mark.parametrize("settings", [{}, {"send_text": False}, {"id_key": "key"}])
def test_candidates_are_ranked_by_id(agree, narrow, first_stage, by_id, settings):
    frame = first_stage.assign(key=first_stage.docno) if settings else first_stage
    frame = frame.drop(columns="text") if settings.get("send_text") is False else frame

    assert agree(seen(PrereadReranker(narrow.grpc_address, collection="docs", **settings)(frame)), by_id)


def test_an_experiment_ranks_it(narrow, first_stage, by_text):
    best = f"d{by_text[0][0]}"
    topics = first_stage[["qid", "query"]].drop_duplicates()
    qrels = pd.DataFrame([("q1", best, 1), ("q2", "d1", 1)], columns=["qid", "docno", "label"])
    pipeline = pt.Transformer.from_df(first_stage) >> PrereadReranker(narrow.grpc_address) % 1

    table = pt.Experiment([pipeline], topics, qrels, ["recip_rank"])

    assert table["recip_rank"].tolist() == [1.0]
    assert not pt.java.started()


def test_no_candidates(first_stage):
    assert list(PrereadReranker("127.0.0.1:1")(first_stage[:0]).columns) == list(first_stage.columns)


def test_what_cannot_be_scored_is_said(narrow, first_stage):
    first_stage.loc[0, "text"] = ""
    with pytest.raises(NotScored, match="1 of 1 candidates could not be scored"):
        PrereadReranker(narrow.grpc_address)(first_stage)
    ranked = PrereadReranker(narrow.grpc_address, on_unscored="last")(first_stage)
    assert ranked[ranked.qid == "q2"].score.tolist() == [-1e6]
    with pytest.raises(Exception, match="text"):
        PrereadReranker(narrow.grpc_address)(first_stage.drop(columns="text"))
