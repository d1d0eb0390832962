"""Plain functions: texts in, ranked (index, score) out.

from preread.integrations.functions import rank

for index, score in rank("why is the sky blue", texts, client="127.0.0.1:50051"):
    print(score, texts[index])
"""

from collections.abc import Iterable, Sequence
from typing import Unpack

from preread.channel import LOCAL_ADDRESS
from preread.integrations.ranker import NotScored, Ranker, Settings, Target
from preread.values import Candidate, RerankOptions, Result

__all__ = ["NotScored", "Ranked", "arank", "rank", "rank_many"]


# Where a text was in the list, and its score, P(yes) in [0, 1]; None: not scored, with on_unscored="last".
Ranked = tuple[int, float | None]


def rank(
    query: str,
    texts: Sequence[str | None],
    *,
    ids: Sequence[object] | None = None,
    top_n: int | None = None,
    client: Target = LOCAL_ADDRESS,
    **settings: Unpack[Settings],
) -> list[Ranked]:
    """Ranks texts, best first. Raises PrereadError, NotScored among them.

    `ids`, of the same length, are passage ids of `collection`, or None where a text has none; a text may be None where
    there is an id. A Client that is passed in keeps its connection; an address connects for this call.
    """
    with Ranker(client, **settings) as ranker:
        return _ranked(ranker.rank(query, _candidates(ranker, texts, ids), top_n=top_n or 0))


async def arank(
    query: str,
    texts: Sequence[str | None],
    *,
    ids: Sequence[object] | None = None,
    top_n: int | None = None,
    client: Target = LOCAL_ADDRESS,
    **settings: Unpack[Settings],
) -> list[Ranked]:
    """Like rank; over an AsyncClient or an address without a thread."""
    async with Ranker(client, **settings) as ranker:
        return _ranked(await ranker.arank(query, _candidates(ranker, texts, ids), top_n=top_n or 0))


def rank_many(
    requests: Iterable[tuple[str, Sequence[str]]],
    *,
    top_n: int | None = None,
    client: Target = LOCAL_ADDRESS,
    **settings: Unpack[Settings],
) -> list[list[Ranked]]:
    """Ranks the texts of each (query, texts), several queries at once; the rankings in the order of `requests`."""
    with Ranker(client, **settings) as ranker:
        triples = (
            (query, _candidates(ranker, texts, None), RerankOptions(top_n=top_n or 0)) for query, texts in requests
        )
        return [_ranked(results) for results in ranker.rank_many(triples)]


def _candidates(ranker: Ranker, texts: Sequence[str | None], ids: Sequence[object] | None) -> list[Candidate]:
    if isinstance(texts, str):
        raise TypeError("texts is a string; expected a list of strings")
    if ids is None:
        return [ranker.candidate(f"texts[{i}]", text) for i, text in enumerate(texts)]
    if not ranker.options.get("collection"):
        raise ValueError("ids is set, but collection is not; expected both: ids are of a collection")
    if len(ids) != len(texts):
        raise ValueError(f"ids has {len(ids)} entries; expected {len(texts)}, one for each text")
    pairs = enumerate(zip(texts, ids, strict=True))
    return [ranker.candidate(f"texts[{i}]", text, own_id=passage_id) for i, (text, passage_id) in pairs]


def _ranked(results: Sequence[Result]) -> list[Ranked]:
    return [(one.index, one.score) for one in results]
