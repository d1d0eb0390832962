"""PyTerrier: a transformer that scores candidates again, for pipelines and experiments. Needs no Java.

from preread.integrations.pyterrier import PrereadReranker

pipeline = bm25 % 100 >> pt.text.get_text(index) >> PrereadReranker("127.0.0.1:50051", collection="docs")
"""

from typing import Unpack

from preread.channel import LOCAL_ADDRESS
from preread.integrations import needs_extra
from preread.integrations.ranker import Ranker, Settings, Target, sortable_scores
from preread.values import Candidate, RerankOptions

with needs_extra("pyterrier"):
    import pandas as pd
    import pyterrier as pt


class PrereadReranker(pt.Transformer):
    """Columns qid, query, docno and text in; the same with the new score and rank out, best first within a query.

    By id where `collection` is set: that of the column `id_key`, or else docno. The score is the margin, the logit of
    the probability: close to 1 probabilities round to the same number, and measures would see ties. Raises
    PrereadError.
    """

    def __init__(
        self, client: Target = LOCAL_ADDRESS, *, text_field: str = "text", **settings: Unpack[Settings]
    ) -> None:
        self.text_field, self.id_key = text_field, settings.get("id_key") or "docno"
        self.needs_text = not settings.get("collection") or settings.get("send_text", True)
        self._ranker = Ranker(client, **settings)

    def transform(self, candidates: pd.DataFrame) -> pd.DataFrame:
        """Queries go several at once."""
        pt.validate.result_frame(candidates, extra_columns=["query", *([self.text_field] if self.needs_text else [])])
        groups = [rows for _, rows in candidates.groupby("qid", sort=False)]
        requests = [(rows["query"].iloc[0], self._candidates(rows), RerankOptions()) for rows in groups]
        ranked = [
            rows.iloc[[one.index for one in results]].assign(
                score=sortable_scores(results),
                rank=range(pt.model.FIRST_RANK, pt.model.FIRST_RANK + len(results)),
            )
            for rows, results in zip(groups, self._ranker.rank_many(requests), strict=True)
        ]
        return pd.concat(ranked, ignore_index=True) if ranked else candidates.assign(score=[], rank=[])

    def _candidates(self, rows: pd.DataFrame) -> list[Candidate]:
        texts = rows[self.text_field] if self.text_field in rows else [None] * len(rows)
        columns = zip(texts, rows[self.id_key], strict=True)
        return [
            self._ranker.candidate(f"row {i}", text, {self.id_key: passage_id}, passage_id)
            for i, (text, passage_id) in zip(rows.index, columns, strict=True)
        ]
