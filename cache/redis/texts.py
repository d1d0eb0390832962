"""Passages by their text: a sorted set for each text, of passage ids in order of bytes.

    preread:texts                    hash          storage name -> CHECKSUM, where every passage is in such a set
    preread:t:STORAGE_NAME:DIGEST    sorted set    passage ids, all of score 0; with the store's TTL if it has one

DIGEST is the first half of the text's SHA-256 in hex. An id is added before its record is written, and removed after
the record is gone or has another text: what a crash leaves behind is found in vain, and no stored passage is missed.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from cache.record import is_passage_id
from cache.redis.link import Command, Link

_CHUNK = 1000
# Of a set, after the latest of its passages, whose record is written later: none is there and not found.
_AFTER_RECORDS_SECONDS = 60
_DIGEST_BYTES = 16  # of a key: sets are hints, and the record has the whole digest

Entries = Iterable[tuple[str, bytes]]  # a passage id and the digest of its text


class TextSets:
    """The sets of one store; collections are given by the start of their keys."""

    def __init__(self, ttl_seconds: int | None) -> None:
        self._ttl_seconds = ttl_seconds

    def ids(self, link: Link, key_start: bytes, digests: Sequence[bytes], limit: int) -> list[list[str]]:
        """Per digest, up to `limit` ids that may have it; none where the key holds something else."""
        commands = [("ZRANGE", _key(key_start, digest), 0, limit - 1) for digest in digests]
        return [
            [] if isinstance(reply, Exception) else list(filter(is_passage_id, map(_decoded, reply)))
            for reply in link.run(commands, _is_ids, _CHUNK)
        ]

    def add(self, link: Link, key_start: bytes, entries: Entries) -> None:
        commands: Iterator[Command] = (
            command for passage_id, digest in entries for command in self._adding(_key(key_start, digest), passage_id)
        )
        _run(link, commands)

    def remove(self, link: Link, key_start: bytes, entries: Entries) -> None:
        """Redis drops a set with its last id."""
        _run(link, (("ZREM", _key(key_start, digest), passage_id.encode()) for passage_id, digest in entries))

    def num_missing(self, link: Link, key_start: bytes, entries: Entries) -> int:
        """How many of the entries are in no set."""
        commands = [("ZSCORE", _key(key_start, digest), passage_id.encode()) for passage_id, digest in entries]
        return sum(not isinstance(reply, float) for reply in link.run(commands, _is_score, _CHUNK))

    def _adding(self, key: bytes, passage_id: str) -> Iterator[Command]:
        yield "ZADD", key, 0, passage_id.encode()
        if self._ttl_seconds is not None:
            yield "EXPIRE", key, self._ttl_seconds + _AFTER_RECORDS_SECONDS


def _key(key_start: bytes, digest: bytes) -> bytes:
    return key_start + digest[:_DIGEST_BYTES].hex().encode()


def _run(link: Link, commands: Iterator[Command]) -> None:
    while chunk := list(islice(commands, _CHUNK)):
        link.run(chunk, lambda reply: isinstance(reply, int), _CHUNK)  # a key of another type stays as it is


def _decoded(passage_id: bytes) -> str:
    return passage_id.decode(errors="surrogateescape")


def _is_ids(reply: object) -> bool:
    return isinstance(reply, list) and all(isinstance(one, bytes) for one in reply)


def _is_score(reply: object) -> bool:
    return reply is None or isinstance(reply, float)
