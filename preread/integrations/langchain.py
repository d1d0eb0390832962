"""LangChain: a document compressor that ranks, for ContextualCompressionRetriever and chains.

from preread.integrations.langchain import PrereadRerank

compressor = PrereadRerank(client="127.0.0.1:50051", collection="docs", id_key="passage_id", top_n=3)
best = compressor.compress_documents(documents, "why is the sky blue")
"""

from collections.abc import Sequence
from copy import deepcopy

from preread.integrations import needs_extra
from preread.values import Candidate, Result

with needs_extra("langchain"):
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from pydantic import Field

    from preread.integrations.fields import Fields


class PrereadRerank(Fields, BaseDocumentCompressor):
    """Ranks documents; the best are returned, each a copy with its score as metadata["relevance_score"].

    By id where `collection` is set: that of metadata[id_key], or else Document.id. Raises PrereadError.
    """

    top_n: int | None = Field(3, ge=1, description="Number of documents to return; None: all.")

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """The best documents, best first. Runs no callbacks: a compressor has no events."""
        return _with_scores(documents, self._ranker.rank(query, self._candidates(documents), top_n=self.top_n or 0))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Like compress_documents; over an AsyncClient or an address without a thread."""
        return _with_scores(
            documents, await self._ranker.arank(query, self._candidates(documents), top_n=self.top_n or 0)
        )

    def _candidates(self, documents: Sequence[Document]) -> list[Candidate]:
        return [
            self._ranker.candidate(f"documents[{i}]", one.page_content, one.metadata, one.id)
            for i, one in enumerate(documents)
        ]


def _with_scores(documents: Sequence[Document], results: Sequence[Result]) -> list[Document]:
    ranked = ((documents[one.index], one.score) for one in results)
    return [
        document.model_copy(update={"metadata": deepcopy(document.metadata) | {"relevance_score": score}})
        for document, score in ranked
    ]
