"""Shares one model thread between calls: on-demand texts first, uploads with what is left, neither starved.

Texts of several calls share a forward pass. What a cancelled call still had waiting is dropped before the next pass.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from encoder_worker.passage_encoder import BatchLimits, Encoded, EncodingFailed, PassageEncoder, States, Tokenized

OnPass = Callable[[int, int, float], None]  # after each forward pass: tokens of its texts and of padding, seconds
_MAX_PLANNED = 4096  # sequences that are planned together: enough to find like lengths
_BULK_EVERY = 4  # while on-demand texts keep coming, every so-many-th batch is an upload's
_MAX_UNREAD = 2  # passes that a stream may leave unread before the model computes no more for it


@dataclass(eq=False, slots=True)
class _Sequence:
    """One text, or one token window of a text that was split."""

    stream: "EncodeStream"
    key: Any
    text: Tokenized
    window: int  # its number
    tokens: Sequence[int]
    encoded: dict[int, States | EncodingFailed]  # windows of the text, as they come


@dataclass(eq=False, slots=True)
class EncodeStream:
    """The texts of one call, each by a key of the caller."""

    ratio: int
    queue: "_Queue"
    wake: asyncio.Event  # of the scheduler
    num_tokens: int = 0
    unread: asyncio.Queue[list[tuple[Any, Encoded]] | Exception] = field(default_factory=asyncio.Queue)

    def add(self, texts: Iterable[tuple[Any, Tokenized]]) -> None:
        for key, text in texts:
            encoded: dict[int, States | EncodingFailed] = {}
            self.queue.add(_Sequence(self, key, text, i, tokens, encoded) for i, tokens in enumerate(text.windows))
            self.num_tokens += text.num_tokens
        self.wake.set()

    async def completed(self) -> list[tuple[Any, Encoded]]:
        """The texts that one pass completed; waits for the pass."""
        texts = await self.unread.get()
        if isinstance(texts, Exception):
            raise texts
        self.wake.set()
        return texts


class EncodeScheduler:
    """`run` it as a task; open streams from any number of others, all on one event loop.

    `shuffle` makes the order of batches, for one bulk stream alone: in no order of length, so that speed tells the time
    left and the first states are a fair sample for a codec. None: the longest-waiting text first.
    """

    def __init__(
        self, encoder: PassageEncoder, model_thread: Executor, on_pass: OnPass, *, shuffle: random.Random | None = None
    ) -> None:
        self._encoder, self._model_thread, self._on_pass = encoder, model_thread, on_pass
        self._streams: set[EncodeStream] = set()
        self._on_demand, self._bulk = (_Queue(encoder.limits, shuffle) for _ in range(2))
        self._wake = asyncio.Event()

    @staticmethod
    def make_model_thread() -> ThreadPoolExecutor:
        """The one thread that computes; flushing denormal numbers is a setting of the thread."""
        flush = torch.set_flush_denormal
        return ThreadPoolExecutor(1, thread_name_prefix="encoder", initializer=flush, initargs=(True,))

    @property
    def on_demand_tokens(self) -> int:
        """In flight: queued or being computed."""
        return sum(stream.num_tokens for stream in self._streams if stream.queue is self._on_demand)

    def num_waiting(self, *, bulk: bool) -> int:
        """Token sequences that wait for a pass and whose caller is still there."""
        return len((self._bulk if bulk else self._on_demand).waiting)

    @contextmanager
    def stream(self, ratio: int, *, bulk: bool) -> Iterator[EncodeStream]:
        """Texts of one call, encoded in passes that calls share. Leaving it drops what waits."""
        stream = EncodeStream(ratio, self._bulk if bulk else self._on_demand, self._wake)
        self._streams.add(stream)
        try:
            yield stream
        finally:
            self._streams.discard(stream)
            kept = {one: None for one in stream.queue.waiting if one.stream is not stream}
            if len(kept) < len(stream.queue.waiting):
                stream.queue.waiting, stream.queue.planned = kept, []

    async def encode(self, texts: Sequence[Tokenized], ratio: int) -> list[Encoded]:
        """On demand: the states of each text, or why there are none."""
        encoded: dict[int, Encoded] = {i: text.failed for i, text in enumerate(texts) if text.failed is not None}
        with self.stream(ratio, bulk=False) as stream:
            stream.add(enumerate(texts))
            while len(encoded) < len(texts):
                encoded |= dict(await stream.completed())
        return [encoded[i] for i in range(len(texts))]

    async def run(self) -> None:
        """Computes until it is cancelled. A failure of the scheduler ends every open stream."""
        passed_over = 0  # batches since an upload waited and was not served
        try:
            while True:
                self._wake.clear()
                on_demand, bulk = self._on_demand.first(), self._bulk.first()
                bulk_now = bool(bulk) and (not on_demand or passed_over >= _BULK_EVERY - 1)
                if batch := bulk if bulk_now else on_demand:
                    passed_over = 0 if bulk_now or not bulk else passed_over + 1
                    batch[0].stream.queue.take(batch)
                    await self._compute(batch)
                else:  # nothing waits, or for readers only
                    await self._wake.wait()
        except Exception as exc:
            for stream in self._streams:
                stream.unread.put_nowait(exc)
            raise

    async def _compute(self, batch: list[_Sequence]) -> None:
        tokens = [one.tokens for one in batch]
        completed: dict[EncodeStream, list[tuple[Any, Encoded]]] = {one.stream: [] for one in batch}
        start = time.monotonic()
        try:
            encode, ratio = self._encoder.encode, batch[0].stream.ratio
            results = await asyncio.get_running_loop().run_in_executor(self._model_thread, encode, tokens, ratio)
        except Exception as exc:  # costs the calls of this batch, not the loop
            for stream in completed:
                stream.unread.put_nowait(exc)
            return
        num_tokens = sum(map(len, tokens))
        self._on_pass(num_tokens, len(tokens) * max(map(len, tokens)) - num_tokens, time.monotonic() - start)
        for one, result in zip(batch, results, strict=True):
            one.encoded[one.window] = result
            if len(one.encoded) == len(one.text.windows):
                completed[one.stream].append((one.key, one.text.join(one.encoded, one.stream.ratio)))
        for stream, texts in completed.items():
            stream.unread.put_nowait(texts)


@dataclass
class _Queue:
    """Sequences in the order of their arrival; every arrival makes a new plan, so that batches fill."""

    limits: BatchLimits
    shuffle: random.Random | None
    waiting: dict[_Sequence, None] = field(default_factory=dict)
    planned: list[list[_Sequence]] = field(default_factory=list)  # of the first of them; empty: to be made

    def add(self, sequences: Iterable[_Sequence]) -> None:
        self.waiting |= dict.fromkeys(sequences)
        self.planned = []

    def first(self) -> list[_Sequence]:
        """The next batch to compute, which stays planned."""
        if self.waiting and not self.planned:
            ratio = next(iter(self.waiting)).stream.ratio
            near = list(islice((one for one in self.waiting if one.stream.ratio == ratio), _MAX_PLANNED))
            batches = self.limits.plan([len(one.tokens) for one in near])
            if self.shuffle is None:
                batches.sort(key=min)  # the batch of the longest-waiting sequence first
            else:
                self.shuffle.shuffle(batches)
            self.planned = [[near[i] for i in batch] for batch in batches]
        ready = (one for one in self.planned if all(s.stream.unread.qsize() < _MAX_UNREAD for s in one))
        return next(ready, [])

    def take(self, batch: list[_Sequence]) -> None:
        self.planned.remove(batch)
        for one in batch:
            del self.waiting[one]
