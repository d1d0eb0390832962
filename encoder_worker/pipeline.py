"""Forward passes over the passages of one window. Knows neither where they came from nor where they go.

Encoded passages into the store, in groups, on a thread of its own. Knows no tokens and no model.

A group is one durable write, so it is also what an interruption may cost: what was not yet
acknowledged is encoded again by the next run.

The pipeline, on one screen, in the order of the data.

    read -> compare digests -> tokenize             one thread ahead (windows.py)
    -> batches by length -> encode and pool         here, the model's thread (forward.py)
    -> store -> acknowledge                         one thread behind (sink.py)

Knows neither formats nor terminals.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from cache.collection import StoredPassage
from cache.states import PassageStates
from encoder_worker.passage_encoder import EncodingFailed, PassageEncoder, States, plan_batches
from encoder_worker.reading import Ahead, ReadBatch, Todo
from encoder_worker.report import IndexReport, Progress, Speedometer
from encoder_worker.sources import Passage, Reason, Refused
from encoder_worker.writing import Target, put


class Forward:
    """Cuts a window's token sequences into batches, and gives a passage out when its last sequence is encoded."""

    def __init__(self, todo: Sequence[Todo], encoder: PassageEncoder, ratio: int) -> None:
        self._todo = todo
        self._encoder = encoder
        self._ratio = ratio
        # A sequence is one passage, or one token window of a passage that was split.
        self._sequences = [(i, w) for i, one in enumerate(todo) for w in range(len(one.tokenized.windows))]
        self._encoded: dict[int, dict[int, States | EncodingFailed]] = {}
        self.batches = plan_batches([len(self._tokens(s)) for s in range(len(self._sequences))], encoder.limits)
        # In no order of length, so that speed tells the time left and the first states are a fair
        # sample for a codec that trains; seeded, so that a rerun does the same.
        random.Random(0).shuffle(self.batches)

    def lengths(self, batch: Sequence[int]) -> list[int]:
        """Tokens of each sequence of a batch."""
        return [len(self._tokens(s)) for s in batch]

    def encode(self, batch: Sequence[int]) -> list[tuple[Todo, PassageStates | Refused]]:
        """One forward pass; the passages that it completed."""
        results = self._encoder.encode([self._tokens(s) for s in batch], self._ratio)
        done: list[tuple[Todo, PassageStates | Refused]] = []
        for s, states in zip(batch, results, strict=True):
            i, w = self._sequences[s]
            one, windows = self._todo[i], self._encoded.setdefault(i, {})
            windows[w] = states
            if len(windows) == len(one.tokenized.windows):
                done.append((one, self._join(one, [windows[w] for w in sorted(self._encoded.pop(i))])))
        return done

    def _tokens(self, sequence: int) -> Sequence[int]:
        i, w = self._sequences[sequence]
        return self._todo[i].tokenized.windows[w]

    def _join(self, one: Todo, windows: list[States | EncodingFailed]) -> PassageStates | Refused:
        joined = one.tokenized.join(windows, self._ratio, one.digest)
        if isinstance(joined, EncodingFailed):
            return Refused(one.passage.place, one.passage.passage_id, Reason(joined.reason), str(joined))
        return joined


MAX_PENDING_WRITES = 2
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class GroupLimits:
    """When a group is written: at whichever of these it reaches first."""

    max_passages: int = 2048
    max_bytes: int = 64 << 20
    max_seconds: float = 20.0


@dataclass
class _Group:
    passages: list[Passage] = field(default_factory=list)
    states: list[PassageStates] = field(default_factory=list)
    clipped_before: list[int] = field(default_factory=list)
    num_bytes: int = 0
    num_states: int = 0
    begun: float = field(default_factory=time.monotonic)


class Sink:
    """`add` encoded passages, `flush` to have them all stored. Counts into the report on the caller's thread."""

    def __init__(
        self, target: Target, report: IndexReport, limits: GroupLimits, *, allow_clipped: bool = False
    ) -> None:
        self._target = target
        self._report = report
        self._limits = limits
        self._allow_clipped = allow_clipped
        self._group = _Group()
        self._writes: deque[Future[_Written]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is not None:  # what was written is acknowledged, whatever else went wrong
            for write in self._writes:
                if write.done() and not write.cancelled() and write.exception() is None:
                    self._count(write)

    def add(self, passage: Passage, states: PassageStates, *, num_clipped_before: int = 0) -> None:
        """Takes one passage; blocks while more than a few groups wait for the store.

        Args:
            num_clipped_before: numbers that another codec had cut before these states were read back.

        Raises:
            CacheError: what a write that was going on raised.
        """
        group = self._group
        group.passages.append(passage)
        group.states.append(states)
        group.clipped_before.append(num_clipped_before)
        group.num_bytes += states.nbytes
        group.num_states += states.num_states
        held_back = self._target.num_training_states
        if held_back:
            if group.num_states >= held_back:
                self._write()
            return
        if (
            len(group.passages) >= self._limits.max_passages
            or group.num_bytes >= self._limits.max_bytes
            or time.monotonic() - group.begun >= self._limits.max_seconds
        ):
            self._write()

    def flush(self, *, complete: bool = True) -> None:
        """Returns when everything added is stored.

        Args:
            complete: False after an interruption; a codec is then not trained on the few states there
                are, because its table would stay, and what waited for it is given up.

        Raises:
            CodecError: too few states to train the codec on.
        """
        if not complete and self._target.num_training_states:
            self._group = _Group()
        if self._group.passages:
            self._write()
        while self._writes:
            self._count(self._writes.popleft())

    def _write(self) -> None:
        group, self._group = self._group, _Group()
        if self._target.collection is None:
            sample = (
                np.concatenate([states.states for states in group.states])
                if self._target.codec.needs_training
                else None
            )
            self._target.create(sample)
            self._report.num_training_states = 0 if sample is None else len(sample)
        self._writes.append(self._thread.submit(_put, self._target, group, self._allow_clipped))
        while len(self._writes) > MAX_PENDING_WRITES or (self._writes and self._writes[0].done()):
            self._count(self._writes.popleft())

    def _count(self, write: Future[_Written]) -> None:
        stored, refused, clipped = write.result()
        self._report.num_stored += len(stored)
        self._report.num_values += sum(states.states.size for states in stored)
        self._report.num_clipped += sum(clipped)
        self._report.num_clipped_passages += len(clipped)
        self._report.num_states += sum(states.num_states for states in stored)
        for item in refused:
            self._report.refuse(item)


_Written = tuple[list[PassageStates], list[Refused], list[int]]  # stored, refused, clipped numbers where there are any


def _put(target: Target, group: _Group, allow_clipped: bool) -> _Written:
    """Stores a group; passages the collection will not have are refused one by one."""
    assert target.collection is not None
    pairs = list(zip(group.passages, group.states, strict=True))
    passages = [
        StoredPassage(passage.passage_id, states, passage.text, num_before)
        for (passage, states), num_before in zip(pairs, group.clipped_before, strict=True)
    ]
    written = put(target.collection, passages, RETRY_SECONDS, allow_clipped=allow_clipped)
    refused = [
        Refused(
            passage.place,
            passage.passage_id,
            Reason.OUT_OF_RANGE if passage.passage_id in written.out_of_range else Reason.NOT_STORABLE,
            written.refused[passage.passage_id],
        )
        for passage, _ in pairs
        if passage.passage_id in written.refused
    ]
    stored = [states for passage, states in pairs if passage.passage_id not in written.refused]
    return stored, refused, list(written.clipped.values())


OnProgress = Callable[[Progress], None]


def run(
    windows: Iterable[ReadBatch],
    encoder: PassageEncoder,
    ratio: int,
    sink: Sink,
    report: IndexReport,
    stop: threading.Event,
    on_progress: OnProgress,
) -> None:
    """Encodes and stores every window; returns when all of it is acknowledged.

    When `stop` is set it ends after the batch in hand, and what was encoded by then is acknowledged.

    Raises:
        CacheError: the store failed; what it acknowledged before stays.
    """
    meter = Speedometer(report)
    max_passage_tokens = encoder.settings.max_passage_tokens
    with Ahead(windows, stop=stop, name="read and tokenize") as ready, sink:
        for window in ready:
            report.take(window.num_read, window.num_unchanged, window.refused)
            forward = Forward(window.todo, encoder, ratio)
            for batch in forward.batches:
                if stop.is_set():
                    break
                for todo, states in forward.encode(batch):
                    if isinstance(states, Refused):
                        report.refuse(states)
                    else:
                        report.note(todo.passage, len(states.window_tokens), states.truncated, max_passage_tokens)
                        sink.add(todo.passage, states)
                report.batch(forward.lengths(batch))
                on_progress(meter.read(window.fraction, len(window.todo)))
            report.end_window()
            meter.next_window(window.fraction)
            on_progress(meter.read(window.fraction, 0))
            report.stopped_by = window.stopped_by
        report.interrupted = stop.is_set()
        sink.flush(complete=report.complete)
