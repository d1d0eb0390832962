"""LlamaIndex: a node postprocessor that ranks, for query engines and retrievers.

from preread.integrations.llamaindex import PrereadRerank

postprocessor = PrereadRerank(client="127.0.0.1:50051", collection="docs", top_n=3)
best = postprocessor.postprocess_nodes(nodes, query_str="why is the sky blue")
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from preread.integrations import needs_extra
from preread.values import Candidate, Result

with needs_extra("llamaindex"):
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
    from pydantic import Field

    from preread.integrations.fields import Fields

dispatcher = get_dispatcher(__name__)


class PrereadRerank(Fields, BaseNodePostprocessor):
    """Ranks nodes; the best are returned, each with its score.

    By id where `collection` is set: that of metadata[id_key], or else node_id. Otherwise a node's text is what it gives
    an embedding model: with its metadata, but for those that it excludes. Raises PrereadError.
    """

    top_n: int = Field(2, ge=1, description="Number of nodes to return.")

    @classmethod
    def class_name(cls) -> str:
        return "PrereadRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with self._reported(nodes, query_bundle) as (query, ranked):
            ranked += _with_scores(nodes, self._ranker.rank(query, self._candidates(nodes), top_n=self.top_n))
        return ranked

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with self._reported(nodes, query_bundle) as (query, ranked):
            ranked += _with_scores(nodes, await self._ranker.arank(query, self._candidates(nodes), top_n=self.top_n))
        return ranked

    @contextmanager
    def _reported(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None
    ) -> Iterator[tuple[str, list[NodeWithScore]]]:
        """The events around a ranking, old and new; gives the query, and the list that the ranking is put in."""
        if query_bundle is None:
            raise ValueError("query_bundle is None; expected a query: query_bundle or query_str")
        name, query, ranked = self.model or "preread", query_bundle.query_str, list[NodeWithScore]()
        dispatcher.event(ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=self.top_n, model_name=name))
        payload: dict[str, Any] = {EventPayload.NODES: nodes, EventPayload.MODEL_NAME: name}
        payload |= {EventPayload.QUERY_STR: query, EventPayload.TOP_K: self.top_n}
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield query, ranked
            event.on_end(payload={EventPayload.NODES: ranked})
        dispatcher.event(ReRankEndEvent(nodes=ranked))

    def _candidates(self, nodes: list[NodeWithScore]) -> list[Candidate]:
        texts = (one.node.get_content(metadata_mode=MetadataMode.EMBED) for one in nodes)
        return [
            self._ranker.candidate(f"nodes[{i}]", text, one.node.metadata, one.node.node_id)
            for i, (one, text) in enumerate(zip(nodes, texts, strict=True))
        ]


def _with_scores(nodes: list[NodeWithScore], results: list[Result]) -> list[NodeWithScore]:
    return [NodeWithScore(node=nodes[one.index].node, score=one.score) for one in results]
