"""Ids and texts of passages: in files, one a line, and ids that a server lists of its collection."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import IO, Any

import preread
from preread.values import join_title
from preread_cli.failures import UNAVAILABLE, CommandFailed
from preread_cli.terminal import print_some

MAX_LISTINGS = 3  # of a collection: one that is cut short begins again at the first page
MAX_SHOWN = 5  # ids that a command names where many are wrong


def read_ids(source: str) -> list[str]:
    """One id a line of a file, plain, gzip or zstd, or of standard input (-); white space around it does not count."""
    from tuning.trec import JudgedFile

    return [line.strip() for _, line in JudgedFile(source).lines()]


def read_texts(source: str) -> list[str]:
    """Texts of a file, one a line: as they are, or in a .jsonl file strings, or objects with text and perhaps title.

    Raises CommandFailed for a line that is neither.
    """
    from tuning.trec import JudgedFile

    is_json = source.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")
    return [_text_of(line, str(place)) if is_json else line for place, line in JudgedFile(source).lines()]


def _text_of(line: str, place: str) -> str:
    with suppress(ValueError, RecursionError):
        value = json.loads(line)
        if isinstance(value, str):
            return value
        if isinstance(value, dict) and isinstance(text := value.get("text"), str):
            title = value.get("title")
            return join_title(title if isinstance(title, str) else None, text)
    raise CommandFailed(f"{place}: {line!r:.80}; expected a JSON string, or an object with a string text")


def write_ids(file: IO[str], ids: Iterable[str]) -> None:
    """One id a line, for `read_ids`. Says which cannot be written so: they would be read as others."""
    others = []
    for passage_id in ids:
        if passage_id != passage_id.strip() or "\n" in passage_id or passage_id.startswith("\ufeff"):
            others.append(repr(passage_id))
            continue
        file.write(f"{passage_id}\n")
    print_some("left out, no line of a file can hold it", others, MAX_SHOWN, err=True)


def passage_ids(client: preread.Client, given: Mapping[str, Any], max_listed: int | None = None) -> list[str]:
    """Those of --ids, one a line; without it those of the whole --collection, sorted, at most `max_listed`."""
    if given["ids"] is not None:
        return read_ids(given["ids"])
    collection = given["collection"]
    try:
        ids = _list(client, collection, max_listed)
    except preread.PrereadError as exc:
        if exc.code != "UNIMPLEMENTED":
            raise
        cause = "it is older than this command, or no reranking server"
        message = f"the server at {exc.address} cannot list passages: {cause}. Name the passages with --ids"
        raise CommandFailed(message) from exc
    if not ids:
        raise CommandFailed(f"collection {collection!r} of the server at {given['address']} is empty")
    if max_listed is not None and len(ids) > max_listed:
        infos = (one for one in client.list_collections() if collection in (one.name, *one.aliases))
        count = next((f"{one.num_passages:,}" for one in infos), f"more than {max_listed:,}")
        limit = f"without --ids or --run at most {max_listed:,} are ranked. Let a first stage choose candidates"
        raise CommandFailed(f"collection {collection!r} has {count} passages; {limit}")
    return ids


def _list(client: preread.Client, collection: str, max_listed: int | None) -> list[str]:
    """Ids of a collection, sorted, each once; of more than `max_listed` one more than that."""
    for _ in range(MAX_LISTINGS):
        ids = set[str]()  # from Redis one may come twice
        try:
            for passage_id in client.list_passages(collection):
                ids.add(passage_id)
                if max_listed is not None and len(ids) > max_listed:
                    break
        except preread.InvalidRequest as exc:
            if [one.field for one in exc.violations] != ["page_token"]:
                raise
        else:
            return sorted(ids)
    cause = "it is replaced, or its Redis restarts, again and again"
    raise CommandFailed(f"collection {collection!r} could not be listed: {cause}", UNAVAILABLE)
