"""A judged collection: passages, queries, and which passages answer which query.

Passages are read by the reader that indexes them, and queries and judgements by the same rules: lines that indexing
would refuse are left out, and listed.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from cache.collection import Collection
from encoder_worker.sources import Fields, Refused, SeenIds, SourceError, SourcePassage
from encoder_worker.sources.files import Source
from tuning import EvaluationError
from tuning.trec import JudgedFile, Qrels, RunFile, read_qrels

_CORPUS_NAMES = ("corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst")
_QUERY_NAMES = ("queries.jsonl", "queries.jsonl.gz", "queries.jsonl.zst")
_QUERY_FIELDS = Fields(title=None)
_QRELS_NAMES = ("qrels.tsv", "qrels/test.tsv", "qrels.txt", "qrels.jsonl")


@dataclass(frozen=True)
class JudgedCollection:
    """Passages, and queries to run: each has a text and a judgement; where there are none at all, `qrels` is empty."""

    name: str
    passages: dict[str, str]  # passage_id -> text; empty where they are only in a store
    queries: dict[str, str]  # query_id -> text
    qrels: Qrels
    num_judgements_of_unknown_queries: int = 0
    unknown_queries: tuple[str, ...] = ()  # judged, but without a text
    splits: dict[str, str] = field(default_factory=dict)  # query_id -> `split` of queries.jsonl
    refused: tuple[Refused, ...] = ()  # lines of the three files that were left out, and why
    candidates: RunFile | None = None  # the first stage's ranking; None: BM25's
    stored: Collection | None = None  # the same passages, indexed: their states, and where there are none their texts

    def sample(self, max_queries: int | None, seed: int) -> Self:
        """At most `max_queries` queries (None: all), drawn without replacement; the same seed draws the same."""
        if max_queries is None or len(self.queries) <= max_queries:
            return self
        chosen = set(random.Random(seed).sample(sorted(self.queries), max_queries))
        queries = {q: text for q, text in self.queries.items() if q in chosen}
        return replace(self, queries=queries, qrels={q: own for q, own in self.qrels.items() if q in chosen})


def read_judged(
    folder: str | Path | None = None,
    *,
    corpus: str | Path | None = None,
    queries: str | Path | None = None,
    qrels: str | Path | None = None,
    split: str | None = None,
    need_corpus: bool = True,
    need_queries: bool = True,
    need_qrels: bool = True,
) -> JudgedCollection:
    """A BEIR folder, or its three files by name; a file that is named wins over the folder's.

    `split`: only the queries of qrels/<split>.tsv where there is such a file, else those whose queries.jsonl row has it
    as `split`. Without `need_corpus`, passages may come from a store; without `need_queries`, queries may be those that
    are judged, without texts; without `need_qrels`, queries need no judgements.
    Raises EvaluationError: a file that is missing, cannot be read or holds nothing of use; no query left to run. A line
    that cannot be used is in `refused`, and left out.
    """
    folder = Path(folder) if folder is not None else None
    if folder is not None and not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder; expected corpus.jsonl, queries.jsonl and qrels (BEIR)")
    corpus_path = _find(folder, corpus, _CORPUS_NAMES, "corpus", needed=need_corpus)
    queries_path = _find(folder, queries, _QUERY_NAMES, "queries", needed=need_queries)
    names = (f"qrels/{split}.tsv", *_QRELS_NAMES) if split is not None else _QRELS_NAMES
    qrels_path = _find(folder, qrels, names, "qrels", needed=need_qrels)
    named_by = queries_path or qrels_path
    assert named_by is not None  # one of them is `needed`

    refused: list[Refused] = []
    passages = _read_corpus(corpus_path, refused) if corpus_path is not None else {}
    texts, splits = _read_queries(queries_path, refused) if queries_path is not None else ({}, {})
    judged = read_qrels(qrels_path, refused) if qrels_path is not None else {}
    texts = texts if queries_path is not None else dict.fromkeys(judged, "")
    unknown = tuple(q for q in judged if q not in texts)
    run = {q: texts[q] for q in texts if q in judged or not judged}
    if split is not None and (qrels_path is None or qrels_path.stem != split):
        run = _of_split(run, splits, split, named_by)
    if not run:
        raise EvaluationError(f"{qrels_path}: judges no query of {queries_path}")
    return JudgedCollection(
        name=folder.resolve().name if folder is not None else named_by.name.split(".")[0],
        passages=passages,
        queries=run,
        qrels={q: judged[q] for q in run if q in judged},
        num_judgements_of_unknown_queries=sum(len(judged[q]) for q in unknown),
        unknown_queries=unknown,
        splits=splits,
        refused=tuple(refused),
    )


def _of_split(queries: dict[str, str], splits: dict[str, str], split: str, path: Path) -> dict[str, str]:
    """Queries whose row has the split. EvaluationError: none, with those there are."""
    known = {splits[q] for q in queries if q in splits}
    if split not in known:
        has = ", ".join(sorted(known)) or "its rows have no field `split`"
        raise EvaluationError(f"{path}: no judged query of split {split!r}; it has: {has}")
    return {q: text for q, text in queries.items() if splits.get(q) == split}


def _find(
    folder: Path | None, named: str | Path | None, names: tuple[str, ...], kind: str, *, needed: bool
) -> Path | None:
    if named is not None:
        return Path(named)
    found = next((folder / name for name in names if (folder / name).is_file()), None) if folder is not None else None
    if found is None and needed:
        where = f"{folder}: has none of {', '.join(names)}" if folder is not None else f"no {kind} file is named"
        raise EvaluationError(f"{where}; name the {kind} file")
    return found


def _read_corpus(path: Path, refused: list[Refused]) -> dict[str, str]:
    """{passage_id: text} of any file that `preread index` reads."""
    try:
        return _texts(JudgedFile(path, refused), Source([path]), "passages")
    except SourceError as exc:
        raise EvaluationError(str(exc)) from exc


def _read_queries(path: Path, refused: list[Refused]) -> tuple[dict[str, str], dict[str, str]]:
    """({query_id: text}, {query_id: split}) of BEIR's JSON lines (`id` or `_id`, `text`, optionally `split`)."""
    file = JudgedFile(path, refused)
    splits: dict[str, object] = {}

    def items() -> Iterator[SourcePassage | Refused]:
        for place, row in file.rows():
            item = _QUERY_FIELDS.of_row(place, row)
            if isinstance(item, SourcePassage):
                splits.setdefault(item.passage_id, row.get("split"))
            yield item

    texts = _texts(file, items(), "queries")
    return texts, {q: split for q in texts if isinstance(split := splits[q], str)}


def _texts(file: JudgedFile, items: Iterable[SourcePassage | Refused], kind: str) -> dict[str, str]:
    """{id: text}, at least one; the first of several with one id counts, as in an index run."""
    seen = SeenIds()
    once = (seen.once(item) if isinstance(item, SourcePassage) else item for item in items)
    texts = {item.passage_id: item.text for item in file.usable(once)}
    file.require(texts, kind)
    return texts
