"""Search by words: BM25 over the stored texts of a collection, for the page at / and callers without a first stage.

An index is built when a collection is first searched, and kept within a byte budget until the collection changes. It is
built in steps next to the forward passes, one index at a time; requests that need the same one share its build.
bm25s, which tuning ranks its baseline with, builds in one call that holds the interpreter for seconds; the rankings
are equal (tests/decoder_server/test_word_search.py).
"""

import asyncio
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

from cache.collection import Collection
from cache.errors import CacheError
from cache.read_cache import ByteBoundedCache
from cache.store import Store
from decoder_server.engine.collections import Catalogue
from preread.errors import DeadlineExceeded, FailedPrecondition, InvalidRequest, Unavailable
from preread_edge.access import require
from preread_edge.steps import Step, stepped

T = TypeVar("T")

MAX_PASSAGES = 100_000  # of a collection: about a minute of building next to forward passes
MAX_RESULTS = 1000
# Lucene's BM25 as bm25s has it by default: no stemming, words of two and more letters or digits.
K1, B = 1.5, 0.75
_WORD = re.compile(r"(?u)\b\w\w+\b")
# Lucene's English stop words.
_STOP_WORDS = (
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not", "of",
    "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "will", "with",
)  # fmt: skip
_PAGE_PASSAGES = 64  # read from the store at a time: a text may have a megabyte
_WORDS_A_STEP, _POSTINGS_A_STEP = 500, 50_000
_WORD_BYTES, _ID_BYTES = 140, 8  # of a dictionary's entry and its number; of a list's entry
_POSTING_BYTES = 8  # int32, float32
_KEPT_BYTES = 1024  # of an entry, without its index
_Key = tuple[str, int]  # storage name and binding of a collection


@dataclass(frozen=True, slots=True)
class FoundByWords:
    """A passage that shares a word with the query."""

    passage_id: str
    score: float  # BM25


class WordIndex:
    """BM25 over texts that are added once. Rows are in the order of adding."""

    def __init__(self) -> None:
        self.passage_ids: list[str] = []
        self._words: dict[str, int] = {}
        self._rows, self._counts, self._columns = array("i"), array("i"), array("i")  # a posting each
        self._lengths = array("i")  # of each row, in words
        self._ends = np.zeros(1, np.int64)  # (num_words + 1,) of each word's postings
        self._weights = np.zeros(0, np.float32)  # (num_postings,)
        self._sorted_rows = np.zeros(0, np.int32)  # (num_postings,) by word
        self._string_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Memory that it takes once finished; until then about four times as much."""
        num_postings = max(len(self._rows), len(self._sorted_rows))
        entries = len(self._words) * _WORD_BYTES + len(self.passage_ids) * _ID_BYTES
        return self._string_bytes + entries + num_postings * _POSTING_BYTES

    def add(self, step: Step, passages: Sequence[tuple[str, str]], max_bytes: int) -> bool:
        """Ids and texts, in steps; False where it takes more memory with them, and is of no use."""
        for passage_id, text in passages:
            if self.num_bytes > max_bytes:
                return False
            counts = _count(step, text)
            row = len(self.passage_ids)
            self.passage_ids.append(passage_id)
            self._string_bytes += sys.getsizeof(passage_id)
            self._lengths.append(sum(counts.values()))
            for word, count in counts.items():
                if (column := self._words.get(word)) is None:
                    column = self._words[word] = len(self._words)
                    self._string_bytes += sys.getsizeof(word)
                self._rows.append(row)
                self._columns.append(column)
                self._counts.append(count)
            step()
        return self.num_bytes <= max_bytes

    def finish(self, step: Step) -> None:
        """Sorts the postings by word and weighs them; nothing is added afterwards."""
        columns, num_words = np.asarray(self._columns, np.int32), len(self._words)
        by_word = np.argsort(columns, kind="stable")  # like searchsorted and `[]`, it leaves the interpreter to others
        step()
        columns, self._sorted_rows = columns[by_word], np.asarray(self._rows, np.int32)[by_word]
        counts = np.asarray(self._counts, np.int32)[by_word]
        self._ends = np.searchsorted(columns, np.arange(num_words + 1))
        step()
        frequency, lengths = np.diff(self._ends), np.asarray(self._lengths, np.float32)  # passages with each word
        idf = np.log(1 + (len(lengths) - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
        penalty = K1 * ((1 - B) + B * lengths / max(float(lengths.mean()), 1e-9)) if len(lengths) else lengths
        self._weights = np.empty(len(columns), np.float32)
        for begin in range(0, len(columns), _POSTINGS_A_STEP):
            some = slice(begin, begin + _POSTINGS_A_STEP)
            self._weights[some] = idf[columns[some]] * counts[some] / (penalty[self._sorted_rows[some]] + counts[some])
            step()
        self._rows, self._counts, self._columns, self._lengths = array("i"), array("i"), array("i"), array("i")

    def search(self, step: Step, query: str, num_results: int) -> list[FoundByWords]:
        """The best passages that share a word with the query; of equal ones the one that was added first."""
        scores = np.zeros(len(self.passage_ids), np.float32)
        for word, count in _count(step, query).items():
            if (column := self._words.get(word)) is not None:
                begin, end = self._ends[column], self._ends[column + 1]
                scores[self._sorted_rows[begin:end]] += count * self._weights[begin:end]
                step()
        border = np.partition(scores, -num_results)[-num_results] if len(scores) > num_results else 0.0
        rows = np.flatnonzero((scores >= border) & (scores > 0))
        best = rows[np.argsort(-scores[rows], kind="stable")][:num_results]
        return [FoundByWords(self.passage_ids[row], float(scores[row])) for row in best.tolist()]


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is known of a collection at one generation: its index, or why it has none."""

    generation: int
    index: WordIndex | None
    value: str = ""  # of the field `collection` in the error
    expected: str = ""

    @property
    def num_bytes(self) -> int:
        return _KEPT_BYTES + (self.index.num_bytes if self.index is not None else 0)


class WordSearch:
    """Searches collections of one store by words. Lives on one event loop."""

    def __init__(self, store: Store, threads: Executor, max_bytes: int) -> None:
        """`threads` are for reads of the store; `max_bytes` holds all indexes, 0: no search."""
        self._catalogue = Catalogue(store, None, 0.0)  # of any encoder: words are words
        self._threads, self._max_bytes = threads, max_bytes
        self._kept = ByteBoundedCache[_Key, _Kept](max_bytes, lambda one: one.num_bytes, policy="lru")
        self._builds: dict[tuple[_Key, int], asyncio.Task[_Kept]] = {}
        self._turn = asyncio.Lock()

    async def search(self, name: str, query: str, num_results: int, deadline: float) -> list[FoundByWords]:
        """The best passages of a collection or alias; `deadline` is on time.monotonic's clock.

        Raises as Catalogue.open does, and PermissionDenied; InvalidRequest for a collection without texts or too large;
        Unavailable where the store does not answer; DeadlineExceeded where the index is not built by then.
        """
        require(name)
        if not self._max_bytes:
            raise FailedPrecondition("SEARCH_DISABLED", name, "search by words is disabled: --search-cache-bytes is 0")
        collection, generation = await self._call(self._open, name)
        key = collection.storage_name, collection.manifest.binding
        kept = self._kept.get(key)
        if kept is None or kept.generation != generation:
            try:
                async with asyncio.timeout_at(deadline):
                    # A caller that leaves does not end the build for the others, nor for its next request.
                    kept = await asyncio.shield(self._building(collection, key, generation))
            except TimeoutError:
                message = f"the index of collection {name!r} is still being built; send the request again"
                raise DeadlineExceeded(message) from None
        if kept.index is None:
            raise InvalidRequest("collection", kept.value, kept.expected)
        return await stepped(kept.index.search, query, num_results)

    async def close(self) -> None:
        """Ends the builds."""
        for build in [*self._builds.values()]:
            build.cancel()
            await asyncio.gather(build, return_exceptions=True)

    def _open(self, name: str) -> tuple[Collection, int]:
        collection = self._catalogue.open(name)
        try:
            return collection, collection.store.generation(collection.storage_name)
        except CacheError as exc:
            raise _unreadable(exc) from exc

    def _building(self, collection: Collection, key: _Key, generation: int) -> "asyncio.Task[_Kept]":
        def ended(build: "asyncio.Task[_Kept]") -> None:
            del self._builds[key, generation]
            if not build.cancelled():
                build.exception()  # is not "never retrieved", though every caller may have left

        build = self._builds.get((key, generation))
        if build is None:
            build = self._builds[key, generation] = asyncio.ensure_future(self._build(collection, key, generation))
            build.add_done_callback(ended)
        return build

    async def _build(self, collection: Collection, key: _Key, generation: int) -> _Kept:
        async with self._turn:
            name = collection.name
            if not collection.manifest.stores_text:
                return _Kept(generation, None, name, "a collection that stores its texts; rank this one by passage_ids")
            index, passages = WordIndex(), collection.scan_texts()
            fits = True
            while fits and (page := await self._call(_page, passages)):
                fits = await stepped(index.add, page, self._max_bytes - _KEPT_BYTES)
                fits = fits and len(index.passage_ids) <= MAX_PASSAGES
            if fits:
                await stepped(index.finish)
                kept = _Kept(generation, index)
            else:
                expected = f"at most {MAX_PASSAGES:,} passages, whose index fits --search-cache-bytes "
                expected += f"({self._max_bytes:,}); rank a larger collection by passage_ids"
                kept = _Kept(generation, None, name, expected)
            self._kept.put(key, kept)
            return kept

    async def _call(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


def _page(passages: Iterator[tuple[str, str | None]]) -> list[tuple[str, str]]:
    try:
        return [(passage_id, text or "") for passage_id, text in islice(passages, _PAGE_PASSAGES)]
    except CacheError as exc:
        raise _unreadable(exc) from exc


def _unreadable(exc: CacheError) -> Unavailable:
    return Unavailable(f"the store could not be read: {exc}")


def _count(step: Step, text: str) -> Counter[str]:
    """The words of a text, less the stop words, and how often each is in it."""
    counts = Counter[str]()
    words = (match[0] for match in _WORD.finditer(text.lower()))
    while some := list(islice(words, _WORDS_A_STEP)):
        counts.update(some)
        step()
    for word in _STOP_WORDS:
        counts.pop(word, None)
    return counts
