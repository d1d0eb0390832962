"""LanceDB: a reranker of vector, full-text and hybrid searches.

from preread.integrations.lancedb import PrereadReranker

reranker = PrereadReranker("127.0.0.1:50051", collection="docs", id_key="id")
table.search("why is the sky blue", query_type="hybrid").rerank(reranker).limit(10).to_list()
"""

from typing import Literal, Unpack

from preread.channel import LOCAL_ADDRESS
from preread.integrations import needs_extra
from preread.integrations.ranker import Ranker, Settings, Target

with needs_extra("lancedb"):
    import pyarrow as pa
    from lancedb.rerankers import Reranker


class PrereadReranker(Reranker):
    """Ranks the rows of a search by their text; the score is the column _relevance_score.

    By id where `collection` is set: that of the column `id_key`, which a search must then select. Raises PrereadError.
    """

    def __init__(
        self,
        client: Target = LOCAL_ADDRESS,
        *,
        column: str = "text",
        top_n: int | None = None,
        return_score: Literal["relevance", "all"] = "relevance",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(return_score)
        self.column, self.top_n = column, top_n
        self._id_key, self._ranker = settings.get("id_key"), Ranker(client, **settings)

    def __str__(self) -> str:
        return f"PrereadReranker(model_name={self._ranker.options.get('model', 'preread')})"

    def rerank_hybrid(self, query: str, vector_results: pa.Table, fts_results: pa.Table) -> pa.Table:
        """Rows of both searches, each once, best first."""
        merge = self._merge_and_keep_scores if self.score == "all" else self.merge_results
        return self._keep_relevance_score(self._rank(query, merge(vector_results, fts_results)))

    def rerank_vector(self, query: str, vector_results: pa.Table) -> pa.Table:
        return self._keep_relevance_score(self._rank(query, vector_results))

    def rerank_fts(self, query: str, fts_results: pa.Table) -> pa.Table:
        return self._keep_relevance_score(self._rank(query, fts_results))

    def _rank(self, query: str, rows: pa.Table) -> pa.Table:
        if not len(rows):
            return self._handle_empty_results(rows)
        texts, ids = self._values(rows, self.column), self._values(rows, self._id_key)
        pairs = enumerate(zip(texts, ids, strict=True))
        candidates = [self._ranker.candidate(f"rows[{i}]", text, {self._id_key: one}) for i, (text, one) in pairs]
        results = self._ranker.rank(query, candidates, top_n=self.top_n or 0)
        scores = pa.array([one.score for one in results], type=pa.float32())
        return rows.take([one.index for one in results]).append_column("_relevance_score", scores)

    @staticmethod
    def _values(rows: pa.Table, column: str | None) -> list[object]:
        if column is None:
            return [None] * len(rows)
        if column not in rows.column_names:
            raise ValueError(f"the search gives no column {column!r}; expected it among {rows.column_names}")
        return rows[column].to_pylist()
