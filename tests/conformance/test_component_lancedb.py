"""preread.integrations.lancedb in LanceDB: vector, full-text and hybrid searches, by id and by text."""

from __future__ import annotations

import lancedb
import pyarrow as pa
import pytest

from preread.integrations.functions import NotScored
from preread.integrations.lancedb import PrereadReranker


@pytest.fixture(scope="module")
def table(documents, tmp_path_factory):
    rows = [{"id": f"d{i}", "text": text, "vector": [float(i), 1.0]} for i, text in enumerate(documents)]
    made = lancedb.connect(tmp_path_factory.mktemp("lance")).create_table("docs", rows)
    made.create_index("text", config=lancedb.index.FTS())
    return made


@pytest.fixture
def search(table, query):
    """search(kind) begins one whose results are all rows, for full text those with a word of the query."""

    def begin(kind):
        if kind == "vector":
            return table.search([0.0, 1.0], query_type="vector")
        if kind == "fts":
            return table.search("learning OR networks OR the", query_type="fts")
        return table.search(query_type="hybrid").vector([0.0, 1.0]).text("learning")

    return begin


def seen(rows):
    return [(int(row["id"][1:]), row["_relevance_score"]) for row in rows]


def test_a_vector_search_is_ranked_by_text(agree, narrow, query, search, by_text):
    rows = search("vector").rerank(PrereadReranker(narrow.grpc_address), query_string=query).to_list()

    assert agree(seen(rows), by_text)
    assert "_distance" not in rows[0]


@pytest.mark.parametrize("send_text", [True, False])
def test_a_vector_search_is_ranked_by_id(agree, narrow, query, search, by_id, send_text):
    settings = {"collection": "docs", "id_key": "id", "send_text": send_text, "on_miss": "skip"}
    reranker = PrereadReranker(narrow.grpc_address, **settings)

    assert agree(seen(search("vector").rerank(reranker, query_string=query).to_list()), by_id)


def test_a_full_text_search_is_ranked(narrow, search):
    found = {row["id"] for row in search("fts").to_list()}

    rows = search("fts").rerank(PrereadReranker(narrow.grpc_address)).to_list()

    assert {row["id"] for row in rows} == found
    scores = [row["_relevance_score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert "_score" not in rows[0]


def test_a_hybrid_search_has_every_row_once(narrow, search, documents):
    rows = search("hybrid").rerank(PrereadReranker(narrow.grpc_address)).limit(10).to_list()

    assert sorted(row["id"] for row in rows) == [f"d{i}" for i in range(len(documents))]
    scores = [row["_relevance_score"] for row in rows]
    assert scores == sorted(scores, reverse=True)


def test_all_scores_are_kept(narrow, search):
    reranker = PrereadReranker(narrow.grpc_address, return_score="all")

    rows = search("hybrid").rerank(reranker).limit(10).to_list()

    assert {"_relevance_score", "_score", "_distance"} <= set(rows[0])


def test_top_n_and_searches_without_rows(agree, narrow, query, search, by_text):
    reranker = PrereadReranker(narrow.grpc_address, top_n=2)

    assert agree(seen(search("vector").rerank(reranker, query_string=query).to_list()), by_text[:2])
    assert search("vector").where("id = 'none'").rerank(reranker, query_string=query).to_list() == []
    assert search("hybrid").where("id = 'none'").rerank(reranker).to_list() == []


def test_several_vector_searches_are_ranked_together(agree, narrow, query, table, by_text):
    reranker = PrereadReranker(narrow.grpc_address)
    searches = [
        table.search([float(x), 1.0])
        .with_row_id(True)
        .limit(3)
        .to_arrow()
        .select(["id", "text", "_distance", "_rowid"])
        for x in (0, 9)
    ]

    rows = reranker.rerank_multivector(searches, query=query, deduplicate=True)

    assert agree(seen(rows.to_pylist()), by_text)


def test_errors_name_the_column_and_the_row(narrow, query, table, search):
    with pytest.raises(ValueError, match="the search gives no column 'body'; expected it among"):
        search("vector").rerank(PrereadReranker(narrow.grpc_address, column="body"), query_string=query).to_list()
    rows = pa.table({"text": ["a", None]})
    with pytest.raises(TypeError, match=r"text of rows\[1\] is None; expected a string"):
        PrereadReranker(narrow.grpc_address).rerank_vector(query, rows)
    rows = pa.table({"text": ["a", ""]})
    with pytest.raises(NotScored, match=r"1 of 2 candidates could not be scored; candidates\[1\] is failed"):
        PrereadReranker(narrow.grpc_address).rerank_vector(query, rows)
    kept = PrereadReranker(narrow.grpc_address, on_unscored="last").rerank_vector(query, rows)
    assert kept["_relevance_score"].to_pylist()[1] is None
