"""API keys and what each may do. Holds digests only; knows no transport.

A line of a key file is `SCOPES KEY`, scopes with commas between them; # starts a comment. On the
command line and in the environment a key is `SCOPES:KEY`, or KEY alone, which may do everything.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from pathlib import Path

from preread.edge.addresses import listens_on_loopback

MIN_KEY_LENGTH = 16  # shorter ones can be guessed


class Scope(Enum):
    """What a call needs. ADMIN includes the others."""

    RERANK = "rerank"  # ask: rerank, list, encode a text that comes with a request
    INDEX = "index"  # write passages, read counts
    ADMIN = "admin"  # take away: delete, drop, move aliases


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key; the key itself is not kept."""

    digest: bytes  # SHA-256
    scopes: frozenset[Scope]

    @property
    def key_id(self) -> str:
        """Tells keys apart in logs without giving them away."""
        return self.digest.hex()[:8]

    def may(self, *scopes: Scope) -> bool:
        """Whether any of the scopes is this key's."""
        return Scope.ADMIN in self.scopes or not self.scopes.isdisjoint(scopes)


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys of a server. None at all: whoever reaches it may do everything."""

    keys: tuple[ApiKey, ...] = ()

    @property
    def required(self) -> bool:
        return bool(self.keys)

    def find(self, presented: str) -> ApiKey | None:
        """The key that was presented, in time that does not depend on how much of it is right."""
        digest = sha256(presented.encode()).digest()
        found = None
        for key in self.keys:  # all of them, also after a match
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def __add__(self, other: ApiKeys) -> ApiKeys:
        return ApiKeys(self.keys + other.keys)


def make_key(key: str, scopes: Iterable[Scope]) -> ApiKey:
    """
    Raises:
        ValueError: a key too short, or with characters that no header can carry. The message does not show it.
    """
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"an API key is {len(key)} characters long; expected {MIN_KEY_LENGTH} or more, ASCII, no spaces"
        )
    return ApiKey(sha256(key.encode()).digest(), frozenset(scopes))


def parse_keys(values: Iterable[str]) -> ApiKeys:
    """Keys as given on the command line: `SCOPES:KEY`, or KEY for one that may do everything."""
    keys = []
    for value in values:
        key = without_scopes(value)
        scopes = value.removesuffix(key).rstrip(":")
        keys.append(make_key(key, _scopes(scopes) if scopes else [Scope.ADMIN]))
    return ApiKeys(tuple(keys))


def without_scopes(value: str) -> str:
    """The key in `SCOPES:KEY`, or KEY itself, which may have colons too."""
    scopes, colon, key = value.partition(":")
    known = {scope.value for scope in Scope}
    return key if colon and known.issuperset(scopes.split(",")) else value


def read_keys(path: Path) -> ApiKeys:
    """A key file.

    Raises:
        OSError: it cannot be read.
        ValueError: a line that is not `SCOPES KEY`, named by number; or no key at all.
    """
    keys = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2:
            raise ValueError(f"{path}: line {number} has {len(words)} words; expected SCOPES KEY")
        try:
            keys.append(make_key(words[1], _scopes(words[0])))
        except ValueError as exc:
            raise ValueError(f"{path}: line {number}: {exc}") from None
    if not keys:
        raise ValueError(f"{path}: holds no key; expected at least one line SCOPES KEY")
    return ApiKeys(tuple(keys))


def _scopes(text: str) -> list[Scope]:
    try:
        return [Scope(name) for name in text.split(",")]
    except ValueError:
        known = ", ".join(scope.value for scope in Scope)
        raise ValueError(f"scopes are {text!r:.100}; expected some of {known}, with commas between them") from None


def bearer(header: str) -> str:
    """The key in an `authorization` header: after Bearer, or all of it where it is one word; "" where there is none."""
    words = header.split()
    if len(words) == 2 and words[0].lower() == "bearer":
        return words[1]
    return words[0] if len(words) == 1 and words[0].lower() != "bearer" else ""


def refuse_control_tokens(host: str, keys: ApiKeys) -> None:
    """Raises ValueError where strangers could write prompts: control tokens in texts count, and no key is asked for.

    Args:
        host: the address to listen on.
    """
    if not keys.required and not listens_on_loopback(host):
        raise ValueError(
            f"read_control_tokens is on and {host!r} is reached from other machines without a key; expected API keys, "
            "or a loopback address: a text with control tokens writes the prompt"
        )
