"""Fetches what a model reads of a request's candidates: stored states, else states encoded on demand; or texts.

Read in chunks, each handed on as it arrives and the next read when the scheduler has room for it.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TypeVar

from cache.collection import Collection
from cache.errors import CacheError, StoreUnavailable
from cache.record import Damaged
from cache.states import AnyStates, EncodedPassage, PassageStates, all_at_ratio, text_digest
from decoder_server.engine.lifecycle import RequestTrace
from decoder_server.engine.on_demand import Keep, OnDemandStates
from decoder_server.models.backend import Backend, Pair, Passage, Prompt
from preread.values import Candidate, OnMiss, Result, Status

K = TypeVar("K")
T = TypeVar("T")
_Stored = AnyStates | str | Damaged | CacheError | None

log = logging.getLogger(__name__)

SCORING_FAILED = "the model failed on it; the server's log has the cause"
NOT_FINITE = "the model's logits are not finite"
UNREADABLE = "it could not be read; the server's log has the cause"

# Texts per call of the encoder worker, and calls in flight for one request.
ENCODE_CHUNK, MAX_ENCODE_CALLS = 8, 2
MIN_CHUNK = 4  # candidates per read, where many queries make many pairs of each
POOL_CHUNK = 32  # passages pooled at a time, so that the first of a stage reach the model early


@dataclass(frozen=True, slots=True)
class FetchedPassage:
    """States or text of one candidate with its pairs; or the reason why there is nothing."""

    index: int  # in the request
    passage_id: str | None
    status: Status
    passage: Passage | None = None  # states at the base ratio of the plan
    message: str = ""
    pairs: Sequence[Sequence[Pair]] = ()  # per prompt its windows, at the ratio of the present stage
    empty: bool = False  # nothing is there, because the text has no tokens
    text: str = ""  # to be encoded, if the states are to be had at all
    digest: bytes | None = None  # of that text; None: there is none
    found: tuple[str, str] | None = None  # collection and id, where states were found by the text

    @property
    def states(self) -> AnyStates | None:
        return self.passage if isinstance(self.passage, PassageStates | EncodedPassage) else None

    def num_tokens(self, num_prompt_tokens: int, query: int = 0) -> int:
        """Tokens of the passage, those of the query's prompt left out."""
        if (states := self.states) is not None:
            return states.num_tokens
        return sum(max(0, pair.num_tokens - num_prompt_tokens) for pair in self.pairs[query])

    def scored(
        self,
        margins: Sequence[float | None],  # of the query's windows
        ratio: int,
        num_prompt_tokens: int,
        activate: Callable[[float], float],
        query: int = 0,
    ) -> Result:
        """The result by its best window; with one window's margin unknown the best is unknown too."""
        pairs = self.pairs[query]
        num_states = sum(pair.num_states for pair in pairs)
        num_tokens = self.num_tokens(num_prompt_tokens, query)
        found_in, found_id = self.found or ("", "")
        known = [margin for margin in margins if margin is not None and math.isfinite(margin)]
        margin, status, message = max(known, default=None), self.status, ""
        if len(known) < len(margins):
            margin, status, message = None, "failed", SCORING_FAILED if None in margins else NOT_FINITE
        return Result(
            self.index,
            self.passage_id or "",
            status,
            score=activate(margin) if margin is not None else None,
            margin=margin,
            message=message,
            num_states=num_states,
            compression_ratio=ratio,
            truncated=any(pair.truncated for pair in pairs),
            found_in=found_in,
            found_id=found_id,
            # A ratio may be far above the passage's length: its one state stands for no more tokens than there are.
            num_passage_tokens=num_states * min(ratio, num_tokens) if ratio else num_tokens,
        )


Fetched = list[FetchedPassage]
Passages = AsyncGenerator[Fetched, None]


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """The candidates to fetch for one request, each once, and under which prompts: one for each query."""

    candidates: Sequence[Candidate]  # of the whole request
    indexes: Sequence[int]  # of those to fetch
    collection: Collection | None
    base_ratio: int
    on_miss: OnMiss | None  # None: encode, where an encoder is configured
    prompts: Sequence[Prompt]
    trace: RequestTrace
    lookup: Sequence[Collection] = ()  # where texts that are not stored under their id are looked up, in order
    keep: Keep | None = None  # where states of those that are in none are kept; None: in this process alone
    unavailable: list[StoreUnavailable] = field(default_factory=list)  # after one, the store is not waited for again

    def read(self, read: Callable[[Sequence[K]], Sequence[T]], keys: Iterable[K]) -> dict[K, T]:
        """Reads passages by id or digest, each once; CacheError at once where the store kept this request waiting."""
        if self.unavailable:
            raise self.unavailable[0]
        distinct = list(dict.fromkeys(keys))
        try:
            return dict(zip(distinct, read(distinct), strict=True))
        except StoreUnavailable as exc:
            self.unavailable.append(exc)
            raise

    def texts(self, indexes: Iterable[int]) -> dict[int, str | None]:
        """Texts of candidates as sent, else as stored; None: neither, or the store does not answer. May block on it."""
        texts = {i: self.candidates[i].text for i in indexes}
        ids = {i: name for i, text in texts.items() if not text and (name := self.candidates[i].passage_id)}
        if ids and self.collection is not None and self.collection.manifest.stores_text:
            with suppress(CacheError):
                stored = self.read(self.collection.get_texts, ids.values())
                texts |= {i: stored[name] for i, name in ids.items()}
        return texts


def mean_prompt_tokens(prompts: Sequence[Prompt]) -> int:
    """Of a pair of a request, rounded up."""
    return -(-sum(prompt.num_tokens for prompt in prompts) // len(prompts))


class Fetcher:
    """Where the passages of one model come from."""

    def __init__(
        self,
        backend: Backend,
        executor: Executor,  # for the store, pooling and tokenizing; never the model's thread
        on_demand: OnDemandStates | None,  # None: no encoder is configured, or the model reads text
        *,
        chunk: int,  # candidates per read: enough to make a round trip cheap, few enough to reach the model early
        max_text_bytes: int,  # of one candidate
    ) -> None:
        self.on_demand = on_demand
        self._backend = backend
        self._reads_text = backend.identity() is None
        self._executor = executor
        self._chunk = chunk
        self._max_text_bytes = max_text_bytes

    async def fetch(self, request: FetchRequest, ratio: int) -> Passages:
        """Every candidate once, in any order, with pairs at `ratio`; what is stored does not wait for encodings."""
        indexes = iter(request.indexes)
        size = max(MIN_CHUNK, self._chunk // len(request.prompts))
        to_encode: deque[Fetched] = deque()
        encoding: set[asyncio.Task[Fetched]] = set()
        try:
            chunk = list(islice(indexes, size))
            while chunk or encoding or to_encode:
                while to_encode and len(encoding) < MAX_ENCODE_CALLS:
                    encoding.add(asyncio.create_task(self._encode(request, ratio, to_encode.popleft())))
                done = {task for task in encoding if task.done()}
                if not done and chunk:
                    fetched, misses = await self._fetch(request, ratio, chunk)
                    to_encode.extend(misses[i : i + ENCODE_CHUNK] for i in range(0, len(misses), ENCODE_CHUNK))
                    chunk = list(islice(indexes, size))
                    if fetched:
                        yield fetched
                    continue
                if not done:
                    done, _ = await asyncio.wait(encoding, return_when=asyncio.FIRST_COMPLETED)
                encoding -= done
                for task in done:
                    yield task.result()
        finally:
            for task in encoding:
                task.cancel()

    async def at_ratio(self, request: FetchRequest, fetched: Fetched, ratio: int) -> Passages:
        """The same passages with pairs at another multiple of the base ratio."""
        for start in range(0, len(fetched), POOL_CHUNK):
            yield await self._call(self._with_pairs, request, ratio, fetched[start : start + POOL_CHUNK])

    async def _call(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def _fetch(self, request: FetchRequest, ratio: int, chunk: Sequence[int]) -> tuple[Fetched, Fetched]:
        """Reads one chunk; the passages that are settled without encoding, and the ones to encode."""
        start = time.monotonic()
        read = await self._call(self._read, request, ratio, chunk)
        request.trace.fetches.append((start, time.monotonic(), len(chunk)))
        if request.lookup:
            num_found = sum(one.found is not None for one in read)
            request.trace.num_found += num_found
            request.trace.num_looked_up += num_found + sum(one.digest is not None for one in read)
        if (keep := request.keep) is not None and self.on_demand is not None:
            self.on_demand.found(keep, (one.found[1] for one in read if one.found and one.found[0] in keep.names))
        fetched, misses, kept = [], [], []
        for one in read:
            if one.digest is None or request.on_miss in ("skip", "fail"):  # of the store alone
                fetched.append(one)
            elif self.on_demand is None:
                # Requested encoding that is impossible is a failure; by default it is a miss.
                status: Status = "failed" if request.on_miss == "encode" else one.status
                fetched.append(replace(one, status=status, message=f"{one.message}; no encoder worker is configured"))
            elif states := self.on_demand.kept(one.digest, request.base_ratio, request.keep):
                kept.append(replace(one, status="encoded", passage=states, message=""))
            else:
                misses.append(one)
        if kept:
            fetched += await self._call(self._with_pairs, request, ratio, kept)
        return fetched, misses

    async def _encode(self, request: FetchRequest, ratio: int, misses: Fetched) -> Fetched:
        assert self.on_demand is not None
        texts = {miss.digest: miss.text for miss in misses if miss.digest is not None}
        start = time.monotonic()
        encoded = await self.on_demand.encode(texts, request.base_ratio, request.keep)
        request.trace.encodings.append((start, time.monotonic(), len(texts)))
        fetched = []
        for miss in misses:
            result = encoded[miss.digest or b""]
            if isinstance(result, str):
                fetched.append(replace(miss, status="failed", message=result))
            else:
                fetched.append(replace(miss, status="encoded", passage=result, message=""))
        return await self._call(self._with_pairs, request, ratio, fetched)

    # Below: on the executor's threads.

    def _read(self, request: FetchRequest, ratio: int, chunk: Sequence[int]) -> Fetched:
        candidates = request.candidates
        sent = {i: self._sent(candidates[i], i) for i in chunk}
        texts = {i: text for i, text in sent.items() if not isinstance(text, FetchedPassage)}
        # A text wins over states of another text, so states are read with it; a model that reads text has it.
        wanted = [i for i, text in texts.items() if text is None or not self._reads_text]
        ids = [name for i in wanted if (name := candidates[i].passage_id)]
        stored: Mapping[str, _Stored] = {}
        if (collection := request.collection) is not None and ids:
            try:
                if not self._reads_text:
                    read = request.read(collection.get_encoded_many, ids)
                    found = {key: one for key, one in read.items() if isinstance(one, EncodedPassage)}
                    pooled = all_at_ratio(list(found.values()), request.base_ratio)
                    stored = {**read, **dict(zip(found, pooled, strict=True))}
                elif collection.manifest.stores_text:
                    stored = request.read(collection.get_texts, ids)
            except CacheError as exc:  # the store is down: that costs these candidates, not the request
                stored = dict.fromkeys(ids, exc)
        fetched = [one for one in sent.values() if isinstance(one, FetchedPassage)]
        for i, text in texts.items():
            fetched.append(self._settled(request, i, text, stored.get(candidates[i].passage_id or "")))
        return self._with_pairs(request, ratio, self._looked_up(request, fetched))

    def _looked_up(self, request: FetchRequest, fetched: Fetched) -> Fetched:
        """With stored states in place of texts that have no states yet, where a collection has that very text."""
        found: dict[bytes, tuple[str, str, EncodedPassage]] = {}
        missed = dict.fromkeys(one.digest for one in fetched if one.digest is not None)
        for collection in request.lookup if missed else ():
            with suppress(CacheError):  # a store that fails costs the states, not the texts
                read = request.read(collection.find_texts, (digest for digest in missed if digest not in found))
                found |= {digest: (collection.name, *one) for digest, one in read.items() if one is not None}
        if not found:
            return fetched
        pooled = all_at_ratio([states for *_, states in found.values()], request.base_ratio)
        passages = dict(zip(found, pooled, strict=True))

        def settled(one: FetchedPassage) -> FetchedPassage:
            if one.digest is None or one.digest not in found:
                return one
            where = found[one.digest][:2]
            return FetchedPassage(one.index, one.passage_id, "hit", passages[one.digest], found=where)

        return list(map(settled, fetched))

    def _sent(self, candidate: Candidate, index: int) -> str | FetchedPassage | None:
        """The text sent with a candidate, or why it is rejected; None: none was sent, or an empty one beside an id."""
        rejected = partial(FetchedPassage, index, candidate.passage_id)
        if candidate.problem:
            return rejected("failed", message=candidate.problem)
        if candidate.text is None:
            return None
        try:
            size = len(candidate.text.encode())
            if size > self._max_text_bytes:
                message = f"the text is {size} bytes long; expected at most {self._max_text_bytes}"
                return rejected("too_long", message=message)
            if not self._backend.is_empty(candidate.text):
                return candidate.text
        except Exception:  # costs this candidate and no other
            log.exception("candidates[%d] could not be read", index)
            return rejected("failed", message=UNREADABLE)
        return rejected("failed", message="the text is empty", empty=True) if candidate.passage_id is None else None

    def _settled(self, request: FetchRequest, index: int, text: str | None, stored: _Stored) -> FetchedPassage:
        collection, passage_id = request.collection, request.candidates[index].passage_id
        if text is not None and self._reads_text:
            return FetchedPassage(index, passage_id, "encoded", text)
        digest = text_digest(text) if text is not None else None
        status: Status = "missing"
        match stored:
            case PassageStates() | EncodedPassage():
                if digest is None or digest == stored.text_digest:
                    return FetchedPassage(index, passage_id, "hit", stored)
                message = "the stored states are of another text"
            case Damaged():
                status, message = "corrupt", f"the stored states are damaged: {stored.reason}"
            case CacheError():
                status, message = "failed", f"the store could not be read: {stored}"
            case str() if stored:
                if not self._backend.is_empty(stored):
                    return FetchedPassage(index, passage_id, "hit", stored)
                message = "the stored text is empty to this model"
                return FetchedPassage(index, passage_id, "failed", message=message, empty=True)
            case _ if self._reads_text and collection is not None and not collection.manifest.stores_text:
                message = f"collection {collection.name!r} keeps no texts, and this model reads text: send it, or "
                message += "index with --store-text"
            case _:
                message = "no text is stored" if self._reads_text else "no states are stored"
        return FetchedPassage(index, passage_id, status, message=message, text=text or "", digest=digest)

    def _with_pairs(self, request: FetchRequest, ratio: int, fetched: Fetched) -> Fetched:
        """The passages with their pairs, made in one call, or where that fails one by one: each costs itself only."""
        ready = [one for one in fetched if one.passage is not None]
        try:
            passages: Sequence[Passage | None] = [one.passage for one in ready]
            if ratio != request.base_ratio:
                passages = all_at_ratio([one.states for one in ready if one.states is not None], ratio)
            pairs = [self._backend.pairs(prompt, passages) for prompt in request.prompts]
            made = {one.index: own for one, own in zip(ready, zip(*pairs, strict=True), strict=True)}
            return [replace(one, pairs=made.get(one.index, ())) for one in fetched]
        except Exception as exc:
            if len(fetched) > 1:
                return [paired for one in fetched for paired in self._with_pairs(request, ratio, [one])]
            if isinstance(exc, ValueError):  # query and instruction leave no room: no later attempt finds any
                return [replace(fetched[0], status="too_long", passage=None, message=str(exc))]
            log.exception("candidates[%d] could not be read", fetched[0].index)
            return [replace(fetched[0], status="failed", passage=None, message=UNREADABLE)]
