"""Deterministic held-out split: whatever shares a passage, a question or a topic falls on the same side."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable

from training.collections_io import Collection


def normalise(text: str) -> str:
    """Lower-case words only: two texts that differ in case, digits or punctuation are near-duplicates."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def fraction(key: str) -> float:
    """A stable number in [0, 1) from a text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


class Components:
    """Union-find over string keys."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, key: str) -> str:
        root = key
        while (parent := self._parent.setdefault(root, root)) != root:
            root = parent
        while self._parent[key] != root:
            self._parent[key], key = root, self._parent[key]
        return root

    def union(self, keys: Iterable[str]) -> None:
        roots = [self.find(key) for key in keys]
        for root in roots[1:]:
            self._parent[self.find(root)] = self.find(roots[0])


def held_out_queries(
    collection: Collection, share: float, topic: Callable[[str], str] = normalise, max_component: int = 60
) -> set[str]:
    """About `share` of the queries, as whole components of (query topic, passage text, passage opening) keys.

    A component larger than `max_component` queries stays in training: one giant family of near-duplicates would
    make the held-out part a test of that family alone.
    """
    components = Components()
    for query_id, grades in collection.qrels.items():
        keys = [f"query {topic(collection.queries[query_id])}"]
        for passage_id in grades:
            body = normalise(collection.passages[passage_id])
            keys += [f"passage {passage_id}", f"body {body}", f"opening {body[:200]}"]
        components.union(keys)
    members: dict[str, list[str]] = {}
    for query_id in collection.qrels:
        members.setdefault(components.find(f"query {topic(collection.queries[query_id])}"), []).append(query_id)
    held: set[str] = set()
    for queries in members.values():
        if len(queries) <= max_component and fraction(min(collection.queries[q] for q in queries)) < share:
            held.update(queries)
    return held
