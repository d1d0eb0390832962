"""Laws of the search by words: bm25s' ranking, an index per generation, within limits, shared by those that wait."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cache.collection import Collection, StoredPassage
from cache.manifest import Manifest
from cache.memory import MemoryStore
from cache.states import PassageStates, text_digest
from decoder_server.edge import word_search
from decoder_server.edge.word_search import WordIndex, WordSearch
from preread.errors import DeadlineExceeded, FailedPrecondition, InvalidRequest, NotFound, PermissionDenied
from preread_edge import access
from tuning.baselines import search as bm25s_search

WORDS = ["sky", "blue", "grass", "green", "sea", "wave", "light", "the", "of", "air", "sun", "long", "Paris", "France"]


def at_once() -> None:
    """A step of work that rests for no other."""


def index_of(texts: dict[str, str]) -> WordIndex:
    index = WordIndex()
    assert index.add(at_once, [*texts.items()], 1 << 30)
    index.finish(at_once)
    return index


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def make(store: MemoryStore, name: str, texts: dict[str, str], **settings: Any) -> Collection:
    manifest = Manifest(
        collection=name, fingerprint="f", checkpoint="c", dim=4, max_passage_tokens=8, passage_template="",
        pooling_version=1, compression_ratio=1, codec="Flat", **settings,
    )  # fmt: skip
    collection = Collection.create(store, manifest, exist_ok=True)
    put(collection, texts)
    return collection


def put(collection: Collection, texts: dict[str, str]) -> None:
    def states(text: str) -> PassageStates:
        return PassageStates(np.zeros((1, 4), np.float32), (1,), 1, False, text_digest(text))

    collection.put_many([StoredPassage(one, states(text), text) for one, text in texts.items()])


def ids(found: list[word_search.FoundByWords]) -> list[str]:
    return [one.passage_id for one in found]


def soon() -> float:
    return time.monotonic() + 30


def test_a_score_by_hand() -> None:
    """N = 2, df = 1, every text of two words: ln(1 + 1.5 / 1.5) * 1 / (1.5 + 1), the same for both passages."""
    found = index_of({"a": "blue sky", "b": "green grass"}).search(at_once, "The SKY, grass and water", 10)
    assert ids(found) == ["a", "b"]
    assert [one.score for one in found] == pytest.approx([np.log(2) / 2.5] * 2)


def test_it_ranks_as_bm25s_does() -> None:
    rng = random.Random(7)
    texts = {f"p{i}": " ".join(rng.choices(WORDS, k=rng.randrange(12))) for i in range(200)}
    queries = {f"q{i}": " ".join(rng.choices(WORDS, k=1 + i % 6)) for i in range(40)} | {"none": "unheard"}
    index = index_of(texts)
    for top in (1, 7, 500):
        expected = bm25s_search(texts, queries, top)
        for query_id, text in queries.items():
            found = index.search(at_once, text, top)
            assert [one.score for one in found] == pytest.approx([score for _, score in expected[query_id]], rel=1e-5)
            if top == 500:  # equal scores may be cut at another one
                assert {*ids(found)} == {one for one, _ in expected[query_id]}


def test_what_it_says_of_its_memory_is_no_less_than_it_takes() -> None:
    rng = random.Random(3)
    vocabulary = [f"word{i}" for i in range(5000)]
    index = index_of({f"p{i}": " ".join(rng.choices(vocabulary, k=60)) for i in range(2000)})
    strings = sum(map(sys.getsizeof, (*index.passage_ids, *index._words)))
    numbers = sum(map(sys.getsizeof, index._words.values()))
    lists = sys.getsizeof(index.passage_ids) + sys.getsizeof(index._words)
    arrays = index._weights.nbytes + index._sorted_rows.nbytes + index._ends.nbytes
    assert 1 <= index.num_bytes / (strings + numbers + lists + arrays) <= 1.5


def test_what_does_not_fit_is_not_read_to_the_end() -> None:
    index = WordIndex()
    assert not index.add(at_once, [(f"p{i}", f"word{i}") for i in range(1000)], 10_000)
    assert len(index.passage_ids) < 100


async def test_an_index_is_kept_until_the_collection_changes(threads: ThreadPoolExecutor) -> None:
    store = MemoryStore()
    collection = make(store, "docs", {"a": "blue sky", "b": "green grass"})
    store.set_alias("live", "docs")
    search = WordSearch(store, threads, 1 << 20)
    assert ids(await search.search("docs", "sky", 10, soon())) == ["a"]
    first = search._kept.get(("docs", collection.manifest.binding))
    assert ids(await search.search("live", "grass", 10, soon())) == ["b"]
    assert search._kept.get(("docs", collection.manifest.binding)) is first
    put(collection, {"c": "sky sky"})
    assert ids(await search.search("docs", "sky", 10, soon())) == ["c", "a"]
    collection.delete_many(["a", "c"])
    assert ids(await search.search("docs", "sky", 10, soon())) == []
    store.remove_alias("live")
    with pytest.raises(NotFound, match="'live' does not exist"):
        await search.search("live", "sky", 10, soon())


async def test_requests_share_a_build_that_outlives_those_that_leave(threads: ThreadPoolExecutor) -> None:
    store = MemoryStore()
    make(store, "docs", {f"p{i}": "blue sky " * 40 for i in range(500)})
    search = WordSearch(store, threads, 1 << 20)
    with pytest.raises(DeadlineExceeded, match="'docs' is still being built; send the request again"):
        await search.search("docs", "sky", 10, time.monotonic())
    (build,) = search._builds.values()
    several = await asyncio.gather(*(search.search("docs", "sky", 3, soon()) for _ in range(4)))
    assert build.done()
    assert [ids(found) for found in several] == [["p0", "p1", "p2"]] * 4
    assert not search._builds
    await search.close()


async def test_a_collection_that_cannot_be_searched_says_why(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    make(store, "silent", {"a": "sky"}, stores_text=False)
    make(store, "large", {f"p{i}": f"sky number{i}" for i in range(40)})
    search = WordSearch(store, threads, 4000)
    with pytest.raises(InvalidRequest, match="collection is 'silent'; expected a collection that stores its texts"):
        await search.search("silent", "sky", 10, soon())
    too_large = r"expected at most 100,000 passages, whose index fits --search-cache-bytes \(4,000\)"
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=too_large):
            await search.search("large", "sky", 10, soon())
    monkeypatch.setattr(word_search, "MAX_PASSAGES", 39)
    with pytest.raises(InvalidRequest, match="at most 39 passages"):
        await WordSearch(store, threads, 1 << 20).search("large", "sky", 10, soon())
    with pytest.raises(FailedPrecondition, match="--search-cache-bytes is 0"):
        await WordSearch(store, threads, 0).search("large", "sky", 10, soon())


async def test_a_key_that_is_bound_to_other_collections_finds_nothing(threads: ThreadPoolExecutor) -> None:
    store = MemoryStore()
    make(store, "secret", {"a": "sky"})
    search = WordSearch(store, threads, 1 << 20)
    access.ApiKeys.parse(["rerank@docs:bound-key-0123456789"]).check("bound-key-0123456789", [access.Scope.RERANK], "")
    with pytest.raises(PermissionDenied, match="may not use collection 'secret'"):
        await search.search("secret", "sky", 10, soon())


async def test_the_event_loop_goes_on_during_a_build_and_a_long_text(threads: ThreadPoolExecutor) -> None:
    """The longest wait of a task that sleeps for a millisecond is a small part of the build."""
    rng = random.Random(1)
    texts = {f"p{i}": " ".join(rng.choices(WORDS, k=100)) + f" number{i}" for i in range(2000)}
    store = MemoryStore()
    make(store, "docs", texts | {"long": "sky " * 200_000})
    search = WordSearch(store, threads, 1 << 20)
    began = last = time.monotonic()
    task, waits = asyncio.ensure_future(search.search("docs", "number77", 10, soon())), []
    while not task.done():
        await asyncio.sleep(0.001)
        now = time.monotonic()
        waits.append(now - last)
        last = now
    assert ids(await task) == ["p77"]
    assert max(waits) < (last - began) / 4
