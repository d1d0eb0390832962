"""Bytes, seconds of a rerank and seconds of indexing of each configuration, on this machine.

A rerank is one query's read from a `faiss:` directory with warm pages, decoding included, pooling, and the decoder: no
network, no queue. The decoder's time depends on how many states it reads, not on their codec: it is measured once per
reading, the store once per stored ratio and codec, and a sample is their sum for the same query and round.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.collection import Collection, StoredPassage
from cache.manifest import Manifest
from cache.open import open_store
from cache.record import Record
from checkpoint import EncoderIdentity
from decoder_server.models.backend import Backend, Prompt
from tuning.config import SweepSettings
from tuning.progress import SILENT, StageProgress
from tuning.rerank import score_passages
from tuning.sweep.margins import Codecs, Margins
from tuning.sweep.settings import Configuration, Reading

_WRITE_BATCH = 256

_Samples = NDArray[np.float64]  # seconds, (rounds * num_queries,): the same index is the same query and round


@dataclass(frozen=True)
class StoredSize:
    """Of one stored ratio and codec. Texts are not counted: whether they are kept is another choice."""

    bytes_per_passage: float  # mean of the stored records
    bytes_per_token: float  # of passage text, states alone
    collection_bytes: int  # all records and the codec's table
    num_passages: int

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, ...]], ratio: int, codec: Codec) -> Self:
        """Of whole records, header included; `lengths`: tokens of every window of every passage."""
        states = [sum(-(-tokens // ratio) for tokens in windows) for windows in lengths]
        size = codec.code_size_bytes
        num_bytes = sum(Record.num_bytes(n, size, len(w)) for n, w in zip(states, lengths, strict=True))
        per_token = sum(states) * size / max(1, sum(map(sum, lengths)))
        return cls(num_bytes / max(1, len(states)), per_token, num_bytes + len(codec.table()), len(states))


@dataclass(frozen=True)
class Latency:
    """Seconds of one configuration on this machine: medians, but for p99."""

    p50_seconds: float  # a rerank of one query's candidates
    p99_seconds: float
    store_seconds: float  # of it, reading and decoding
    decoder_seconds: float  # of it, pooling and the decoder
    num_samples: int


@dataclass(frozen=True)
class IndexingCost:
    """One-off cost of the whole collection on this machine, in seconds; None: not measured."""

    encoder_seconds: float | None  # the same for every configuration
    codec_seconds: float | None  # encoding states to codes
    training_seconds: float  # the codec's
    store_seconds: float | None  # writing, codes included

    @property
    def seconds(self) -> float | None:
        encoder, store = self.encoder_seconds, self.store_seconds
        return encoder + self.training_seconds + store if encoder is not None and store is not None else None


class _Query(NamedTuple):
    prompt: Prompt
    passage_ids: list[str]  # its candidates that have states
    margins: Mapping[int, NDArray[np.float32]]  # by read ratio; decides which candidates a cascade keeps


class CostTimer:
    """Times the store and the decoder on a few queries, for configurations to add up."""

    def __init__(self, backend: Backend, margins: Margins, settings: SweepSettings) -> None:
        """Draws the queries from those that have candidates with states."""
        # By stored ratio and codec, seconds a passage: states to codes, and the whole write.
        self.writing: dict[tuple[int, str], tuple[float, float]] = {}
        self._backend, self._states = backend, margins.states
        self._store: dict[tuple[int, str], _Samples] = {}  # by stored ratio and codec
        self._pool: dict[tuple[int, int], _Samples] = {}  # by stored and read ratio, all candidates
        self._decoder: dict[Reading, _Samples] = {}  # all stages
        there, pairs = set(self._states.passage_ids), margins.pairs
        some = [q for q, found in pairs.candidates.items() if not there.isdisjoint(found)]
        drawn = random.Random(settings.seed).sample(some, min(len(some), settings.timed_queries))
        # Survivors of a cascade hardly depend on the codec: any unit that is read at the ratio will do.
        by_ratio = {unit.reading.ratios[0]: pairs.split(flat) for unit, flat in reversed(margins.values.items())}
        self._queries = []
        for q in sorted(drawn):
            rows, ids = zip(*((row, p) for row, p in enumerate(pairs.candidates[q]) if p in there), strict=True)
            own = {ratio: flat[q][list(rows)] for ratio, flat in by_ratio.items()}
            self._queries.append(_Query(margins.prompts[q], list(ids), own))
        self._samples = self._queries * settings.rounds

    def measure(
        self,
        configurations: Sequence[Configuration],
        codecs: Codecs,
        identity: EncoderIdentity,
        directory: Path,
        progress: StageProgress = SILENT,
    ) -> None:
        """`directory` holds a store meanwhile and is removed."""
        keys = list(dict.fromkeys(one.stored_as for one in configurations))
        num_samples = len(self._samples)
        self._decoder = {one.reading: np.zeros(num_samples) for one in configurations}
        pools = {(one.stored_ratio, ratio) for one in configurations for ratio in one.reading.ratios}
        self._pool = {key: np.zeros(num_samples) for key in sorted(pools)}
        num_parts = len(self._pool) + len(self._decoder)
        advance = progress.begin("time", num_samples * (len(keys) + num_parts), "reranks")
        query, ratio = self._queries[0], 4 * self._states.ratio
        for _ in range(2):  # the first passes pay for memory and kernels
            pairs = [(query.prompt, self._states.states(p).at_ratio(ratio)) for p in query.passage_ids]
            score_passages(self._backend, pairs)
        for sample in range(num_samples):  # everything alternates: a machine that slows down slows all of it
            self._time_model(sample)
            advance(num_parts)
        for key in keys:
            trained = codecs.get(*key)
            assert trained is not None  # or nothing would be there to time
            self._time_store(key, trained.codec, identity, directory)
            advance(num_samples)

    def latency(self, one: Configuration) -> Latency:
        """Of a configuration that was measured."""
        store, decoder = self._store[one.stored_as], self._decoder[one.reading].copy()
        # Later stages pool only the candidates that they read.
        mean_candidates = float(np.mean([len(query.passage_ids) for query in self._queries]))
        counts = one.reading.num_read(max(1, round(mean_candidates)))
        for ratio, count in zip(one.reading.ratios, counts, strict=True):
            decoder += self._pool[one.stored_ratio, ratio] * (count / counts[0])
        p50, p99 = np.percentile(store + decoder, [50, 99])
        return Latency(float(p50), float(p99), float(np.median(store)), float(np.median(decoder)), len(store))

    def _time_model(self, sample: int) -> None:
        query = self._samples[sample]
        fine = {p: self._states.states(p) for p in query.passage_ids}
        pooled = {ratio: {p: one.at_ratio(ratio) for p, one in fine.items()} for ratio in query.margins}
        for (stored_ratio, read_ratio), samples in self._pool.items():
            stored = [one.at_ratio(stored_ratio) for one in fine.values()]
            begun = time.perf_counter()
            for one in stored:
                one.at_ratio(read_ratio)
            samples[sample] = time.perf_counter() - begun
        for reading, samples in self._decoder.items():
            counts = reading.num_read(len(query.passage_ids))
            for number, (ratio, count) in enumerate(zip(reading.ratios, counts, strict=True)):
                ids = query.passage_ids
                if number:  # those that the stages before keep
                    before = Reading(reading.stages[:number])
                    ids = [ids[row] for row in before.order([query.margins[r] for r in before.ratios])[:count]]
                pairs = [(query.prompt, pooled[ratio][p]) for p in ids]
                begun = time.perf_counter()
                score_passages(self._backend, pairs)
                samples[sample] += time.perf_counter() - begun

    def _time_store(self, key: tuple[int, str], codec: Codec, identity: EncoderIdentity, directory: Path) -> None:
        """Writes every candidate of the queries to an embedded store, and reads them."""
        rmtree(directory, ignore_errors=True)  # of a run that was killed
        store = open_store(f"faiss:{directory}")
        manifest = Manifest.of(
            identity, collection="timed", compression_ratio=key[0], codec=codec.factory, codec_table=codec.table()
        )
        collection = Collection.create(store, manifest)
        ids = list(dict.fromkeys(p for query in self._queries for p in query.passage_ids))
        codec_seconds = store_seconds = 0.0  # states to codes; the whole write, durable, codes included
        for start in range(0, len(ids), _WRITE_BATCH):
            part = ids[start : start + _WRITE_BATCH]
            group = [StoredPassage(p, self._states.states(p).at_ratio(key[0])) for p in part]
            rows = np.concatenate([one.states.states for one in group])
            begun = time.perf_counter()
            codec.encode(rows)
            encoded = time.perf_counter()
            collection.put_many(group, allow_clipped=True)  # clipped or not, it is measured
            codec_seconds += encoded - begun
            store_seconds += time.perf_counter() - encoded
        self.writing[key] = codec_seconds / len(ids), store_seconds / len(ids)
        for query in self._queries:  # the first touch of a page is the disk's time
            collection.get_many(query.passage_ids)
        self._store[key] = np.zeros(len(self._samples))
        for sample, query in enumerate(self._samples):
            begun = time.perf_counter()
            collection.get_many(query.passage_ids)
            self._store[key][sample] = time.perf_counter() - begun
        store.close()
        rmtree(directory, ignore_errors=True)
