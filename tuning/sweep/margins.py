"""Margins of every candidate of every query, for each stored ratio, codec and read ratio; computed ones are kept.

States go through the real codec and back, as a collection would give them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from cache import DEFAULT_CODEC
from cache.codecs import Codec
from cache.errors import CodecError
from decoder_server.models.backend import Backend, Prompt
from encoder_worker.writing import num_training_states
from tuning import EvaluationError
from tuning.progress import SILENT, Advance, StageProgress
from tuning.rerank import Pairs, States, score_passages
from tuning.sweep.settings import Configuration
from tuning.sweep.workdir import SpilledStates, WorkDir


@dataclass(frozen=True)
class _TrainedCodec:
    """A codec for one stored ratio, and the cost of its training."""

    codec: Codec
    train_seconds: float
    num_sample: int  # states it was trained on; 0 where it needs none

    def roundtrip(self, passages: States) -> States:
        """Each passage's states as they come back from the codec. Raises CodecError for a value that it cannot hold."""
        if not passages:
            return {}
        codes = self.codec.encode(np.concatenate([one.states for one in passages.values()]))
        ends = np.cumsum([one.num_states for one in passages.values()])
        rows = zip(passages.items(), np.split(self.codec.decode(codes), ends[:-1]), strict=True)
        return {p: replace(one, states=states) for (p, one), states in rows}


@dataclass
class Codecs:
    """The codecs of a sweep, trained once each and kept; `left_out` says why one is not there."""

    states: SpilledStates
    work: WorkDir
    few_samples: str
    seed: int
    left_out: dict[tuple[int, str], str] = field(default_factory=dict)  # (stored ratio, codec) -> reason
    few: dict[str, dict[int, int]] = field(default_factory=dict)  # codec -> states it was trained on, by stored ratio
    _made: dict[tuple[int, str], _TrainedCodec] = field(default_factory=dict)

    def get(self, ratio: int, factory: str) -> _TrainedCodec | None:
        """The codec for states at `ratio`; None where it cannot be trained. Raises as `leave_out`."""
        key = (ratio, factory)
        if key not in self._made and key not in self.left_out:
            try:
                self._made[key] = self._make(ratio, factory)
            except CodecError as exc:
                self.leave_out(ratio, factory, str(exc))
        return self._made.get(key)

    def leave_out(self, ratio: int, factory: str, reason: str) -> None:
        """The sweep goes on without the codec at this ratio, or ends in EvaluationError: few_samples is `refuse`."""
        if self.few_samples == "refuse":
            raise EvaluationError(
                f"codec {factory} at stored ratio {ratio}: {reason}; leave it out, or --few-samples fallback"
            )
        self.left_out[ratio, factory] = reason
        self._made.pop((ratio, factory), None)

    def with_fallback(self, configurations: Sequence[Configuration]) -> list[Configuration]:
        """The same, the default codec in place of one that cannot be trained; each once. Raises as `get`."""
        found: dict[Configuration, None] = {}
        for one in configurations:
            usable = self.get(*one.stored_as) is not None
            found[one if usable else replace(one, codec=DEFAULT_CODEC)] = None
        return list(found)

    def notes(self) -> list[str]:
        """One sentence for each codec that was left out or may be better than measured."""
        stands_in = f", {DEFAULT_CODEC} stands in for it"
        return [
            f"{factory} at stored ratio {ratio} is left out{stands_in if factory != DEFAULT_CODEC else ''}: {reason}"
            for (ratio, factory), reason in self.left_out.items()
        ] + [
            f"{factory} was trained on few states: {', '.join(f'{n:,} at {r}' for r, n in sorted(few.items()))}. An "
            f"index run takes {num_training_states(Codec(factory, self.states.dim)):,} where it has them, and may do "
            "better"
            for factory, few in self.few.items()
        ]

    def _make(self, ratio: int, factory: str) -> _TrainedCodec:
        codec = Codec(factory, self.states.dim)
        if not codec.needs_training:
            return _TrainedCodec(codec, 0.0, 0)
        name = f"codecs/r{ratio}-{factory}"
        kept = self.work.load(name)
        if kept is not None:
            seconds, num_sample = float(kept["seconds"]), int(kept["num_sample"])
            codec = Codec.from_table(factory, self.states.dim, kept["table"].tobytes())
        else:
            sample = self.states.sample(ratio, num_training_states(codec), self.seed)
            begun = time.perf_counter()
            codec.train(sample)
            seconds, num_sample = time.perf_counter() - begun, len(sample)
            table = np.frombuffer(codec.table(), np.uint8)
            self.work.save(name, table=table, seconds=np.float64(seconds), num_sample=np.int64(num_sample))
        if num_sample < num_training_states(codec):
            self.few.setdefault(factory, {})[ratio] = num_sample
        return _TrainedCodec(codec, seconds, num_sample)


@dataclass(frozen=True)
class _Chunk:
    """Passages whose states fit into memory together, and the pairs they are in."""

    number: int
    passage_ids: list[str]
    pairs: list[tuple[str, str]]  # query_id, passage_id
    indices: NDArray[np.intp]  # flat, (len(pairs),)


class Margins:
    """Flat margins (num_pairs,) by unit; NaN where a candidate has no states or its margin is not finite."""

    def __init__(self, work: WorkDir, states: SpilledStates, pairs: Pairs, prompts: Mapping[str, Prompt]) -> None:
        """`prompts`: of each query."""
        self.pairs = pairs
        self.values: dict[Configuration, NDArray[np.float32]] = {}
        self._work = work
        self._states = states
        self._prompts = prompts
        self._chunks = []
        # Cut the same way each time, so that a resumed run scores the same batches.
        for number, ids in enumerate(states.chunk_ids(list(pairs.places))):
            places = [(p, query_id, index) for p in ids for query_id, index in pairs.places[p]]
            indices = np.array([index for *_, index in places], dtype=np.intp)
            self._chunks.append(_Chunk(number, ids, [(q, p) for p, q, _ in places], indices))

    def reference(self, backend: Backend, progress: StageProgress = SILENT) -> NDArray[np.float32]:
        """Margins of the states at their source's ratio, without a codec."""
        advance = progress.begin("reference (pairs)", self.pairs.num)
        flat = self._empty()
        for chunk in self._chunks:
            load = partial(self._load, chunk, self._states.ratio)
            names = {f"reference/{chunk.number:04}": self._states.ratio}
            (flat[chunk.indices],) = self._score(chunk, names, load, backend, advance)
        return flat

    def fill(
        self, backend: Backend, units: Sequence[Configuration], codecs: Codecs, progress: StageProgress = SILENT
    ) -> None:
        """Computes each unit, but those whose codec is left out. Raises as `Codecs.leave_out`."""
        advance = progress.begin("score (pairs)", self.pairs.num * len(units))
        for (ratio, factory), grouped in groupby(units, key=attrgetter("stored_ratio", "codec")):
            flats = {unit: self._empty() for unit in grouped}
            trained = codecs.get(ratio, factory)
            if trained is None:
                advance(self.pairs.num * len(flats))
                continue
            try:
                for chunk in self._chunks:
                    prefix, number = f"r{ratio}-{factory}", f"{chunk.number:04}"
                    names = {f"{prefix}/{unit.reading}-{number}": unit.reading.ratios[0] for unit in flats}
                    scored = self._score(chunk, names, partial(self._load, chunk, ratio, trained), backend, advance)
                    for flat, margins in zip(flats.values(), scored, strict=True):
                        flat[chunk.indices] = margins
            except CodecError as exc:
                codecs.leave_out(ratio, factory, str(exc))
                continue
            self.values |= flats

    def _score(
        self, chunk: _Chunk, names: Mapping[str, int], load: Callable[[], States], backend: Backend, advance: Advance
    ) -> Iterator[NDArray[np.float32]]:
        """Margins of a chunk, (len(pairs),), for each name and its read ratio: as kept, or scored and kept."""
        states: States | None = None  # loaded once, and not at all where every reading was scored before
        for name, ratio in names.items():
            kept = self._work.load(f"margins/{name}")
            if kept is not None and kept["margins"].shape == chunk.indices.shape:
                advance(len(chunk.pairs))
                yield kept["margins"]
                continue
            states = load() if states is None else states
            pooled = {p: one.at_ratio(ratio) for p, one in states.items()}
            margins = score_passages(backend, [(self._prompts[q], pooled[p]) for q, p in chunk.pairs], advance)
            self._work.save(f"margins/{name}", margins=margins)
            yield margins

    def _load(self, chunk: _Chunk, ratio: int, trained: _TrainedCodec | None = None) -> States:
        states = {p: self._states.states(p).at_ratio(ratio) for p in chunk.passage_ids}
        return trained.roundtrip(states) if trained is not None else states

    def _empty(self) -> NDArray[np.float32]:
        return np.full(self.pairs.num, np.nan, dtype=np.float32)
