"""Damage to the values that a Redis holds: a byte changed, two values exchanged, and whether that is ever silent.

    python -m benchmarks.reliability redis_damage [--count 3000] [--seed 0]

Every value of a store takes part: records, manifests, aliases, generations, and ids by their text. Outcomes are those
of `damage`. A key that is gone is not among the faults, because that is what a deletion looks like.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import uuid

import redis

from benchmarks.redis_server import redis_url
from benchmarks.reliability.damage import NAMES, Target, damage, fill
from cache.open import open_store
from cache.store import Store

_READ_SECONDS = 10.0  # a slow machine is no damage


class Values(Target):
    """A store in Redis whose values get a byte changed."""

    def __init__(self, url: str) -> None:
        prefix = uuid.uuid4().hex
        self._url, self._prefix = f"{url}?prefix={prefix}", f"{prefix}:".encode()
        self._client = redis.Redis.from_url(url)
        with_fields = self.open()
        fill(with_fields)
        with_fields.set_alias("next", NAMES[1])
        with_fields.close()
        self._values = {part: self._read(part) for part in self._parts()}
        self._changed: set[str] = set()

    def parts(self) -> dict[str, int]:
        return {part: len(value) for part, value in self._values.items()}

    def flip(self, part: str, offset: int, mask: int) -> None:
        value = bytearray(self._values[part])
        value[offset] ^= mask
        self._write(part, bytes(value))

    def open(self) -> Store:
        return open_store(self._url, read_budget_seconds=_READ_SECONDS)

    def restore(self) -> None:
        for part in self._changed:
            self._write(part, self._values[part])
        self._changed = set()

    def _parts(self) -> list[str]:
        """`records of COLLECTION/ID`, `sets of COLLECTION/DIGEST` of the one id in each, or `HASH/FIELD`."""
        parts = []
        for key in self._client.scan_iter(self._prefix + b"*"):
            name = key.removeprefix(self._prefix).decode()
            if name.startswith(("p:", "t:")):
                kind, collection, rest = name.split(":", 2)
                parts.append(f"{'records' if kind == 'p' else 'sets'} of {collection}/{rest}")
            else:
                parts += [f"{name}/{field.decode()}" for field in self._client.hkeys(key)]
        return sorted(parts)

    def _key(self, part: str) -> tuple[bytes, str | None]:
        kind, _, name = part.partition("/")
        what, of, collection = kind.partition(" of ")
        if of:
            return self._prefix + f"{'p' if what == 'records' else 't'}:{collection}:{name}".encode(), None
        return self._prefix + kind.encode(), name

    def _read(self, part: str) -> bytes:
        key, field = self._key(part)
        if part.startswith("sets"):
            (value,) = self._client.zrange(key, 0, -1)
        else:
            value = self._client.get(key) if field is None else self._client.hget(key, field)
        assert isinstance(value, bytes)
        return value

    def _write(self, part: str, value: bytes) -> None:
        key, field = self._key(part)
        if part.startswith("sets"):
            self._client.delete(key)
            self._client.zadd(key, {value: 0})
        elif field is None:
            self._client.set(key, value)
        else:
            self._client.hset(key, field, value)
        self._changed.add(part)


class Exchanged(Values):
    """The same, whose values of one kind change places; a part's bytes say with which other."""

    def parts(self) -> dict[str, int]:
        return {part: len(self._like(part)) for part in self._values}

    def flip(self, part: str, offset: int, mask: int) -> None:
        other = self._like(part)[offset]
        self._write(part, self._values[other])
        self._write(other, self._values[part])

    def _like(self, part: str) -> list[str]:
        """Other values of its kind, records of every collection being one."""
        kind = part.split()[0].partition("/")[0]
        return [one for one in self._values if one.startswith(kind) and one != part]


def run(count: int, seed: int) -> list[dict[str, object]]:
    """Counts by what was damaged, for `count` faults."""
    command = [sys.executable, "-m", __name__, str(count), str(seed)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows: list[dict[str, object]] = json.loads(answer.stdout)
    return rows


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # which tells of every damaged alias
    with redis_url() as url:
        targets = {"a byte of": Values(url), "exchanged": Exchanged(url)}
        print(json.dumps(damage(targets, int(sys.argv[1]), int(sys.argv[2]))))
