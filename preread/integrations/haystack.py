"""Haystack: a ranker component, for pipelines and on its own.

from preread.integrations.haystack import PrereadRanker

ranker = PrereadRanker("127.0.0.1:50051", collection="docs", id_key="passage_id", top_k=3)
best = ranker.run(query="why is the sky blue", documents=documents)["documents"]
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Self, Unpack

from preread.channel import LOCAL_ADDRESS, ClientOptions, TlsFiles
from preread.integrations import needs_extra
from preread.integrations.ranker import Ranker, Settings, Target
from preread.values import Candidate, Result, format_stages

with needs_extra("haystack"):
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.utils import Secret, deserialize_secrets_inplace


@component
class PrereadRanker:
    """Ranks documents; the best are returned, each a copy with its score.

    By id where `collection` is set: that of meta[id_key], or else Document.id. Raises PrereadError.
    """

    def __init__(
        self,
        client: Target = LOCAL_ADDRESS,
        top_k: int = 10,
        *,
        api_key: Secret | None = Secret.from_env_var("PREREAD_API_KEY", strict=False),  # noqa: B008 - as Haystack's
        tls: TlsFiles | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        """`api_key` and `tls` are of the client that is made of an address, in place of client_options."""
        if settings.get("client_options") is not None:
            raise ValueError("client_options cannot be serialised; expected api_key and tls, or a client with options")
        self.client, self.top_k, self.api_key, self.tls, self.settings = client, _checked(top_k), api_key, tls, settings
        self._ranker: Ranker | None = None

    def warm_up(self) -> None:
        """Resolves the key and makes the ranker; run does so where this was not called."""
        self._made()

    def _made(self) -> Ranker:
        if self._ranker is None:
            settings: Settings = {**self.settings}
            if isinstance(self.client, str | list | tuple):
                key = self.api_key.resolve_value() if self.api_key else None
                settings["client_options"] = ClientOptions(api_key=key, tls=self.tls)
            self._ranker = Ranker(self.client, **settings)
        return self._ranker

    async def warm_up_async(self) -> None:
        """Makes the client of the running event loop."""
        self.warm_up()
        self._made().connect_async()

    def close(self) -> None:
        """Ends the connection that was made of an address; a client that was passed in is its caller's."""
        if self._ranker is not None:
            self._ranker.close()

    async def close_async(self) -> None:
        """The same of the connection of the running event loop."""
        if self._ranker is not None:
            await self._ranker.aclose()

    def to_dict(self) -> dict[str, Any]:
        """Of a ranker over an address; ValueError over a client, which is no data."""
        if not isinstance(self.client, str | list | tuple):
            raise ValueError(f"client is a {type(self.client).__name__}; expected an address, to be serialised")
        settings: dict[str, Any] = {**self.settings}
        if isinstance(stages := settings.get("stages"), Sequence) and not isinstance(stages, str):
            settings["stages"] = format_stages(stages)
        address = self.client if isinstance(self.client, str) else list(self.client)
        key = self.api_key.to_dict() if self.api_key else None
        tls = {name: value and str(value) for name, value in asdict(self.tls).items()} if self.tls else None
        return default_to_dict(self, client=address, top_k=self.top_k, api_key=key, tls=tls, **settings)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        settings = data.get("init_parameters", {})
        deserialize_secrets_inplace(settings, keys=["api_key"])
        if isinstance(settings.get("tls"), dict):
            settings["tls"] = TlsFiles(**settings["tls"])
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """The best documents, best first; `top_k` None: as in the constructor."""
        ranker, candidates, top_n = self._prepare(documents, top_k)
        return _output(documents, ranker.rank(query, candidates, top_n=top_n))

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """Like run; over an AsyncClient or an address without a thread."""
        ranker, candidates, top_n = self._prepare(documents, top_k)
        return _output(documents, await ranker.arank(query, candidates, top_n=top_n))

    def _prepare(self, documents: list[Document], top_k: int | None) -> tuple[Ranker, list[Candidate], int]:
        ranker = self._made()
        candidates = [
            ranker.candidate(f"documents[{i}]", one.content, one.meta, one.id) for i, one in enumerate(documents)
        ]
        return ranker, candidates, self.top_k if top_k is None else _checked(top_k)


def _checked(top_k: int) -> int:
    if top_k <= 0:
        raise ValueError(f"top_k is {top_k}; expected 1 or more")
    return top_k


def _output(documents: list[Document], results: list[Result]) -> dict[str, list[Document]]:
    return {"documents": [replace(documents[one.index], score=one.score) for one in results]}
