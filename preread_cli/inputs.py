"""Queries, ids and candidates out of files or standard input, for commands that ask a server. Knows no server.

Gzip and zstd are seen through; "-" is standard input. Blank lines are skipped. A line that begins with `{` is a
JSON object in files of candidates and queries. What cannot be read stops the command: the message has file and line.

What a store holds of one collection, for commands that ask a server about it. Loads no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from preread.types import Candidate, id_text, join_title
from preread_cli.failures import CommandFailed
from preread_cli.options import ADMIN_READ_SECONDS

if TYPE_CHECKING:
    from encoder_worker.sources import Refused


MAX_SHOWN = 20


def read_ids(source: str) -> list[Candidate]:
    """One passage id per line."""
    return [Candidate(passage_id=line.strip()) for _, line in _lines(source)]


def read_candidates(source: str) -> list[Candidate]:
    """One text per line, or one object with `id` (or `_id`), `text`, or both; a `title` goes before the text."""
    candidates = []
    for where, line in _lines(source):
        if not line.startswith("{"):
            candidates.append(Candidate(text=line))
            continue
        row = _object(where, line)
        passage_id, text, title = _text(where, row, "id", "_id"), _text(where, row, "text"), _text(where, row, "title")
        if passage_id is None and text is None:
            raise CommandFailed(f"{where}: neither id nor text; expected one or both")
        candidates.append(Candidate(passage_id, text if text is None else join_title(title, text)))
    return candidates


def read_queries(source: str) -> dict[str, str]:
    """query id -> text: `id<TAB>text` per line, or one object with `id` (or `_id`) and `text`."""
    queries: dict[str, str] = {}
    for where, line in _lines(source):
        if line.startswith("{"):
            row = _object(where, line)
            query_id, text = _text(where, row, "id", "_id"), _text(where, row, "text")
            if query_id is None or text is None:
                raise CommandFailed(f"{where}: fields {', '.join(row)}; expected id and text")
        else:
            query_id, tab, text = line.partition("\t")
            if not tab:
                raise CommandFailed(f"{where}: no tab; expected id<TAB>text, or a JSON object")
        if query_id in queries:
            raise CommandFailed(f"{where}: query id {query_id!r} a second time")
        queries[query_id] = text
    if not queries:
        raise CommandFailed(f"{source}: no queries")
    return queries


def _lines(source: str) -> Iterator[tuple[str, str]]:
    """(file:line, text without its line end) of every line that is not blank."""
    from tuning.trec import JudgedFile

    for place, line in JudgedFile(source).lines():
        yield str(place), line


def tell_refused(refused: Sequence[Refused]) -> None:
    """Lines that a command leaves out, on standard error."""
    for item in refused[:MAX_SHOWN]:
        click.echo(f"refused: {item}", err=True)
    if len(refused) > MAX_SHOWN:
        click.echo(f"refused: {len(refused) - MAX_SHOWN:,} more", err=True)


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise CommandFailed(f"{where}: begins with {{ and is not JSON ({exc})") from exc
    return row


def _text(where: str, row: dict[str, Any], *names: str) -> str | None:
    """The first of the fields that is there; an integer is taken as its digits."""
    for name in names:
        if row.get(name) is None:
            continue
        value = id_text(row[name])
        if value is None:
            raise CommandFailed(f"{where}: {name} is {row[name]!r}; expected a string")
        try:
            value.encode()
        except UnicodeEncodeError as exc:  # JSON can spell half a surrogate pair
            raise CommandFailed(f"{where}: {name} is not valid Unicode: {exc.reason}") from exc
        return value
    return None


def stored_ids(store_url: str, name: str, *, max_passages: int | None = None, otherwise: str = "") -> list[str]:
    """Ids of a whole collection, or of what an alias means, sorted.

    Args:
        max_passages: of more than these the command says no; None: there is no limit.
        otherwise: what it says then, beside how many there are.

    Raises:
        CommandFailed: more than that, or none.
    """
    from cache.collection import Collection
    from cache.open import open_store

    store = open_store(store_url, read_budget_seconds=ADMIN_READ_SECONDS)
    try:
        collection = Collection.open(store, name)
        num_passages = collection.stats().num_passages
        if max_passages is not None and num_passages > max_passages:
            raise CommandFailed(f"collection {name!r} has {num_passages:,} passages; {otherwise}")
        ids = sorted(passage_id for passage_id, _ in islice(store.scan(collection.name), max_passages))
    finally:
        store.close()
    if not ids:
        raise CommandFailed(f"collection {name!r} is empty")
    return ids
