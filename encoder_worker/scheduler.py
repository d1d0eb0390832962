"""Shares one model thread between calls: on-demand texts first, uploads with what is left, neither for ever waiting.

Batches are made from whatever waits, across calls. A call that was cancelled is dropped before its
next batch. Runs on the event loop; does not know texts, stores or gRPC.

What every call of a worker shares: the encoder, the model's thread, the store and threads to wait on it.

Does not know gRPC.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from typing import ParamSpec, TypeVar

from cache.store import Store
from encoder_worker.config import EncoderConfig
from encoder_worker.passage_encoder import EncodingFailed, PassageEncoder, States, Tokenized, plan_batches

# Sequences looked at for one batch: enough to find like lengths, few enough to sort between passes.
_LOOK_AT = 1024
# While on-demand texts keep coming, every so-many-th batch is an upload's.
_BULK_EVERY = 4


class Priority(IntEnum):
    """Who is served first."""

    ON_DEMAND = 0  # someone waits for the answer
    BULK = 1


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One forward pass, for whoever watches."""

    lengths: list[int]  # tokens of each sequence
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_padding_tokens(self) -> int:
        return len(self.lengths) * max(self.lengths) - self.num_tokens


@dataclass(eq=False, slots=True)
class _Waiting:
    tokens: Sequence[int]
    ratio: int
    done: asyncio.Future[States | EncodingFailed]


class EncodeScheduler:
    """`run` it as a task; `encode` from any number of others."""

    def __init__(
        self, encoder: PassageEncoder, model_thread: Executor, on_pass: Callable[[ForwardPass], None] = lambda _: None
    ) -> None:
        self._encoder = encoder
        self._model_thread = model_thread
        self._on_pass = on_pass
        self._queues: dict[Priority, list[_Waiting]] = {priority: [] for priority in Priority}
        self._wake = asyncio.Event()
        self._passed_over = 0  # batches since an upload waited and was not served
        self.on_demand_tokens = 0  # under way, waiting or being computed

    async def encode(
        self, texts: Sequence[Tokenized], ratio: int, priority: Priority
    ) -> list[list[States | EncodingFailed]]:
        """Per text, the states (num_states, dim) of each of its windows, or why there are none."""
        loop = asyncio.get_running_loop()
        waiting = [[_Waiting(window, ratio, loop.create_future()) for window in text.windows] for text in texts]
        flat = [one for windows in waiting for one in windows]
        num_tokens = sum(len(one.tokens) for one in flat) if priority is Priority.ON_DEMAND else 0
        self._queues[priority] += flat
        self.on_demand_tokens += num_tokens
        self._wake.set()
        try:
            if flat:
                await asyncio.wait([one.done for one in flat])
            return [[one.done.result() for one in windows] for windows in waiting]
        finally:
            self.on_demand_tokens -= num_tokens
            for one in flat:
                # Does nothing to what is done; what still waits, because the caller left, is dropped.
                if not one.done.cancel():
                    one.done.exception()  # seen, or asyncio complains of the others' after the first was raised

    async def run(self) -> None:
        """Computes for ever; cancel it to stop."""
        loop = asyncio.get_running_loop()
        while True:
            batch = self._next()
            if not batch:
                self._wake.clear()
                await self._wake.wait()
                continue
            tokens = [one.tokens for one in batch]
            start = time.monotonic()
            try:
                results = await loop.run_in_executor(self._model_thread, self._encoder.encode, tokens, batch[0].ratio)
            except Exception as exc:  # costs this batch's calls, not the loop
                for one in batch:
                    if not one.done.done():
                        one.done.set_exception(exc)
                continue
            self._on_pass(ForwardPass([len(sequence) for sequence in tokens], time.monotonic() - start))
            for one, result in zip(batch, results, strict=True):
                if not one.done.done():
                    one.done.set_result(result)

    def _next(self) -> list[_Waiting]:
        """The batch that holds the longest-waiting sequence of the queue whose turn it is."""
        for priority, queue in self._queues.items():
            self._queues[priority] = [one for one in queue if not one.done.done()]
        on_demand, bulk = self._queues[Priority.ON_DEMAND], self._queues[Priority.BULK]
        bulk_now = bool(bulk) and (not on_demand or self._passed_over >= _BULK_EVERY - 1)
        queue = bulk if bulk_now else on_demand
        if not queue:
            return []
        self._passed_over = 0 if bulk_now or not bulk else self._passed_over + 1
        near = list(islice((one for one in queue if one.ratio == queue[0].ratio), _LOOK_AT))
        batches = plan_batches([len(one.tokens) for one in near], self._encoder.limits)
        batch = [near[i] for i in next(batch for batch in batches if 0 in batch)]
        taken = set(map(id, batch))
        queue[:] = [one for one in queue if id(one) not in taken]
        return batch


P = ParamSpec("P")
T = TypeVar("T")

_TOKENIZE_TEXTS = 64


@dataclass(frozen=True)
class Worker:
    """A loaded worker."""

    config: EncoderConfig
    encoder: PassageEncoder
    scheduler: EncodeScheduler
    store: Store
    threads: Executor  # for the tokenizer
    store_threads: Executor  # for the store alone: one that hangs must not keep texts from being encoded

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs something that blocks off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, lambda: function(*args, **kwargs))

    async def call_store(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for what waits for the store."""
        return await asyncio.get_running_loop().run_in_executor(self.store_threads, lambda: function(*args, **kwargs))

    async def tokenize(self, texts: Sequence[str], *, split: bool = False) -> list[Tokenized]:
        """In pieces, so that a caller who left is noticed between them."""
        tokenized: list[Tokenized] = []
        for start in range(0, len(texts), _TOKENIZE_TEXTS):
            tokenized += await self.call(self.encoder.tokenize, texts[start : start + _TOKENIZE_TEXTS], split=split)
        return tokenized

    def why_not(self, text: str) -> str | None:
        """Why a text cannot be encoded, or None. May tokenize: off the event loop."""
        num_bytes = len(text.encode())
        if num_bytes > self.config.max_text_bytes:
            return f"text is {num_bytes:,} bytes; at most {self.config.max_text_bytes:,} are encoded"
        return "text is empty" if self.encoder.is_empty(text) else None
