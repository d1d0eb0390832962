"""Bytes of a collection at each stored ratio and codec, from how many tokens its passages have. Knows no model.

How long reading the store and the decoder take on this machine, query by query, and what a rerank adds up to.

A rerank of one query is the store's read (a `faiss:` directory, its pages warm, decoding included), pooling to the
ratio read at, and the decoder: no network, no queue, no other request. The decoder's time hangs on how many states it
reads and not on their codec, so it is measured once per reading, the store once per stored ratio and codec, and a
configuration's sample is the sum for the same query and round. Does not know quality.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree

import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.collection import Collection, StoredPassage
from cache.manifest import Manifest
from cache.open import open_store
from cache.record import Record, record_bytes
from checkpoint import EncoderIdentity
from decoder_server.models.backend import Backend, Prompt
from encoder_worker.passage_encoder import PassageEncoder
from preread.types import Stage
from tuning.progress import SILENT, Progress
from tuning.rerank import score_passages
from tuning.sweep.margins import Codecs, TrainedCodec
from tuning.sweep.quality import compose, num_read
from tuning.sweep.settings import Configuration
from tuning.sweep.workdir import SpilledStates

COUNT_STAGE = "count (passages)"
_BATCH = 1024


@dataclass(frozen=True)
class Lengths:
    """Tokens of every window of every passage of the collection."""

    windows: list[tuple[int, ...]]

    @property
    def num_passages(self) -> int:
        return len(self.windows)

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.windows))

    def num_states(self, ratio: int) -> int:
        return sum(-(-tokens // ratio) for windows in self.windows for tokens in windows)


@dataclass(frozen=True)
class StoredSize:
    """Of one stored ratio and codec. Texts are not counted: whether they are kept is another choice."""

    bytes_per_passage: float  # mean of the stored records
    bytes_per_token: float  # of passage text, states alone
    collection_bytes: int  # all records and the codec's table
    num_passages: int


def size_of(lengths: Lengths, ratio: int, codec: Codec) -> StoredSize:
    """What the collection's records take, header and window lengths included."""
    num_bytes = sum(
        record_bytes(sum(-(-tokens // ratio) for tokens in windows), codec.code_size_bytes, len(windows))
        for windows in lengths.windows
    )
    return StoredSize(
        num_bytes / max(1, lengths.num_passages),
        lengths.num_states(ratio) * codec.code_size_bytes / max(1, lengths.num_tokens),
        num_bytes + len(codec.table()),
        lengths.num_passages,
    )


def of_texts(
    encoder: PassageEncoder, texts: Sequence[str], *, split: bool = False, progress: Progress = SILENT
) -> Lengths:
    """By tokenizing them; nothing is encoded. Empty texts are not stored."""
    progress.begin(COUNT_STAGE, len(texts))
    windows: list[tuple[int, ...]] = []
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        windows += [one.window_tokens for one in encoder.tokenize(part, split=split) if one.failed is None]
        progress.advance(COUNT_STAGE, len(part))
    return Lengths(windows)


def of_stored(collection: Collection, progress: Progress = SILENT) -> Lengths:
    """From what is stored; states are not decoded."""
    progress.begin(COUNT_STAGE, collection.stats().num_passages)
    windows = []
    for _, record in collection.store.scan(collection.name):
        if isinstance(record, Record):
            windows.append(record.window_tokens)
        progress.advance(COUNT_STAGE, 1)
    return Lengths(windows)


TIME_STAGE = "time (reranks)"
_WRITE_PASSAGES = 256

Stages = tuple[Stage, ...]
Samples = NDArray[np.float64]  # seconds, (rounds * num_queries,): the same place is the same query and round


@dataclass(frozen=True)
class TimedQuery:
    """A query to time: its prompt, its candidates that have states, and their margins at each ratio it is read at."""

    prompt: Prompt
    passage_ids: list[str]
    margins: Mapping[int, NDArray[np.float32]]  # by read ratio; decides who goes on in a cascade


@dataclass(frozen=True)
class Latency:
    """Seconds of one configuration on this machine: medians, but for p99."""

    p50_seconds: float  # a rerank of one query's candidates
    p99_seconds: float
    store_seconds: float  # of it, reading and decoding
    decoder_seconds: float  # of it, pooling and the decoder
    num_samples: int


@dataclass(frozen=True)
class Writing:
    """What storing takes beside the encoder, per passage."""

    codec_seconds: float  # states to codes
    store_seconds: float  # the whole write, durable, codes included


@dataclass
class MeasuredTimes:
    """What was measured; `of` adds it up."""

    num_candidates: float  # mean over the timed queries
    store: dict[tuple[int, str], Samples] = field(default_factory=dict)  # by stored ratio and codec
    writing: dict[tuple[int, str], Writing] = field(default_factory=dict)
    pool: dict[tuple[int, int], Samples] = field(default_factory=dict)  # by stored and read ratio, all candidates
    decoder: dict[Stages, Samples] = field(default_factory=dict)  # all stages

    def of(self, one: Configuration) -> Latency | None:
        key = (one.stored_ratio, one.codec)
        if key not in self.store or one.stages not in self.decoder:
            return None
        # Later stages pool only those that came that far.
        counts = num_read(one.stages, max(1, round(self.num_candidates)))
        decoder = self.decoder[one.stages].copy()
        for stage, count in zip(one.stages, counts, strict=True):
            decoder += self.pool[one.stored_ratio, stage.compression_ratio] * (count / counts[0])
        whole = self.store[key] + decoder
        p50, p99 = np.percentile(whole, [50, 99])
        return Latency(float(p50), float(p99), float(np.median(self.store[key])), float(np.median(decoder)), len(whole))


def measure_times(
    backend: Backend,
    identity: EncoderIdentity,
    states: SpilledStates,
    codecs: Codecs,
    queries: Sequence[TimedQuery],
    configurations: Sequence[Configuration],
    rounds: int,
    directory: Path,
    progress: Progress = SILENT,
) -> MeasuredTimes:
    """Times everything that `configurations` need; `directory` holds a store meanwhile and is removed."""
    timings = MeasuredTimes(float(np.mean([len(query.passage_ids) for query in queries])))
    keys = list(dict.fromkeys((one.stored_ratio, one.codec) for one in configurations))
    readings = list(dict.fromkeys(one.stages for one in configurations))
    pools = sorted({(one.stored_ratio, stage.compression_ratio) for one in configurations for stage in one.stages})
    num_samples = rounds * len(queries)
    progress.begin(TIME_STAGE, num_samples * (len(keys) + len(readings) + len(pools)))
    _warm_up(backend, states, queries[0])

    timings.decoder = {stages: np.zeros(num_samples) for stages in readings}
    timings.pool = {key: np.zeros(num_samples) for key in pools}
    for sample in range(num_samples):  # everything takes turns: a machine that slows down slows all of it
        query = queries[sample % len(queries)]
        fine = {p: states.states(p) for p in query.passage_ids}
        stored = {ratio: {p: one.at_ratio(ratio) for p, one in fine.items()} for ratio in {ratio for ratio, _ in pools}}
        for from_ratio, to_ratio in pools:
            begun = time.perf_counter()
            for one in stored[from_ratio].values():
                one.at_ratio(to_ratio)
            timings.pool[from_ratio, to_ratio][sample] = time.perf_counter() - begun
        progress.advance(TIME_STAGE, len(pools))
        pooled = {ratio: {p: one.at_ratio(ratio) for p, one in fine.items()} for ratio in query.margins}
        for stages in readings:
            for number, stage in enumerate(stages):
                pairs = [(query.prompt, pooled[stage.compression_ratio][p]) for p in _read(query, stages, number)]
                begun = time.perf_counter()
                score_passages(backend, pairs)
                timings.decoder[stages][sample] += time.perf_counter() - begun
        progress.advance(TIME_STAGE, len(readings))

    for ratio, factory in keys:
        trained = codecs.get(ratio, factory)
        if trained is not None:
            store = _Reads(directory, identity, ratio, trained)
            timings.writing[ratio, factory] = store.write(states, queries)
            timings.store[ratio, factory] = store.read(queries, rounds)
            store.drop()
        progress.advance(TIME_STAGE, num_samples)
    return timings


def _read(query: TimedQuery, stages: Stages, number: int) -> list[str]:
    """The candidates that stage `number` reads."""
    count = num_read(stages, len(query.passage_ids))[number]
    if number == 0:
        return query.passage_ids
    rows = compose(stages[:number], [query.margins[stage.compression_ratio] for stage in stages[:number]])
    return [query.passage_ids[row] for row in rows[:count].tolist()]


def _warm_up(backend: Backend, states: SpilledStates, query: TimedQuery) -> None:
    for _ in range(2):
        score_passages(
            backend, [(query.prompt, states.states(p).at_ratio(4 * states.ratio)) for p in query.passage_ids]
        )


class _Reads:
    """One stored ratio and codec in an embedded store, for as long as it is timed."""

    def __init__(self, directory: Path, identity: EncoderIdentity, ratio: int, trained: TrainedCodec) -> None:
        self._directory = directory
        self._ratio = ratio
        self._trained = trained
        rmtree(directory, ignore_errors=True)  # of a run that was killed
        self._store = open_store(f"faiss:{directory}")
        manifest = Manifest.of(
            identity,
            collection="timed",
            compression_ratio=ratio,
            codec=trained.codec.factory,
            codec_table=trained.codec.table(),
        )
        self._collection = Collection.create(self._store, manifest)

    def write(self, states: SpilledStates, queries: Sequence[TimedQuery]) -> Writing:
        """Stores every candidate of the queries."""
        ids = list(dict.fromkeys(p for query in queries for p in query.passage_ids))
        codec_seconds = store_seconds = 0.0
        for start in range(0, len(ids), _WRITE_PASSAGES):
            group = [
                StoredPassage(p, states.states(p).at_ratio(self._ratio)) for p in ids[start : start + _WRITE_PASSAGES]
            ]
            rows = np.concatenate([one.states.states for one in group])
            begun = time.perf_counter()
            self._trained.codec.encode(rows)
            codec_seconds += time.perf_counter() - begun
            begun = time.perf_counter()
            self._collection.put_many(group, allow_clipped=True)  # measured all the same
            store_seconds += time.perf_counter() - begun
        return Writing(codec_seconds / len(ids), store_seconds / len(ids))

    def read(self, queries: Sequence[TimedQuery], rounds: int) -> Samples:
        samples = np.zeros(rounds * len(queries))
        for query in queries:  # the first touch of a page is the disk's time
            self._collection.get_many(query.passage_ids)
        for sample in range(len(samples)):
            begun = time.perf_counter()
            self._collection.get_many(queries[sample % len(queries)].passage_ids)
            samples[sample] = time.perf_counter() - begun
        return samples

    def drop(self) -> None:
        self._store.close()
        rmtree(self._directory, ignore_errors=True)
