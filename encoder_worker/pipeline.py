"""The pipeline of files and uploads, on one screen, in the order of the data.

    read -> check, compare digests, tokenize     ahead of the model (reading.py)
    -> encode                                    in passes shared with other streams (scheduler.py)
    -> store                                     in groups, each one durable write (writing.py)
    -> acknowledge                               in the order of reading

Runs on the event loop. Does not know formats, gRPC or terminals.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile

from encoder_worker.passage_encoder import EncodingFailed
from encoder_worker.reading import ReadBatch
from encoder_worker.scheduler import EncodeScheduler, EncodeStream, Priority
from encoder_worker.sources import Reason
from encoder_worker.writing import GroupLimits, Target, Upsert, WriteGroup, write_group

MAX_PENDING_WRITES = 2


@dataclass(frozen=True)
class PipelineLimits:
    """Backpressure and writes of one stream of passages.

    max_unencoded, max_unacknowledged, max_unacknowledged_bytes: the next batch is taken when fewer passages (bytes of
        their texts) wait
    write_whole_batches: write also what completes the oldest batch, so that it is acknowledged soon
    retry_seconds: pauses before trying a store again that did not answer
    """

    max_unencoded: float = math.inf
    max_unacknowledged: float = math.inf
    max_unacknowledged_bytes: float = math.inf
    group: GroupLimits = field(default_factory=GroupLimits)
    write_whole_batches: bool = False
    retry_seconds: Sequence[float] = ()
    allow_clipped: bool = False


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
    _num_unacknowledged: int = 0
    _num_bytes: int = 0
    _num_todo: int = 0  # passages to encode of the present batch
    _fractions: tuple[float | None, float | None] = (0.0, 0.0)  # of the source, around the present batch
    _group: WriteGroup = field(default_factory=WriteGroup)
    _full: deque[WriteGroup] = field(default_factory=deque)
    _complete: bool = False  # the source is read to its end
    _num_changes: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

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

        Raises:
            CacheError: the store failed; what it acknowledged before stays.
            Exception: whatever `batches` raises, after everything before it is stored.
        """
        stream = EncodeStream[Upsert](self.scheduler, self.target.compression_ratio, Priority.BULK)
        reading = asyncio.create_task(self._read(batches, stream))
        encoding = asyncio.create_task(self._encode(stream, reading))
        writing = asyncio.create_task(self._write(encoding))
        tasks = (writing, encoding, reading)
        for task in tasks:
            task.add_done_callback(lambda _: self._notify())
        try:
            ended = False
            while not ended:
                num_changes = self._num_changes
                ended = writing.done() or (encoding.done() and encoding.exception() is not None)
                finished = list(takewhile(lambda batch: batch.finished, self.unacknowledged))
                yield finished
                for batch in finished:
                    self.unacknowledged.popleft()
                    self._num_unacknowledged -= len(batch.upserts)
                    self._num_bytes -= batch.num_text_bytes
                if finished:
                    self._notify()
                while self._num_changes == num_changes and not ended:
                    self._changed.clear()
                    await self._changed.wait()
            for task in tasks:
                await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, batches: AsyncGenerator[ReadBatch, None], stream: EncodeStream[Upsert]) -> None:
        async with aclosing(batches):
            async for batch in batches:
                todo = [(one, one.tokenized) for one in batch.upserts if one.tokenized is not None]
                self._fractions = (self._fractions[1], batch.fraction)
                self._num_todo = len(todo)
                self.unacknowledged.append(batch)
                self._num_unacknowledged += len(batch.upserts)
                self._num_bytes += batch.num_text_bytes
                self.num_read += len(batch.upserts)
                self.num_unencoded += len(todo)
                stream.add(todo)
                self._notify()
                await self._until(self._has_room)
                if self.stop.is_set() or batch.stopped_by is not None:
                    return
        self._complete = True

    async def _encode(self, stream: EncodeStream[Upsert], reading: asyncio.Task[None]) -> None:
        with stream:
            while not self.stop.is_set():
                await self._until(lambda: bool(self.num_unencoded or reading.done()))
                if not self.num_unencoded:
                    return
                for upsert, states in await stream.completed():
                    self.num_encoded += not isinstance(states, EncodingFailed)
                    self.num_unencoded -= 1
                    if isinstance(states, EncodingFailed):
                        upsert.refuse(Reason(states.reason), str(states))
                    else:
                        upsert.set_states(states)
                        await self._add(upsert)
                self._notify()

    async def _add(self, upsert: Upsert) -> None:
        """Into the group; waits while more than a few groups wait for the store."""
        self._group.add(upsert)
        if self._group.is_full(self.limits.group, self.target):
            self._full.append(self._group)
            self._group = WriteGroup()
            self._notify()
            await self._until(lambda: len(self._full) <= MAX_PENDING_WRITES)

    async def _write(self, encoding: asyncio.Task[None]) -> None:
        loop, limits = asyncio.get_running_loop(), self.limits
        write = partial(
            write_group, self.target, retry_seconds=limits.retry_seconds, allow_clipped=limits.allow_clipped
        )
        while True:
            await self._until(lambda: bool(self._full or encoding.done() or self._completes_a_batch()))
            if self._full:
                group = self._full.popleft()
            else:
                group, self._group = self._group, WriteGroup()
            # A codec is not trained on the few states of an interrupted run, because its table would stay.
            complete = self._complete and not self.stop.is_set()
            if not group.upserts or (encoding.done() and not complete and self.target.num_training_states):
                return
            await loop.run_in_executor(self.store_threads, write, group)
            self._notify()

    def _completes_a_batch(self) -> bool:
        if not self.limits.write_whole_batches or not self._group.upserts:
            return False
        oldest = next((batch for batch in self.unacknowledged if not batch.finished), None)
        return oldest is not None and oldest.encoded

    def _has_room(self) -> bool:
        limits = self.limits
        return self.stop.is_set() or (
            self.num_unencoded < limits.max_unencoded
            and self._num_unacknowledged < limits.max_unacknowledged
            and self._num_bytes < limits.max_unacknowledged_bytes
        )

    def _notify(self) -> None:
        self._num_changes += 1
        self._changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()
