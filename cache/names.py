"""What passage ids, collection names and aliases may look like.

Ids are the user's own and may be any text; names appear in file names, Redis keys and command lines, so they may not.
"""

import re

from cache.errors import InvalidName

MAX_PASSAGE_ID_BYTES = 512
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def passage_id_bytes(passage_id: str) -> bytes:
    """The id as stored. Raises InvalidName where it is empty, longer than 512 bytes of UTF-8, or not encodable."""
    try:
        encoded = passage_id.encode()
    except UnicodeEncodeError as exc:
        raise InvalidName(f"passage_id: {passage_id!r} cannot be written as UTF-8: {exc.reason}") from exc
    if not encoded:
        raise InvalidName("passage_id: empty, expected at least one character")
    if len(encoded) > MAX_PASSAGE_ID_BYTES:
        raise InvalidName(
            f"passage_id: {passage_id[:40]!r}... is {len(encoded)} bytes, at most {MAX_PASSAGE_ID_BYTES} are allowed"
        )
    return encoded


def is_passage_id(passage_id: str) -> bool:
    """Whether a passage of this id can exist at all."""
    try:
        passage_id_bytes(passage_id)
    except InvalidName:
        return False
    return True


def check_name(field: str, name: str) -> str:
    """A collection name or alias, returned as it is. Raises InvalidName otherwise."""
    if not _NAME.fullmatch(name):
        raise InvalidName(
            f"{field}: {name[:140]!r}, expected 1 to 128 of letters, digits, '.', '_' and '-', "
            "the first a letter or digit"
        )
    return name
