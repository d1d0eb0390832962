"""Passages of a catalogue by their text: an index over the digests in the headers of its rows.

SQLite keeps it with every row that is written, moved or deleted, so it cannot fall behind. Catalogues that were made
before it was there do without until `make_text_index`; software of that time reads and writes them as before.
"""

from cache.faiss.rows import Connection, typed
from cache.record import DIGEST_BYTES, DIGEST_FROM_END, is_passage_id

_DIGEST = f"substr(header, -{DIGEST_FROM_END}, {DIGEST_BYTES})"
TEXT_INDEX = f"CREATE INDEX passages_by_text ON passages (collection_id, {_DIGEST}, passage_id);"
_BY_TEXT = f"""SELECT passage_id FROM passages INDEXED BY passages_by_text WHERE collection_id = ? AND {_DIGEST} = ?
    ORDER BY passage_id LIMIT ?"""


def has_text_index(connection: Connection) -> bool:
    query = "SELECT 1 FROM main.sqlite_master WHERE type = 'index' AND name = 'passages_by_text'"
    return connection.execute(query).fetchone() is not None


def make_text_index(connection: Connection) -> None:
    connection.num_commits()  # raises where the counters, which are signed again here, are damaged
    connection.execute(TEXT_INDEX)
    query = "UPDATE store SET schema = ?1, checksum = row_checksum(num_commits, ?1)"
    connection.execute(query, (connection.schema(),))


def ids_of_text(connection: Connection, collection_id: int, digest: bytes, limit: int) -> list[str]:
    found = connection.execute(_BY_TEXT, (collection_id, digest, limit))
    ids = (typed(bytes, encoded_id).decode(errors="surrogateescape") for (encoded_id,) in found)
    return list(filter(is_passage_id, ids))  # `verify` reports those that are no ids
