"""A sweep on one screen: candidates, states once, margins of every unit, quality, costs.

report = tune(read_judged("examples/scifact"), "preread/models/preread-mini", SweepSettings(), work_dir="work")
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cache import DEFAULT_CODEC
from cache.codecs import Codec
from cache.record import Record
from cache.states import text_digest
from checkpoint import Checkpoint
from checkpoint.compute import hardware
from decoder_server.models.backend import Prompt
from decoder_server.models.fbnl.backend import FbnlBackend
from tuning import EvaluationError
from tuning.config import SweepSettings
from tuning.estimate import Pace, estimated
from tuning.evaluate import Experiment
from tuning.judged import JudgedCollection
from tuning.metrics import Quality
from tuning.progress import SILENT, StageProgress
from tuning.report import Counts
from tuning.rerank import Pairs
from tuning.sweep.costs import CostTimer, IndexingCost, StoredSize
from tuning.sweep.margins import Codecs, Judgements, Margins
from tuning.sweep.report import SweepReport, SweepRow
from tuning.sweep.settings import Configuration, grid, resolved, units_of
from tuning.sweep.workdir import SpilledStates, WorkDir

_WORK_VERSION = 1  # raised when the contents of a work directory mean something else
_COUNT_BATCH = 1024
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
    """Measures every configuration on the candidates of every query; a killed run goes on from its `work_dir`.

    Without judgements the reference's ranking replaces them; of a stored collection its texts are taken, or where it
    keeps none its states. Raises EvaluationError for input that cannot be tuned on, CodecError, and as `Experiment`.
    """
    sweep = _Sweep(judged, model, settings or SweepSettings(), device, dtype, progress)
    sweep.work = WorkDir(Path(work_dir), sweep.inputs())
    with sweep.work.held():
        return sweep.report()


@dataclass
class _Sweep(Experiment):
    """Steps of a sweep; states, codecs and margins are kept in the work directory, which is held meanwhile."""

    settings: SweepSettings  # resolved, once it is here
    work: WorkDir = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Its states are the source; None: passages are encoded.
        self.from_states = self.judged.stored if not self.judged.passages else None
        ratio = self.from_states.manifest.compression_ratio if self.from_states is not None else 1
        self.settings = resolved(self.settings, ratio, self.checkpoint.dim)
        self.pairs = Pairs(self.first_stage[1])
        if not self.pairs.num:
            raise EvaluationError("no query has any candidate; a run file with --run names some")

    def inputs(self) -> dict[str, Any]:
        """Everything that states and margins depend on."""
        stored, texts = self.from_states, self.judged.passages
        ids = [p for p in sorted(self.pairs.places) if stored is not None or p in texts]
        digests = stored.digests(ids) if stored is not None else [text_digest(texts[p]) for p in ids]
        passages = [[p, digest.hex() if digest is not None else None] for p, digest in zip(ids, digests, strict=True)]
        candidates = [[q, self.judged.queries[q], found] for q, found in self.pairs.candidates.items()]
        return {
            "version": _WORK_VERSION,
            # Another codec, forward pass or product may round otherwise.
            "packages": {name: version(name) for name in ("preread", "faiss-cpu", "torch")},
            "fingerprint": self.checkpoint.identity.fingerprint,
            "weights": self.checkpoint.weights_digest(),
            "checkpoint_settings": asdict(self.checkpoint.settings),
            "states_of": stored.manifest.binding if stored is not None else None,
            "dtype": self.backend.dtype_name,
            "device": self.backend.device_name,
            "split": self.settings.split,
            "instruction": self.settings.instruction,
            "seed": self.settings.seed,
            "passages": hashlib.sha256(json.dumps(passages).encode()).hexdigest(),
            "candidates": hashlib.sha256(json.dumps(candidates).encode()).hexdigest(),
        }

    @cached_property
    def _spilled(self) -> SpilledStates:
        """Those of `states` that are there already."""
        ratio = self.from_states.manifest.compression_ratio if self.from_states is not None else 1
        return SpilledStates(self.work.path, ratio, self.checkpoint.dim)

    @cached_property
    def states(self) -> SpilledStates:
        """Every candidate's states, on disk."""
        states = self._spilled
        source = self.source(self.from_states, 1, _SPILL_CHUNK_BYTES)
        states.fill(source, list(self.pairs.places), self.progress)
        if not states.passage_ids:
            raise EvaluationError("no candidate has states: none of their passages has a text that can be read")
        return states

    @cached_property
    def codecs(self) -> Codecs:
        return Codecs(self.states, self.work, self.settings.few_samples, self.settings.seed)

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        """By query id, of queries with their candidates."""
        prompt, queries = self.backend.prompt, self.judged.queries
        return {q: prompt(queries[q], self.settings.instruction) for q in self.pairs.candidates}

    @cached_property
    def margins(self) -> Margins:
        return Margins(self.work, self.states, self.pairs, self.prompts)

    def plan(self) -> str:
        """What is going to be done, what an earlier run left, and about how long the rest takes."""
        settings, pairs, spilled = self.settings, self.pairs, self._spilled
        configurations = grid(settings)
        units, present = units_of(configurations), set(spilled.passage_ids)
        ratios = [spilled.ratio, *(unit.reading.ratios[0] for unit in units)]  # the reference's first
        num_kept, num_scores = self.margins.num_kept(units) if spilled.complete else 0, pairs.num * len(ratios)
        work = f"{len(pairs.candidates):,} queries with {pairs.num:,} candidates, {len(pairs.places):,} passages"
        plan = f"Measuring {len(configurations):,} configurations on {work}: {num_scores:,} scores"
        plan += f", of which {num_kept:,} are kept from an earlier run" if num_kept else ""
        pace = Pace.measure(self.source(self.from_states, 1), self.backend, self.prompts, pairs, ratios)
        if pace is None:
            return f"{plan}."
        num_timed = min(settings.timed_queries, len(pairs.candidates)) * settings.rounds
        num_read = max(1, round(pairs.num / max(1, len(pairs.candidates))))  # of a query's candidates
        readings = {one.reading for one in configurations}
        stages = [stage for one in readings for stage in zip(one.ratios, one.num_read(num_read), strict=True)]
        encode = 0.0 if spilled.complete else pace.reading(p for p in pairs.places if p not in present)
        score = sum(pace.scoring(ratio, pairs.num) for ratio in ratios) * (1 - num_kept / num_scores)
        rerank = num_timed * sum(pace.scoring(ratio, count) for ratio, count in stages)
        return f"{plan}; {estimated(encode=encode, score=score, time=rerank)}."

    def report(self) -> SweepReport:
        """The reference's margins, those of every unit, quality, costs."""
        settings, judged, (name, first) = self.settings, self.judged, self.first_stage
        self.progress.tell(self.plan)
        exact = self.backend
        if exact.dtype_name != "float32":
            exact = FbnlBackend(self.checkpoint, device=self.device, dtype="float32")
        reference = self.margins.reference(exact, self.progress)
        judgements = Judgements.of(judged.qrels, settings.min_grade, reference, self.pairs)
        # The default codec stands in for one that cannot be trained; each configuration once.
        usable = ((one, self.codecs.get(*one.stored_as) is not None) for one in grid(settings))
        configurations = list(dict.fromkeys(one if good else replace(one, codec=DEFAULT_CODEC) for one, good in usable))
        self.margins.fill(self.backend, units_of(configurations), self.codecs, self.progress)
        measured = judgements.measure(first, reference, self.margins, configurations, settings, self.progress)
        first_quality, reference_quality, quality = measured
        lengths = self._lengths()
        return SweepReport(
            **self.identity(),
            hardware=hardware(),
            settings=settings,
            reference_ratio=self.states.ratio,
            taught=judgements.taught,
            first_stage_name=name,
            num_queries=len(judged.queries),
            num_passages=len(lengths),
            num_candidates=self.pairs.num,
            mean_tokens=sum(map(sum, lengths)) / max(1, len(lengths)),
            reference_size=StoredSize.of(lengths, self.states.ratio, Codec("Flat", self.checkpoint.dim)),
            rows=self._rows(quality, lengths),
            notes=self._notes(judgements),
            first_stage=first_quality,
            reference=reference_quality,
            qrels=judgements.qrels,
            queries=judged.queries,
            passages={p: text for p, text in judged.passages.items() if p in self.pairs.places},
        )

    def _lengths(self) -> list[tuple[int, ...]]:
        """Tokens of every window of every passage, from stored records or by tokenizing texts; nothing is encoded."""
        stored, found = self.from_states, list[tuple[int, ...]]()
        texts = list(self.judged.passages.values())
        total = len(texts) if stored is None else stored.stats().num_passages
        advance = self.progress.begin("count", total, "passages")
        for start in range(0, len(texts), _COUNT_BATCH):
            part = texts[start : start + _COUNT_BATCH]
            tokenized = self.encoder.tokenize(part, split=self.settings.split)
            found += [one.window_tokens for one in tokenized if one.failed is None]
            advance(len(part))
        for _, record in stored.store.scan(stored.storage_name) if stored is not None else ():
            found += [record.window_tokens] if isinstance(record, Record) else []
            advance(1)
        return found

    def _rows(self, quality: dict[Configuration, Quality], lengths: Sequence[tuple[int, ...]]) -> list[SweepRow]:
        """Quality and cost; indexing is extrapolated from the passages that were encoded and written here."""
        times = encoder_seconds = None
        if self.settings.timed_queries and quality:
            times = CostTimer(self.backend, self.margins, self.settings)
            identity, directory = self.checkpoint.identity, self.work.path / "store"
            times.measure(list(quality), self.codecs, identity, directory, self.progress)
        if self.from_states is None and self.states.num_tokens:
            encoder_seconds = self.states.seconds / self.states.num_tokens * sum(map(sum, lengths))
        rows = []
        for one, own in quality.items():
            trained = self.codecs.get(*one.stored_as)
            assert trained is not None  # or it would not have been measured
            latency = codec_seconds = store_seconds = None
            if times is not None:
                latency = times.latency(one)
                codec_seconds, store_seconds = (each * len(lengths) for each in times.writing[one.stored_as])
            size = StoredSize.of(lengths, one.stored_ratio, trained.codec)
            cost = IndexingCost(encoder_seconds, codec_seconds, trained.train_seconds, store_seconds)
            rows.append(SweepRow(one, own, size, latency, cost))
        return rows

    def _notes(self, judgements: Judgements) -> list[str]:
        places, num_not_finite = self.pairs.places, self.states.num_not_finite
        absent = places.keys() - set(self.states.passage_ids)
        # A passage with a text and without states is one that the encoder could not give finite states of.
        failed = {p for p in absent if not self.encoder.is_empty(self.judged.passages.get(p, ""))}
        nan = sum(int(np.isnan(flat).sum()) for flat in self.margins.values.values())
        without_states = sum(len(places[p]) for p in absent) * len(self.margins.values)
        counts = Counts.of(
            self.judged,
            self.first_stage[1],
            judgements.min_grade,
            num_missing_passages=max(0, len(absent) - len(failed) - num_not_finite),
            num_truncated_passages=len(self.states.truncated & places.keys()),
            num_unscored_pairs=nan - without_states,
        )
        notes = counts.notes(taught=judgements.taught)
        for number, told in (
            (num_not_finite, "have states that are NaN or infinite"),
            (len(failed), "gave no states (NaN, infinite, or out of memory)"),
        ):
            notes += [f"{number:,} candidate passages {told}: ranked last"] if number else []
        if self.from_states is not None:
            manifest = self.from_states.manifest
            notes.append(
                f"{manifest.collection} keeps no texts: the reference is its stored states (ratio "
                f"{manifest.compression_ratio}, {manifest.codec}), and codecs are laid over theirs"
            )
        return notes + self.codecs.notes()
