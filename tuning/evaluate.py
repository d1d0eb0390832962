"""Evaluation on one screen: candidates, states once, margins at each ratio, measures, intervals.

report = evaluate("examples/corpus", "preread/models/preread-mini", EvaluationSettings(ratios=(1, 4)))
report.baseline.measures["nDCG@10"].mean, report.reranked(4).measures["nDCG@10"].mean
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cache.collection import Collection
from cache.record import Record
from cache.states import text_digest
from checkpoint import Checkpoint
from decoder_server.models.fbnl.backend import FbnlBackend
from encoder_worker.passage_encoder import PassageEncoder
from tuning.baselines import first_stage, teacher_run
from tuning.config import TEACHERS, EvaluationSettings, MeasuringSettings
from tuning.estimate import Pace, estimated
from tuning.judged import JudgedCollection, read_judged
from tuning.metrics import Bootstrap, per_query
from tuning.progress import SILENT, StageProgress
from tuning.report import Counts, EvaluationReport, System
from tuning.rerank import CHUNK_BYTES, EncodedStates, Pairs, Reranked, StateSource, StoredStates, rerank
from tuning.trec import Run


@dataclass
class Experiment:
    """Judged queries with their candidates, and a checkpoint to score them, loaded on first use.

    Raises CheckpointError, CacheError: it cannot be opened, or another encoder wrote the stored collection.
    """

    judged: JudgedCollection  # with stored texts and sampled, once it is here
    model: Checkpoint | str | Path  # a checkpoint, or its directory or hub id
    settings: MeasuringSettings
    device: str | None
    dtype: str | None
    progress: StageProgress

    def __post_init__(self) -> None:
        self.checkpoint = open_checkpoint(self.model, self.judged.stored)
        stored = self.judged.stored
        if not self.judged.passages and stored is not None:  # the texts that it keeps; states are not decoded
            records = stored.store.scan(stored.storage_name)
            texts = {p: one.text for p, one in records if isinstance(one, Record) and one.text is not None}
            self.judged = replace(self.judged, passages=dict(sorted(texts.items())))
        self.judged = self.judged.sample(self.settings.max_queries, self.settings.seed)

    @cached_property
    def first_stage(self) -> tuple[str, Run]:
        """Its name, and the ranking to rerank and to beat."""
        return first_stage(self.judged, self.settings.top_k, self.progress)

    @cached_property
    def backend(self) -> FbnlBackend:
        return FbnlBackend(self.checkpoint, device=self.device, dtype=self.dtype)

    @cached_property
    def encoder(self) -> PassageEncoder:
        return PassageEncoder.load(self.checkpoint, device=self.device, dtype=self.dtype)

    def source(self, stored: Collection | None, ratio: int, chunk_bytes: int = CHUNK_BYTES) -> StateSource:
        """States of `stored`, or where that is None of the passages, encoded at `ratio`."""
        if stored is not None:
            return StoredStates(stored, chunk_bytes)
        return EncodedStates(self.encoder, self.judged.passages, ratio, self.settings.split, chunk_bytes)

    def identity(self) -> dict[str, Any]:
        """Fields of every report."""
        default = self.checkpoint.settings.default_instruction
        return {
            "collection": self.judged.name,
            "checkpoint": self.checkpoint.name,
            "fingerprint": self.checkpoint.identity.fingerprint,
            "dtype": self.backend.dtype_name,
            "device": self.backend.device_name,
            "instruction": default if self.settings.instruction is None else self.settings.instruction,
        }


def evaluate(
    judged: JudgedCollection | str | Path,
    model: Checkpoint | str | Path,
    settings: EvaluationSettings | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    progress: StageProgress = SILENT,
) -> EvaluationReport:
    """Reranks first-stage candidates with a checkpoint and measures both.

    `judged`: a collection, or a BEIR folder to read it from; stored states are read instead of encoding the passages.
    `model`: a checkpoint, or its directory or hub id. Raises EvaluationError for input that cannot be evaluated, and
    as `Experiment`.
    """
    judged = judged if isinstance(judged, JudgedCollection) else read_judged(judged)
    stored = judged.stored
    stored_ratio = stored.manifest.compression_ratio if stored is not None else 1
    settings = (settings or EvaluationSettings()).with_ratios(stored_ratio)
    one = Experiment(judged, model, settings, device, dtype, progress)
    judged, (name, first), ratios = one.judged, one.first_stage, settings.ratios or ()
    runs: list[tuple[str, int | None, Run]] = [(name, None, first)]
    source = one.source(stored, math.gcd(*ratios))
    progress.tell(lambda: _plan(one, settings, source))
    if settings.teacher is not None:
        taught = teacher_run(settings.teacher, judged, first, device=device, progress=progress)
        runs.append((TEACHERS[settings.teacher], None, taught))
    reranked = rerank(one.backend, source, judged.queries, first, ratios, settings.instruction, progress)
    finest = len(runs)
    runs += [(f"r = {ratio}", ratio, ranking) for ratio, ranking in reranked.runs.items()]
    values = [per_query(judged.qrels, run, settings.top_k, settings.min_grade) for *_, run in runs]
    boots = Bootstrap.by_measure(values, seed=settings.seed, num_resamples=settings.num_resamples)
    systems = []
    for i, (name, ratio, run) in enumerate(runs):
        kept = {measure: boot.share(i, finest) for measure, boot in boots.items()} if ratio is not None else None
        seconds = reranked.seconds[ratio] if ratio is not None else None
        systems.append(System.of(run, values[i], boots, i, 0, name=name, ratio=ratio, kept=kept, seconds=seconds))
    return EvaluationReport(
        **one.identity(),
        stored_as=stored.name if stored is not None else None,
        codec=stored.manifest.codec if stored is not None else None,
        settings=settings,
        counts=_counts(judged, first, settings.min_grade, reranked),
        qrels=judged.qrels,
        systems=systems,
        refused=judged.refused,
    )


def _plan(one: Experiment, settings: EvaluationSettings, source: StateSource) -> str:
    """What is going to be done, and about how long it takes."""
    ratios = settings.ratios or ()
    pairs = Pairs(one.first_stage[1])
    prompts = {q: one.backend.prompt(one.judged.queries[q], settings.instruction) for q in pairs.candidates}
    work = f"{len(pairs.candidates):,} queries with {pairs.num:,} candidates, {len(pairs.places):,} passages"
    plan = f"Reranking {work}, at {len(ratios)} ratio{'s' * (len(ratios) != 1)}"
    if (teacher := settings.teacher) is not None:
        plan += f", and by {TEACHERS[teacher]}, whose time is not counted here"
    if (pace := Pace.measure(source, one.backend, prompts, pairs, ratios)) is None:
        return f"{plan}."
    scoring = sum(pace.scoring(ratio, pairs.num) for ratio in ratios)
    return f"{plan}; {estimated(encode=pace.reading(pairs.places), score=scoring)}."


def _counts(judged: JudgedCollection, first: Run, min_grade: int, reranked: Reranked) -> Counts:
    num_changed = 0  # candidates whose stored states are of another text than the corpus has now
    if judged.stored is not None:
        ids = sorted({p for ranking in first.values() for p, _ in ranking if p in judged.passages})
        digests = zip(ids, judged.stored.digests(ids), strict=True)
        num_changed = sum(digest not in (None, text_digest(judged.passages[p])) for p, digest in digests)
    return Counts.of(
        judged,
        first,
        min_grade,
        num_missing_passages=len(reranked.missing_passages),
        num_changed_passages=num_changed,
        num_truncated_passages=len(reranked.truncated_passages),
        num_unscored_pairs=reranked.num_unscored_pairs,
    )


def open_checkpoint(
    model: Checkpoint | str | Path, stored: Collection | None, *, read_control_tokens: bool = False
) -> Checkpoint:
    """The checkpoint, at the passage limit a stored collection was written with, checked against it.

    `read_control_tokens`: in texts, as KaLM's code does; of a checkpoint that is opened here. Raises CheckpointError,
    or EncoderMismatch where another encoder wrote the collection.
    """
    if not isinstance(model, Checkpoint):
        limit = stored.manifest.max_passage_tokens if stored is not None else None
        model = Checkpoint.open(model, max_passage_tokens=limit, neutralise=not read_control_tokens)
    if stored is not None:
        Collection.open(stored.store, stored.name, fingerprint=model.identity.fingerprint, checkpoint=model.name)
    return model
