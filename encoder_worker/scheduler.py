"""Shares one model thread between calls: on-demand texts first, uploads with what is left, neither starved.

Texts of several calls share a forward pass. What a cancelled call still had waiting is dropped before
the next pass. Runs on the event loop; does not know stores or gRPC.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from cache.states import PassageStates
from encoder_worker.passage_encoder import (
    EncodingFailed,
    PassageEncoder,
    States,
    Tokenized,
    plan_batches,
)

K = TypeVar("K")

Encoded = PassageStates | EncodingFailed

# Sequences that are planned together: enough to find like lengths.
_MAX_PLANNED = 4096
# While on-demand texts keep coming, every so-many-th batch is an upload's.
_BULK_EVERY = 4
# Passes that a stream may leave unread before the model computes no more for it.
_MAX_UNREAD = 2


class Priority(IntEnum):
    """The order of service."""

    ON_DEMAND = 0  # a caller waits for the answer
    BULK = 1


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One forward pass, for observers."""

    lengths: list[int]  # tokens of each sequence
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_padding_tokens(self) -> int:
        return len(self.lengths) * max(self.lengths) - self.num_tokens


@dataclass(eq=False, slots=True)
class _Sequence:
    """One text, or one token window of a text that was split."""

    stream: EncodeStream[Any]
    key: Any
    text: Tokenized
    window: int
    encoded: dict[int, States | EncodingFailed]  # windows of the text, as they come

    @property
    def tokens(self) -> Sequence[int]:
        return self.text.windows[self.window]


class EncodeStream(Generic[K]):
    """The texts of one call, encoded in passes that calls share. Closing it drops what waits."""

    def __init__(self, scheduler: EncodeScheduler, ratio: int, priority: Priority) -> None:
        self._scheduler = scheduler
        self._changed = asyncio.Event()
        self.ratio = ratio
        self.priority = priority
        self.num_tokens = 0
        self.closed = False
        self.error: BaseException | None = None
        self.unread: deque[list[tuple[K, Encoded]]] = deque()

    def __enter__(self) -> EncodeStream[K]:
        self._scheduler.streams.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True
        self._scheduler.streams.discard(self)

    def add(self, texts: Iterable[tuple[K, Tokenized]]) -> None:
        for key, text in texts:
            encoded: dict[int, States | EncodingFailed] = {}
            for window in range(len(text.windows)):
                self._scheduler.enqueue(_Sequence(self, key, text, window, encoded))
            self.num_tokens += text.num_tokens

    async def completed(self) -> list[tuple[K, Encoded]]:
        """The texts that one pass completed; waits for the pass."""
        while not self.unread and self.error is None:
            self._changed.clear()
            await self._changed.wait()
        if self.error is not None:
            raise self.error
        self._scheduler.wake()
        return self.unread.popleft()

    def deliver(self, texts: list[tuple[K, Encoded]], error: BaseException | None = None) -> None:
        self.unread.append(texts)
        self.error = error
        self._changed.set()


class EncodeScheduler:
    """`run` it as a task; open streams from any number of others."""

    def __init__(
        self,
        encoder: PassageEncoder,
        model_thread: Executor,
        on_pass: Callable[[ForwardPass], None] = lambda _: None,
        *,
        shuffle: random.Random | None = None,
    ) -> None:
        """
        Args:
            shuffle: the order of batches, for one bulk stream alone: in no order of length, so that speed tells the
                time left and the first states are a fair sample for a codec; None: the longest-waiting text first.
        """
        self.streams: set[EncodeStream[Any]] = set()
        self._encoder = encoder
        self._model_thread = model_thread
        self._on_pass = on_pass
        self._queues = {priority: _Queue(encoder, shuffle) for priority in Priority}
        self._wake = asyncio.Event()
        self._passed_over = 0  # batches since an upload waited and was not served

    @property
    def on_demand_tokens(self) -> int:
        """In flight: queued or being computed."""
        return sum(stream.num_tokens for stream in self.streams if stream.priority is Priority.ON_DEMAND)

    def num_waiting(self, priority: Priority) -> int:
        """Token sequences that wait for a pass and whose caller is still there."""
        return len(_open(self._queues[priority].waiting))

    def enqueue(self, sequence: _Sequence) -> None:
        self._queues[sequence.stream.priority].add(sequence)
        self._wake.set()

    def wake(self) -> None:
        self._wake.set()

    async def encode(self, texts: Sequence[Tokenized], ratio: int, priority: Priority) -> list[Encoded]:
        """The states of each text, or why there are none."""
        encoded: dict[int, Encoded] = {i: text.failed for i, text in enumerate(texts) if text.failed is not None}
        with EncodeStream[int](self, ratio, priority) as stream:
            stream.add(enumerate(texts))
            while len(encoded) < len(texts):
                encoded |= dict(await stream.completed())
        return [encoded[i] for i in range(len(texts))]

    async def run(self) -> None:
        """Computes until it is cancelled. A failure of the scheduler ends every open stream."""
        try:
            while True:
                self._wake.clear()
                if batch := self._next():
                    await self._compute(batch)
                else:
                    await self._wake.wait()
        except Exception as exc:
            for stream in self.streams:
                stream.deliver([], exc)
            raise

    async def _compute(self, batch: list[_Sequence]) -> None:
        tokens = [one.tokens for one in batch]
        completed: dict[EncodeStream[Any], list[tuple[Any, Encoded]]] = {one.stream: [] for one in batch}
        start = time.monotonic()
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._model_thread, self._encoder.encode, tokens, batch[0].stream.ratio
            )
        except Exception as exc:  # costs the calls of this batch, not the loop
            for stream in completed:
                stream.deliver([], exc)
            return
        self._on_pass(ForwardPass([len(sequence) for sequence in tokens], time.monotonic() - start))
        for one, result in zip(batch, results, strict=True):
            one.encoded[one.window] = result
            if len(one.encoded) == len(one.text.windows):
                windows = [one.encoded[i] for i in sorted(one.encoded)]
                completed[one.stream].append((one.key, one.text.join(windows, one.stream.ratio)))
        for stream, texts in completed.items():
            stream.deliver(texts)

    def _next(self) -> list[_Sequence]:
        """The next batch of the queue whose turn it is; empty when nothing waits, or for readers only."""
        on_demand, bulk = (self._queues[priority].first() for priority in Priority)
        bulk_now = bool(bulk) and (not on_demand or self._passed_over >= _BULK_EVERY - 1)
        batch = bulk if bulk_now else on_demand
        if batch:
            self._passed_over = 0 if bulk_now or not bulk else self._passed_over + 1
            self._queues[batch[0].stream.priority].take(batch)
        return batch


@dataclass
class _Queue:
    """Sequences of one priority, in the order of their arrival, and the batches planned of the first of them.

    An arrival makes a new plan, so that batches fill; a shuffled plan is used up first, so that it does not depend on
    arrivals.
    """

    encoder: PassageEncoder
    shuffle: random.Random | None
    waiting: list[_Sequence] = field(default_factory=list)
    planned: list[list[_Sequence]] = field(default_factory=list)
    stale: bool = False

    def add(self, sequence: _Sequence) -> None:
        self.waiting.append(sequence)
        self.stale = self.shuffle is None

    def first(self) -> list[_Sequence]:
        """The next batch to compute, which stays planned."""
        self.waiting = _open(self.waiting)
        self.planned = [kept for batch in self.planned if (kept := _open(batch))]
        if self.waiting and (self.stale or not self.planned):
            self._plan()
        ready = (one for one in self.planned if all(len(s.stream.unread) < _MAX_UNREAD for s in one))
        return next(ready, [])

    def take(self, batch: list[_Sequence]) -> None:
        self.planned.remove(batch)
        taken = set(map(id, batch))
        self.waiting = [one for one in self.waiting if id(one) not in taken]

    def _plan(self) -> None:
        ratio = self.waiting[0].stream.ratio
        near = [one for one in self.waiting if one.stream.ratio == ratio][:_MAX_PLANNED]
        batches = plan_batches([len(one.tokens) for one in near], self.encoder.limits)
        if self.shuffle is None:
            batches.sort(key=min)  # the batch of the longest-waiting sequence first
        else:
            self.shuffle.shuffle(batches)
        self.planned, self.stale = [[near[i] for i in batch] for batch in batches], False


def _open(sequences: list[_Sequence]) -> list[_Sequence]:
    return [one for one in sequences if not one.stream.closed]


def make_model_thread() -> ThreadPoolExecutor:
    """The one thread that computes; flushing denormal numbers is a setting of the thread."""
    return ThreadPoolExecutor(1, thread_name_prefix="encoder", initializer=torch.set_flush_denormal, initargs=(True,))
