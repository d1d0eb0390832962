"""States through a real codec and back, as a collection would give them. Does not know margins or queries.

Margins of every candidate of every query, for each stored ratio, codec and read ratio; what was computed is kept.

Knows the seam to the model and no model; does not know judgements, orders or cascades.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from cache import DEFAULT_CODEC
from cache.codecs import Codec
from cache.errors import CodecError
from cache.states import PassageStates
from decoder_server.models.backend import Backend
from encoder_worker.writing import num_training_states
from tuning import EvaluationError
from tuning.progress import SILENT, Progress
from tuning.rerank import score_passages
from tuning.sweep.settings import Configuration, Unit
from tuning.sweep.workdir import SpilledStates, WorkDir


@dataclass(frozen=True)
class TrainedCodec:
    """A codec for one stored ratio, and what its training took."""

    codec: Codec
    train_seconds: float
    num_sample: int  # states it was trained on; 0 where it needs none


@dataclass
class Codecs:
    """The codecs of a sweep, trained once each and kept; `left_out` says why one is not there."""

    states: SpilledStates
    work: WorkDir
    few_samples: str
    seed: int
    left_out: dict[tuple[int, str], str] = field(default_factory=dict)  # (stored ratio, codec) -> reason
    few: dict[str, dict[int, int]] = field(default_factory=dict)  # codec -> states it was trained on, by stored ratio
    _made: dict[tuple[int, str], TrainedCodec] = field(default_factory=dict)

    def get(self, ratio: int, factory: str) -> TrainedCodec | None:
        """The codec for states at `ratio`; None where it cannot be trained and may be left out.

        Raises:
            EvaluationError: it cannot be trained, and few_samples is `refuse`.
        """
        key = (ratio, factory)
        if key not in self._made and key not in self.left_out:
            try:
                self._made[key] = self._make(ratio, factory)
            except CodecError as exc:
                self.refuse(ratio, factory, str(exc))
        return self._made.get(key)

    def refuse(self, ratio: int, factory: str, reason: str) -> None:
        """This codec cannot be used at this ratio: it is left out, or the sweep ends.

        Raises:
            EvaluationError: few_samples is `refuse`.
        """
        if self.few_samples == "refuse":
            raise EvaluationError(
                f"codec {factory} at stored ratio {ratio}: {reason}; leave it out, or --few-samples fallback"
            )
        self.left_out[ratio, factory] = reason
        self._made.pop((ratio, factory), None)

    def _make(self, ratio: int, factory: str) -> TrainedCodec:
        codec = Codec(factory, self.states.dim)
        if not codec.needs_training:
            return TrainedCodec(codec, 0.0, 0)
        name = f"codecs/{file_name(ratio, factory)}"
        kept = self.work.load(name)
        if kept is not None:
            table, seconds, num_sample = kept["table"].tobytes(), float(kept["seconds"]), int(kept["num_sample"])
            codec = Codec.from_table(factory, self.states.dim, table)
        else:
            sample = self.states.sample(ratio, num_training_states(codec), self.seed)
            begun = time.perf_counter()
            codec.train(sample)
            seconds, num_sample = time.perf_counter() - begun, len(sample)
            table = codec.table()
            self.work.save(
                name, table=np.frombuffer(table, np.uint8), seconds=np.float64(seconds), num_sample=np.int64(num_sample)
            )
        if num_sample < num_training_states(codec):
            self.few.setdefault(factory, {})[ratio] = num_sample
        return TrainedCodec(codec, seconds, num_sample)


def with_fallback(configurations: Sequence[Configuration], codecs: Codecs) -> list[Configuration]:
    """The same, the default codec standing in for one that cannot be trained; each once.

    Raises:
        EvaluationError: a codec cannot be trained, and few_samples is `refuse`.
    """
    found: dict[Configuration, None] = {}
    for one in configurations:
        usable = codecs.get(one.stored_ratio, one.codec) is not None
        found[one if usable else replace(one, codec=DEFAULT_CODEC)] = None
    return list(found)


def roundtrip(codec: Codec, passages: Mapping[str, PassageStates]) -> dict[str, PassageStates]:
    """Each passage's states as they come back from the codec.

    Raises:
        CodecError: a value that it cannot hold.
    """
    if not passages:
        return {}
    decoded = codec.decode(codec.encode(np.concatenate([one.states for one in passages.values()])))
    result: dict[str, PassageStates] = {}
    end = 0
    for p, one in passages.items():
        start, end = end, end + one.num_states
        result[p] = PassageStates(
            decoded[start:end], one.window_tokens, one.compression_ratio, one.truncated, one.text_digest
        )
    return result


def file_name(ratio: int, factory: str) -> str:
    """`r4-SQ8`; a factory string may hold commas and brackets, which stay apart from one another as code points."""
    return f"r{ratio}-" + "".join(c if c.isalnum() or c in "-_" else f"~{ord(c):x}" for c in factory)


STAGE = "score (pairs)"
REFERENCE = "reference (pairs)"

States = Mapping[str, PassageStates]


class Pairs:
    """Every query with its candidates, in one flat order that margins keep."""

    def __init__(self, candidates: Mapping[str, Sequence[str]]) -> None:
        self.candidates = {q: list(found) for q, found in candidates.items()}
        self.query_ids = list(self.candidates)
        self.places: dict[str, list[tuple[str, int]]] = {}  # passage_id -> its (query_id, flat index)
        self.num = 0
        for query_id, found in self.candidates.items():
            for p in found:
                self.places.setdefault(p, []).append((query_id, self.num))
                self.num += 1

    @property
    def passage_ids(self) -> list[str]:
        """Each candidate once, in order of first appearance."""
        return list(self.places)

    def split(self, flat: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """By query, the values of its candidates."""
        ends = np.cumsum([len(found) for found in self.candidates.values()])
        return dict(zip(self.candidates, np.split(flat, ends[:-1]), strict=True))


@dataclass(frozen=True)
class _Chunk:
    """Passages whose states fit into memory together, and the pairs they are in."""

    number: int
    passage_ids: list[str]
    pairs: list[tuple[str, str]]  # query_id, passage_id
    indices: NDArray[np.intp]  # flat, (len(pairs),)


class Margins:
    """Flat margins (num_pairs,) by unit; NaN where a candidate has no states or its margin is not finite."""

    def __init__(self, work: WorkDir, states: SpilledStates, pairs: Pairs, queries: Mapping[str, str]) -> None:
        self.pairs = pairs
        self.values: dict[Unit, NDArray[np.float32]] = {}
        self.seconds: dict[Unit, float] = {}  # of pooling and the decoder, over all pairs
        self._work = work
        self._states = states
        self._queries = queries
        self._chunks = []
        # Cut the same way each time, so that a run that goes on scores the same batches.
        for number, ids in enumerate(states.chunk_ids(pairs.passage_ids)):
            places = [(p, query_id, index) for p in ids for query_id, index in pairs.places[p]]
            indices = np.array([index for *_, index in places], dtype=np.intp)
            self._chunks.append(_Chunk(number, ids, [(q, p) for p, q, _ in places], indices))

    def reference(self, backend: Backend, instruction: str | None, progress: Progress = SILENT) -> NDArray[np.float32]:
        """Of the states as they are kept: their own ratio, no codec."""
        progress.begin(REFERENCE, self.pairs.num)
        flat = self._empty()
        score = self._scorer(backend, instruction, lambda num: progress.advance(REFERENCE, num))
        for chunk in self._chunks:
            name = f"margins/reference/{chunk.number:04}"
            margins, _ = score(name, chunk, lambda: self._load(chunk, self._states.ratio))  # noqa: B023 - called here
            flat[chunk.indices] = margins
        return flat

    def fill(
        self,
        backend: Backend,
        units: Sequence[Unit],
        codecs: Codecs,
        instruction: str | None,
        progress: Progress = SILENT,
    ) -> None:
        """Computes each unit, but those whose codec is left out.

        Raises:
            EvaluationError: a codec that cannot be used and may not be left out.
        """
        progress.begin(STAGE, self.pairs.num * len(units))
        score = self._scorer(backend, instruction, lambda num: progress.advance(STAGE, num))
        for (ratio, factory), group in groupby(units, key=lambda unit: (unit.stored_ratio, unit.codec)):
            own = list(group)
            trained = codecs.get(ratio, factory)
            if trained is None:
                progress.advance(STAGE, self.pairs.num * len(own))
                continue
            flats = {unit: self._empty() for unit in own}
            seconds = dict.fromkeys(own, 0.0)
            try:
                for chunk in self._chunks:
                    stored = _Once(lambda: roundtrip(trained.codec, self._load(chunk, ratio)))  # noqa: B023 - called here
                    for unit in own:
                        name = f"margins/{file_name(ratio, factory)}/{unit.read_ratio}-{chunk.number:04}"
                        margins, took = score(
                            name,
                            chunk,
                            lambda: {p: one.at_ratio(unit.read_ratio) for p, one in stored().items()},  # noqa: B023
                        )
                        flats[unit][chunk.indices] = margins
                        seconds[unit] += took
            except CodecError as exc:
                codecs.refuse(ratio, factory, str(exc))
                continue
            self.values |= flats
            self.seconds |= seconds

    def _scorer(
        self, backend: Backend, instruction: str | None, advance: Callable[[int], None]
    ) -> Callable[[str, _Chunk, Callable[[], States]], tuple[NDArray[np.float32], float]]:
        """Scores a chunk, or finds it scored; margins (len(chunk.pairs),) and what computing them took."""
        prompts = {q: backend.prompt(self._queries[q], instruction) for q in self.pairs.query_ids}

        def score(name: str, chunk: _Chunk, load: Callable[[], States]) -> tuple[NDArray[np.float32], float]:
            kept = self._work.load(name)
            if kept is not None and kept["margins"].shape == chunk.indices.shape:
                advance(len(chunk.pairs))
                return kept["margins"], float(kept["seconds"])
            states = load()
            begun = time.perf_counter()
            margins = score_passages(backend, [(prompts[q], states[p]) for q, p in chunk.pairs], advance)
            took = time.perf_counter() - begun
            self._work.save(name, margins=margins, seconds=np.float64(took))
            return margins, took

        return score

    def _load(self, chunk: _Chunk, ratio: int) -> dict[str, PassageStates]:
        return {p: self._states.states(p).at_ratio(ratio) for p in chunk.passage_ids}

    def _empty(self) -> NDArray[np.float32]:
        return np.full(self.pairs.num, np.nan, dtype=np.float32)


class _Once:
    """A call whose answer is kept: decoding is skipped where every reading of it was already scored."""

    def __init__(self, call: Callable[[], States]) -> None:
        self._call = call
        self._answer: States | None = None

    def __call__(self) -> States:
        if self._answer is None:
            self._answer = self._call()
        return self._answer
