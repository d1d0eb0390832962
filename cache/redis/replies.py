"""Replies of a server that may be shared: their types, and names and checksums of what this store writes in hashes."""

from contextlib import suppress

import xxhash

from cache import errors
from cache.record import check_name, check_storage_name, is_passage_id


def is_true(reply: object) -> bool:
    return reply is True


def is_count(reply: object) -> bool:
    return isinstance(reply, int)


def is_value(reply: object) -> bool:
    return reply is None or isinstance(reply, bytes)


def is_list(reply: object) -> bool:
    return isinstance(reply, list) and all(isinstance(one, bytes) for one in reply)


def is_pairs(reply: object) -> bool:
    return isinstance(reply, dict) and is_list([*reply, *reply.values()])


def is_page(reply: object, start: bytes) -> bool:
    """A cursor and keys of SCAN, all of them under the requested prefix."""
    if not (isinstance(reply, tuple) and len(reply) == 2 and is_count(reply[0]) and is_list(reply[1])):
        return False
    return all(key.startswith(start) for key in reply[1])


def passage_id_of(key: bytes, start: bytes) -> str | None:
    """The id that a key stands for; None where no passage can have it."""
    passage_id = key[len(start) :].decode(errors="surrogateescape")
    return passage_id if is_passage_id(passage_id) else None


def is_page_or_info(reply: object, start: bytes) -> bool:
    return isinstance(reply, dict) or is_page(reply, start)


def scan_place(after: bytes, servers: str, num_nodes: int) -> tuple[int, int, str]:
    """Node, cursor and process that a page begins at."""
    if not after:
        return 0, 0, ""
    known, index, cursor, process = [*after.decode(errors="replace").split(" "), "", "", "", ""][:4]
    if known != servers or not (_is_number(index) and _is_number(cursor)) or int(index) >= num_nodes:
        raise errors.InvalidPageToken("the Redis servers are not those of the page before")
    return int(index), int(cursor), process


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 20  # of 64 bits


def name_of(field: bytes, *, stored: bool = False) -> str | None:
    """A collection's or alias's name, or storage name; None for other bytes, which this store did not write."""
    with suppress(UnicodeDecodeError, errors.InvalidName):
        return check_storage_name(field.decode()) if stored else check_name("name", field.decode())
    return None


def alias_of(field: bytes, value: bytes) -> tuple[str, str]:
    collection, separator, checksum = value.partition(b":")
    alias, name = written_name("alias", field), written_name("alias", collection)
    if separator and checksum != checksum_of(alias, name).encode():  # earlier versions wrote none
        raise errors.DamagedRecord("its checksum does not match")
    return alias, name


def check_generation(field: bytes, value: bytes) -> None:
    number, separator, checksum = value.partition(b":")
    name = written_name("collection", field, stored=True)
    if not number.isdigit() or (separator and checksum != checksum_of(name, number.decode()).encode()):
        raise errors.DamagedRecord("its checksum does not match")


def check_finds_texts(field: bytes, value: bytes) -> None:
    if value != checksum_of("texts", written_name("collection", field, stored=True)).encode():
        raise errors.DamagedRecord("its checksum does not match")


def written_name(kind: str, field: bytes, *, stored: bool = False) -> str:
    if (name := name_of(field, stored=stored)) is None:
        raise errors.DamagedRecord(f"no {kind} of this store")
    return name


def checksum_of(field: str, value: str) -> str:
    """Of a value in one of the store's hashes, in hex; under another field, or changed, it does not fit."""
    return xxhash.xxh3_64_hexdigest(f"{field}:{value}".encode())
