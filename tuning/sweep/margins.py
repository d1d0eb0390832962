"""Margins of every candidate for each stored ratio, codec and read ratio, kept once computed; how good the orders are.

States go through the real codec and back, as a collection would give them. The reference is r = 1, without a codec, in
float32; its ranking replaces judgements where there are none.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cache import DEFAULT_CODEC
from cache.codecs import Codec
from cache.errors import CodecError
from decoder_server.models.backend import Backend, Prompt
from encoder_worker.writing import num_training_states
from preread.values import Stage
from tuning import EvaluationError
from tuning.config import SweepSettings
from tuning.metrics import HEADLINE, Bootstrap, PerQuery, Quality, kendall_tau, per_query
from tuning.progress import SILENT, Advance, StageProgress
from tuning.rerank import Pairs, States, score_passages
from tuning.sweep.settings import Configuration, Reading
from tuning.sweep.workdir import SpilledStates, WorkDir
from tuning.trec import Qrels, Run, order

TAU, AUC = "Kendall tau", "ROC-AUC"
_NUM_TAUGHT = 10  # of the reference's ranking, the places that count as relevant where there are no judgements


@dataclass(frozen=True)
class _TrainedCodec:
    codec: Codec  # for one stored ratio
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
            told = f"codec {factory} at stored ratio {ratio}: {reason}"
            raise EvaluationError(f"{told}; leave it out, or --few-samples fallback")
        self.left_out[ratio, factory] = reason
        self._made.pop((ratio, factory), None)

    def notes(self) -> list[str]:
        """One sentence for each codec that was left out or may be better than measured."""
        notes = []
        for (ratio, factory), reason in self.left_out.items():
            stands_in = f", {DEFAULT_CODEC} stands in for it" if factory != DEFAULT_CODEC else ""
            notes.append(f"{factory} at stored ratio {ratio} is left out{stands_in}: {reason}")
        for factory, few in self.few.items():
            counts = ", ".join(f"{n:,} at {r}" for r, n in sorted(few.items()))
            full = num_training_states(Codec(factory, self.states.dim))
            notes.append(
                f"{factory} was trained on few states: {counts}. An index run takes {full:,} where it has them, and "
                "may do better"
            )
        return notes

    def _make(self, ratio: int, factory: str) -> _TrainedCodec:
        codec = Codec(factory, self.states.dim)
        if not codec.needs_training:
            return _TrainedCodec(codec, 0.0, 0)
        name = f"codecs/r{ratio}-{factory}"
        if (kept := self.work.load(name)) is not None:
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


def _prefix(unit: Configuration) -> str:
    """Of the names of its margins in the work directory."""
    return f"r{unit.stored_ratio}-{unit.codec}/{unit.reading}-"


class Margins:
    """Flat margins (num_pairs,) by unit; NaN where a candidate has no states or its margin is not finite."""

    def __init__(self, work: WorkDir, states: SpilledStates, pairs: Pairs, prompts: Mapping[str, Prompt]) -> None:
        self.pairs, self.states, self.prompts, self._work = pairs, states, prompts, work
        self.values: dict[Configuration, NDArray[np.float32]] = {}
        # Cut the same way each time, so that a resumed run scores the same batches.
        self._chunks = [pairs.rows(ids) for ids in states.chunk_ids(list(pairs.places))]

    def reference(self, backend: Backend, progress: StageProgress = SILENT) -> NDArray[np.float32]:
        ratio, name = self.states.ratio, "reference/"
        advance = progress.begin("reference", self.pairs.num, "pairs", kept=self._num_kept([name]))
        (flat,) = self._score(backend, {name: ratio}, ratio, None, advance)
        return flat

    def fill(
        self, backend: Backend, units: Sequence[Configuration], codecs: Codecs, progress: StageProgress = SILENT
    ) -> None:
        """Computes each unit, but those whose codec is left out. Raises as `Codecs.leave_out`."""
        total = self.pairs.num * len(units)
        advance = progress.begin("score", total, "pairs", kept=self._num_kept(map(_prefix, units)))
        for (ratio, factory), grouped in groupby(units, key=attrgetter("stored_as")):
            own = {_prefix(unit): unit for unit in grouped}
            if (trained := codecs.get(ratio, factory)) is None:
                advance(self.pairs.num * len(own))
                continue
            read = {name: unit.reading.ratios[0] for name, unit in own.items()}
            try:
                flats = self._score(backend, read, ratio, trained, advance)
            except CodecError as exc:
                codecs.leave_out(ratio, factory, str(exc))
                continue
            self.values |= zip(own.values(), flats, strict=True)

    def num_kept(self, units: Iterable[Configuration]) -> int:
        """Scores of the reference and of these units that an earlier run left."""
        return self._num_kept(["reference/", *map(_prefix, units)])

    def _num_kept(self, prefixes: Iterable[str]) -> int:
        sizes = [len(rows) for rows in self._chunks]
        names = ((f"margins/{prefix}{number:04}", size) for prefix in prefixes for number, size in enumerate(sizes))
        return sum(size for name, size in names if self._work.has(name))

    def _score(
        self, backend: Backend, read: Mapping[str, int], ratio: int, trained: _TrainedCodec | None, advance: Advance
    ) -> list[NDArray[np.float32]]:
        """Margins (num_pairs,) of states stored at `ratio` for each of `read`, {name: ratio}: as kept, or made now."""
        flats = [np.full(self.pairs.num, np.nan, dtype=np.float32) for _ in read]
        for number, rows in enumerate(self._chunks):
            states: States | None = None  # loaded once, and not at all where every reading was scored before
            for flat, (prefix, read_ratio) in zip(flats, read.items(), strict=True):
                name = f"margins/{prefix}{number:04}"
                kept = self._work.load(name)
                if kept is not None and kept["margins"].shape == (len(rows),):
                    margins = kept["margins"]
                else:
                    if states is None:
                        states = {p: self.states.states(p).at_ratio(ratio) for p in dict.fromkeys(p for p, *_ in rows)}
                        states = trained.roundtrip(states) if trained is not None else states
                    pooled = {p: one.at_ratio(read_ratio) for p, one in states.items()}
                    margins = score_passages(backend, [(self.prompts[q], pooled[p]) for p, q, _ in rows], advance)
                    self._work.save(name, margins=margins)
                flat[[index for *_, index in rows]] = margins
        return flats


@dataclass(frozen=True)
class Judgements:
    """Relevance grades, and the grade that counts as relevant for measures without grades."""

    qrels: Qrels
    taught: bool  # by the reference, not by people
    min_grade: int

    @classmethod
    def of(cls, qrels: Qrels, min_grade: int, reference: NDArray[np.float32], pairs: Pairs) -> Self:
        """People's; where there are none, the reference's best ten as 10 down to 1. EvaluationError: none scored."""
        if qrels:
            return cls(qrels, False, min_grade)
        taught: Qrels = {}
        for query_id, own in pairs.split(reference).items():
            found = pairs.candidates[query_id]
            best = [row for row in order(own).tolist() if np.isfinite(own[row])][:_NUM_TAUGHT]
            if best:
                taught[query_id] = {found[row]: _NUM_TAUGHT - place for place, row in enumerate(best)}
        if not taught:
            raise EvaluationError("the reference scored no candidate: every margin is NaN")
        return cls(taught, True, 1)

    def measure(
        self,
        first: Run,
        reference: NDArray[np.float32],
        margins: Margins,
        configurations: Iterable[Configuration],
        settings: SweepSettings,
        progress: StageProgress = SILENT,
    ) -> tuple[Quality, Quality, dict[Configuration, Quality]]:
        """The first stage, the reference, and every configuration whose margins are there, against the reference."""
        pairs = margins.pairs
        measured = [one for one in configurations if all(unit in margins.values for unit in one.units())]
        advance = progress.begin("measure", len(measured) + 2, "rankings")
        readings = [(Reading((Stage(1),)), [reference])]
        readings += [(one.reading, [margins.values[unit] for unit in one.units()]) for one in measured]
        runs = [first]
        for reading, flats in readings:
            split = [pairs.split(flat) for flat in flats]
            runs.append({q: reading.ranking(found, [own[q] for own in split]) for q, found in pairs.candidates.items()})
        values = []
        for run in runs:
            values.append(self._per_query(run, runs[1], settings))
            advance(1)
        boots = Bootstrap.by_measure(values, seed=settings.seed, num_resamples=settings.num_resamples)
        first_stage, finest, *others = (Quality.of(run, values[i], boots, i, 1) for i, run in enumerate(runs))
        return first_stage, finest, dict(zip(measured, others, strict=True))

    def _per_query(self, run: Run, reference: Run, settings: SweepSettings) -> PerQuery:
        # For MRR only the best passage of the reference's judgements counts.
        values = per_query(self.qrels, run, 10, _NUM_TAUGHT if self.taught else self.min_grade)
        others, k = list[tuple[float, float, float]](), settings.overlap_k
        for query_id, grades in self.qrels.items():
            best = [p for p, _ in reference[query_id]]
            place = {p: place for place, (p, _) in enumerate(run[query_id])}
            mine = np.array([place[p] for p in best], dtype=np.intp)  # 0 for the best, in the reference's order
            relevant = np.array([grades.get(p, 0) >= self.min_grade for p in best], dtype=bool)
            # Of the reference's top k, the share that is in this one's; not defined of nothing.
            overlap = float((mine[:k] < k).sum() / min(k, len(mine))) if len(mine) else float("nan")
            # Share of (relevant, other) pairs in right order, Mann and Whitney's U over its most; needs such pairs.
            num_relevant, num_pairs = int(relevant.sum()), int(relevant.sum()) * int((~relevant).sum())
            num_wrong = int(mine[relevant].sum()) - num_relevant * (num_relevant - 1) // 2  # others before each, summed
            auc = 1 - num_wrong / num_pairs if num_pairs else float("nan")
            others.append((kendall_tau(mine, np.arange(len(mine))), overlap, auc))
        named = dict(zip((TAU, settings.overlap_name, AUC), np.array(others).T, strict=True))
        return {name: values[name] for name in (HEADLINE, "MRR@10")} | named
