"""The pipeline of files and uploads, on one screen, in the order of the data.

read -> check, compare digests, tokenize     ahead of the model (reading.py)
-> encode                                    in passes shared with other streams (scheduler.py)
-> encode by the codec, store                in groups, each one durable write (writing.py)
-> acknowledge                               in the order of reading
"""

import asyncio
import threading
from asyncio import Future
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

from encoder_worker.config import PipelineLimits
from encoder_worker.passage_encoder import Encoded
from encoder_worker.reading import ReadBatch
from encoder_worker.scheduler import EncodeScheduler, EncodeStream
from encoder_worker.writing import Target, Upsert, WriteGroup, encode

_MAX_PENDING_WRITES = 2


@dataclass(eq=False)
class Pipeline:
    """One stream of passages into one collection. Made for one `run`."""

    scheduler: EncodeScheduler
    target: Target
    store_threads: Executor
    limits: PipelineLimits
    stop: threading.Event = field(default_factory=threading.Event)  # set: the pass in hand is stored, then `run` ends
    unacknowledged: deque[ReadBatch] = field(default_factory=deque)  # in the order of reading
    num_read: int = 0
    num_encoded: int = 0
    num_unencoded: int = 0
    _num_todo: int = 0  # passages to encode of the present batch
    _fractions: tuple[float | None, float | None] = (0.0, 0.0)  # of the source, around the present batch
    _group: WriteGroup = field(default_factory=WriteGroup)
    _full: deque[WriteGroup] = field(default_factory=deque)
    _complete: bool = False  # the source is read to its end
    _ended: bool = False  # nothing more is read
    _failure: BaseException | None = None  # of the source
    _tokenizing: list[ReadBatch] = field(default_factory=list)
    _reading: Future[ReadBatch | None] | None = None
    _encoding: Future[list[tuple[Upsert, Encoded]]] | None = None
    _writing: Future[None] | None = None

    @property
    def fraction(self) -> float | None:
        """Share of the source that is encoded, 0 to 1; None where its size is not known."""
        before, after = self._fractions
        if before is None or after is None or not self._num_todo:
            return after
        return after - (after - before) * self.num_unencoded / self._num_todo

    async def run(self, batches: AsyncGenerator[ReadBatch, None]) -> AsyncGenerator[list[ReadBatch], None]:
        """Yields after every change: the batches that are finished now, in order; often none.

        A batch is finished when all of it is refused, unchanged or durable. Not closed before the next is asked for.
        Raises CacheError where the store failed (what it acknowledged before stays), and whatever `batches` raises,
        after everything before it is stored.
        """
        async with aclosing(batches):
            with self.scheduler.stream(self.target.compression_ratio, bulk=True) as stream:
                try:
                    while True:
                        self._begin(batches, stream)
                        finished = list(takewhile(lambda batch: batch.finished, self.unacknowledged))
                        yield finished
                        if finished:
                            for _ in finished:
                                self.unacknowledged.popleft()
                        elif running := self._running():
                            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                            self._take(stream)
                        else:
                            break
                finally:
                    for task in (running := self._running()):
                        task.cancel()
                    await asyncio.gather(*running, return_exceptions=True)
        if self._failure is not None:
            raise self._failure

    def _running(self) -> list[Future[Any]]:
        tasks = (self._reading, self._encoding, self._writing, *(batch.tokenizing for batch in self._tokenizing))
        return [task for task in tasks if task is not None]

    def _begin(self, batches: AsyncGenerator[ReadBatch, None], stream: EncodeStream) -> None:
        """Starts every step that is at rest and has something to do."""
        limits, stopped = self.limits, self.stop.is_set()
        if (
            self._reading is None
            and not self._ended
            and not stopped
            and self.num_unencoded < limits.max_unencoded
            and sum(len(batch.upserts) for batch in self.unacknowledged) < limits.max_unacknowledged
            and sum(batch.num_text_bytes for batch in self.unacknowledged) < limits.max_unacknowledged_bytes
        ):
            self._reading = asyncio.ensure_future(anext(batches, None))
        if self._encoding is None and self.num_unencoded and len(self._full) <= _MAX_PENDING_WRITES and not stopped:
            self._encoding = asyncio.ensure_future(stream.completed())
        if self._writing is None:
            loop = asyncio.get_running_loop()
            if group := self._next_group():
                self._writing = loop.run_in_executor(self.store_threads, group.write, self.target, limits)
            elif plain := self._group.take_plain(self.target):
                self._writing = loop.run_in_executor(self.store_threads, encode, plain, self.target)

    def _take(self, stream: EncodeStream) -> None:
        """The results of the steps that are done."""
        if self._reading is not None and self._reading.done():
            reading, self._reading = self._reading, None
            self._failure = reading.exception()
            batch = None if self._failure else reading.result()
            self._complete = batch is None and self._failure is None
            self._ended = batch is None or batch.stopped_by is not None
            if batch is not None:
                self._tokenizing.append(batch)
                self.unacknowledged.append(batch)
                self.num_read += len(batch.upserts)
        for batch in [one for one in self._tokenizing if one.tokenized]:
            self._tokenizing.remove(batch)
            if batch.tokenizing is not None:
                batch.tokenizing.result()
            todo = [(one, one.tokenized) for one in batch.upserts if one.tokenized is not None]
            self._fractions = (self._fractions[1], batch.fraction)
            self._num_todo = len(todo)
            self.num_unencoded += len(todo)
            stream.add(todo)
        if self._encoding is not None and self._encoding.done():
            encoding, self._encoding = self._encoding, None
            for upsert, states in encoding.result():
                self.num_unencoded -= 1
                if upsert.take(states):
                    self.num_encoded += 1
                    self._group.add(upsert)
                    if self._group.is_full(self.limits, self.target):
                        self._full.append(self._group)
                        self._group = WriteGroup()
        if self._writing is not None and self._writing.done():
            writing, self._writing = self._writing, None
            writing.result()

    def _next_group(self) -> WriteGroup | None:
        if self._full:
            return self._full.popleft()
        if not (self._reading or self._tokenizing or self._encoding):  # nothing more can be added
            # A codec is not trained on the few states of an interrupted run, because its table would stay.
            complete = self._complete and not self.stop.is_set()
            ready = complete or not self.target.num_training_states
        else:
            unfinished = (batch for batch in self.unacknowledged if not batch.finished)
            ready = self.limits.write_whole_batches and any(batch.encoded for batch in islice(unfinished, 1))
        if not ready or not self._group.upserts:
            return None
        group, self._group = self._group, WriteGroup()
        return group
