"""A sweep on one screen: candidates, states once, margins of every unit, quality, costs.

report = tune(read_judged("examples/scifact"), "preread/models/preread-mini", SweepSettings(), work_dir="work")
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.states import text_digest
from checkpoint import Checkpoint, TokenizedPrompt
from checkpoint.compute import hardware
from decoder_server.models.fbnl.backend import FbnlBackend
from tuning import EvaluationError
from tuning.evaluate import Experiment
from tuning.judged import JudgedCollection
from tuning.progress import SILENT, StageProgress
from tuning.report import Counts
from tuning.rerank import Pairs
from tuning.sweep.costs import CostTimer, IndexingCost, Lengths, TimedQuery
from tuning.sweep.margins import Codecs, Margins
from tuning.sweep.quality import Judgements, Quality
from tuning.sweep.report import SweepReport, SweepRow
from tuning.sweep.settings import Configuration, SweepSettings, units_of
from tuning.sweep.workdir import SpilledStates, WorkDir

_WORK_VERSION = 1  # raised when the contents of a work directory mean something else
_SPILL_CHUNK_BYTES = 32 << 20  # how much a killed run encodes again at most


def tune(
    judged: JudgedCollection,
    model: Checkpoint | str | Path,
    settings: SweepSettings | None = None,
    *,
    work_dir: str | Path,
    device: str | None = None,
    dtype: str | None = None,
    progress: StageProgress = SILENT,
) -> SweepReport:
    """Measures every configuration on the candidates of every query.

    Args:
        judged: without judgements the reference's ranking replaces them; of a stored collection its texts are taken,
            or where it keeps none its states.
        work_dir: where states and margins are kept; a run that was killed goes on from there.

    Raises EvaluationError for input that cannot be tuned on, CodecError, and as `Experiment`.
    """
    sweep = _Sweep(judged, model, settings or SweepSettings(), device, dtype, progress)
    with sweep.held(Path(work_dir)):
        return sweep.report()


@dataclass
class _Sweep(Experiment):
    """Steps of a sweep, each computed on first use: states -> margins -> quality -> times -> report.

    States, codecs and margins are kept in the work directory, which is held meanwhile.
    """

    settings: SweepSettings  # resolved, once it is here

    def __post_init__(self) -> None:
        super().__post_init__()
        # Its states are the source; None: passages are encoded.
        self.from_states = self.judged.stored if not self.judged.passages else None
        ratio = self.from_states.manifest.compression_ratio if self.from_states is not None else 1
        self.settings = self.settings.resolved(ratio, self.checkpoint.dim)
        self.first_stage_name, self.first = self.first_stage
        self.pairs = Pairs({q: [p for p, _ in found] for q, found in self.first.items()})
        if not self.pairs.num:
            raise EvaluationError("no query has any candidate; a run file with --run names some")

    @contextmanager
    def held(self, root: Path) -> Iterator[None]:
        """The work directory of these inputs, for this process alone. Raises EvaluationError where another has it."""
        self.work = WorkDir(root, self._inputs())
        with self.work.held():
            yield

    @cached_property
    def prompts(self) -> dict[str, TokenizedPrompt]:
        return {q: self.backend.prompt(self.judged.queries[q], self.settings.instruction) for q in self.first}

    def _inputs(self) -> dict[str, Any]:
        """Everything that states and margins depend on."""
        ids = sorted(self.pairs.places)
        digests: Sequence[bytes | None]
        if self.from_states is not None:
            digests = self.from_states.digests(ids)
        else:
            ids = [p for p in ids if p in self.judged.passages]
            digests = [text_digest(self.judged.passages[p]) for p in ids]
        passages = [[p, digest.hex() if digest is not None else None] for p, digest in zip(ids, digests, strict=True)]
        candidates = [[q, self.judged.queries[q], found] for q, found in self.pairs.candidates.items()]
        return {
            "version": _WORK_VERSION,
            # Another codec, forward pass or product may round otherwise.
            "packages": {name: version(name) for name in ("preread", "faiss-cpu", "torch")},
            "fingerprint": self.checkpoint.identity().fingerprint,
            "weights": self.checkpoint.weights_digest(),
            "checkpoint_settings": asdict(self.checkpoint.settings),
            "states_of": self.from_states.manifest.binding if self.from_states is not None else None,
            "dtype": self.backend.dtype_name,
            "device": self.backend.device_name,
            "split": self.settings.split,
            "instruction": self.settings.instruction,
            "seed": self.settings.seed,
            "passages": _digest(passages),
            "candidates": _digest(candidates),
        }

    @cached_property
    def states(self) -> SpilledStates:
        """Every candidate's states, on disk."""
        source = self.source(self.from_states, 1, _SPILL_CHUNK_BYTES)
        states = SpilledStates(self.work.path, source.ratio, self.checkpoint.dim)
        states.fill(source, list(self.pairs.places), self.progress)
        if not states.passage_ids:
            raise EvaluationError("no candidate has states: none of their passages has a text that can be read")
        return states

    @cached_property
    def codecs(self) -> Codecs:
        return Codecs(self.states, self.work, self.settings.few_samples, self.settings.seed)

    @cached_property
    def reference(self) -> NDArray[np.float32]:
        """Margins (num_pairs,) in float32, without a codec."""
        exact = self.backend
        if exact.dtype_name != "float32":
            exact = FbnlBackend(self.checkpoint, device=self.device, dtype="float32")
        return Margins(self.work, self.states, self.pairs, self.prompts).reference(exact, self.progress)

    @cached_property
    def configurations(self) -> list[Configuration]:
        return self.codecs.with_fallback(self.settings.grid())

    @cached_property
    def margins(self) -> Margins:
        margins = Margins(self.work, self.states, self.pairs, self.prompts)
        margins.fill(self.backend, units_of(self.configurations), self.codecs, self.progress)
        return margins

    @cached_property
    def judgements(self) -> Judgements:
        if self.judged.qrels:
            return Judgements(self.judged.qrels, False, self.settings.min_grade)
        taught = Judgements.taught_by(self.reference, self.pairs)
        if not taught.qrels:
            raise EvaluationError("the reference scored no candidate: every margin is NaN")
        return taught

    @cached_property
    def quality(self) -> tuple[Quality, Quality, dict[Configuration, Quality]]:
        """Of the first stage, of the reference, and of every configuration whose margins are there."""
        return self.judgements.measure(
            self.first, self.reference, self.margins, self.configurations, self.settings, self.progress
        )

    @cached_property
    def lengths(self) -> Lengths:
        """Of the whole collection."""
        if self.from_states is not None:
            return Lengths.of_stored(self.from_states, self.progress)
        texts = list(self.judged.passages.values())
        return Lengths.of_texts(self.encoder, texts, split=self.settings.split, progress=self.progress)

    @cached_property
    def times(self) -> CostTimer | None:
        measured = list(self.quality[2])
        if not self.settings.timed_queries or not measured:
            return None
        timer = CostTimer(self.backend, self.states, self._timed_queries(), self.settings.rounds)
        timer.measure(measured, self.codecs, self.checkpoint.identity(), self.work.path / "store", self.progress)
        return timer

    def _timed_queries(self) -> list[TimedQuery]:
        """Queries drawn from those that have candidates with states."""
        there = set(self.states.passage_ids)
        some = [q for q, found in self.pairs.candidates.items() if not there.isdisjoint(found)]
        drawn = random.Random(self.settings.seed).sample(some, min(len(some), self.settings.timed_queries))
        # Survivors of a cascade hardly depend on the codec: any unit that is read at the ratio will do.
        by_ratio = {
            unit.reading.ratios[0]: self.pairs.split(flat) for unit, flat in reversed(self.margins.values.items())
        }
        queries = []
        for q in sorted(drawn):
            rows = [row for row, p in enumerate(self.pairs.candidates[q]) if p in there]
            margins = {ratio: own[q][rows] for ratio, own in by_ratio.items()}
            queries.append(TimedQuery(self.prompts[q], [self.pairs.candidates[q][row] for row in rows], margins))
        return queries

    def _rows(self) -> list[SweepRow]:
        """Quality and cost; indexing is extrapolated from the passages that were encoded and written here."""
        lengths, times, encoder_seconds = self.lengths, self.times, None
        if self.from_states is None and self.states.num_tokens:
            encoder_seconds = self.states.seconds / self.states.num_tokens * lengths.num_tokens
        rows = []
        for one, quality in self.quality[2].items():
            trained = self.codecs.get(*one.stored_as)
            assert trained is not None  # or it would not have been measured
            latency = codec_seconds = store_seconds = None
            if times is not None:
                latency = times.latency(one)
                codec_seconds, store_seconds = (each * lengths.num_passages for each in times.writing[one.stored_as])
            size = lengths.size(one.stored_ratio, trained.codec)
            cost = IndexingCost(encoder_seconds, codec_seconds, trained.train_seconds, store_seconds)
            rows.append(SweepRow(one, quality, size, latency, cost))
        return rows

    def _notes(self) -> list[str]:
        """One sentence for each thing a reader of the numbers should know."""
        places, there = self.pairs.places, set(self.states.passage_ids)
        absent = places.keys() - there
        # A passage with a text and without states is one that the encoder could not give finite states of.
        failed = {p for p in absent if not self.encoder.is_empty(self.judged.passages.get(p, ""))}
        nan = sum(int(np.isnan(flat).sum()) for flat in self.margins.values.values())
        without_states = sum(len(places[p]) for p in absent) * len(self.margins.values)
        counts = Counts.of(
            self.judged,
            self.first,
            self.judgements.min_grade,
            num_missing_passages=max(0, len(absent) - len(failed) - self.states.num_not_finite),
            num_truncated_passages=len(self.states.truncated & places.keys()),
            num_unscored_pairs=nan - without_states,
        )
        notes = counts.notes(taught=self.judgements.taught)
        for number, fate in (
            (self.states.num_not_finite, "have states that are NaN or infinite"),
            (len(failed), "gave no states (NaN, infinite, or out of memory)"),
        ):
            notes += [f"{number:,} candidate passages {fate}: ranked last"] if number else []
        if self.from_states is not None:
            manifest = self.from_states.manifest
            notes.append(
                f"{manifest.collection} keeps no texts: the reference is its stored states (ratio "
                f"{manifest.compression_ratio}, {manifest.codec}), and codecs are laid over theirs"
            )
        return notes + self.codecs.notes()

    def report(self) -> SweepReport:
        first_quality, reference_quality, _ = self.quality
        return SweepReport(
            **self.identity(),
            hardware=hardware(),
            settings=self.settings,
            reference_ratio=self.states.ratio,
            taught=self.judgements.taught,
            first_stage_name=self.first_stage_name,
            num_queries=len(self.judged.queries),
            num_passages=self.lengths.num_passages,
            num_candidates=self.pairs.num,
            mean_tokens=self.lengths.num_tokens / max(1, self.lengths.num_passages),
            rows=self._rows(),
            notes=self._notes(),
            first_stage=first_quality,
            reference=reference_quality,
            query_ids=list(self.judgements.qrels),
            qrels=self.judgements.qrels,
            queries=self.judged.queries,
            passages={p: text for p, text in self.judged.passages.items() if p in self.pairs.places},
        )


def _digest(value: list[Any]) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()
