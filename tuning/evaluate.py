"""Evaluation on one screen: candidates, states once, margins at each ratio, measures, intervals.

report = evaluate("examples/corpus", "preread/models/preread-mini", EvaluationSettings(ratios=(1, 4)))
report.baseline.measures["nDCG@10"].mean, report.reranked(4).measures["nDCG@10"].mean
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache.collection import Collection
from cache.states import text_digest
from checkpoint import Checkpoint
from decoder_server.models.fbnl.backend import FbnlBackend
from encoder_worker.encoder import Encoder
from encoder_worker.passage_encoder import BatchLimits, PassageEncoder
from tuning.baselines import TEACHERS, first_stage, teacher_run
from tuning.judged import JudgedCollection, read_judged
from tuning.metrics import Bootstrap, per_query
from tuning.progress import SILENT, StageProgress
from tuning.report import Counts, EvaluationReport, EvaluationSettings, System
from tuning.rerank import EncodedStates, StateSource, StoredStates, rerank
from tuning.trec import Run, RunFile


def evaluate(
    judged: JudgedCollection | str | Path,
    model: Checkpoint | str | Path,
    settings: EvaluationSettings | None = None,
    *,
    candidates: RunFile | None = None,
    stored: Collection | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: StageProgress = SILENT,
) -> EvaluationReport:
    """Reranks first-stage candidates with a checkpoint and measures both.

    Args:
        judged: a collection, or a BEIR folder to read it from.
        model: a checkpoint, or its directory or hub id.
        candidates: the first stage's ranking; BM25's where there is none.
        stored: read states from this collection instead of encoding the passages.

    Raises:
        EvaluationError: input that cannot be evaluated.
        CheckpointError, CacheError: a checkpoint or collection that cannot be used.
    """
    settings = (settings or EvaluationSettings()).with_ratios(stored.manifest.compression_ratio if stored else 1)
    assert settings.ratios is not None
    checkpoint = open_checkpoint(model, stored)
    judged = judged if isinstance(judged, JudgedCollection) else read_judged(judged)
    judged = judged.with_texts_of(stored).sample(settings.max_queries, settings.seed)
    name, first = first_stage(judged.passages, judged.queries, candidates, settings.top_k, progress)
    runs: list[tuple[str, int | None, Run]] = [(name, None, first)]
    if settings.teacher is not None:
        taught = teacher_run(settings.teacher, judged.passages, judged.queries, first, device=device, progress=progress)
        runs.append((TEACHERS[settings.teacher], None, taught))

    backend = FbnlBackend.load(checkpoint, device=device, dtype=dtype)
    source: StateSource
    if stored is not None:
        source = StoredStates(stored)
    else:
        encoder = load_encoder(checkpoint, device, dtype)
        source = EncodedStates(encoder, judged.passages, math.gcd(*settings.ratios), split=settings.split)
    reranked = rerank(backend, source, judged.queries, first, settings.ratios, settings.instruction, progress)
    runs += [(f"r = {ratio}", ratio, ranking) for ratio, ranking in reranked.runs.items()]
    systems = [
        System(
            name,
            ratio,
            ranking,
            per_query(judged.qrels, ranking, settings.top_k, settings.min_grade),
            seconds=reranked.seconds.get(ratio) if ratio is not None else None,
        )
        for name, ratio, ranking in runs
    ]
    return EvaluationReport(
        collection=judged.name,
        checkpoint=checkpoint.name,
        fingerprint=checkpoint.identity().fingerprint,
        stored_as=stored.name if stored is not None else None,
        codec=stored.manifest.codec if stored is not None else None,
        dtype=backend.dtype_name,
        device=backend.device_name,
        instruction=checkpoint.settings.default_instruction if settings.instruction is None else settings.instruction,
        settings=settings,
        counts=Counts.of(
            judged,
            candidates,
            first,
            stored,
            settings.min_grade,
            num_missing_passages=len(reranked.missing_passages),
            num_changed_passages=_num_changed(judged, stored, first) if stored is not None else 0,
            num_truncated_passages=len(reranked.truncated_passages),
            num_unscored_pairs=reranked.num_unscored_pairs,
        ),
        query_ids=list(judged.qrels),
        qrels=judged.qrels,
        systems=_compare(systems, settings),
        refused=judged.refused,
    )


def open_checkpoint(
    model: Checkpoint | str | Path, stored: Collection | None, *, read_control_tokens: bool = False
) -> Checkpoint:
    """The checkpoint, at the passage limit a stored collection was written with, checked against it.

    Args:
        read_control_tokens: in texts, as KaLM's code does; of a checkpoint that is opened here.

    Raises:
        CheckpointError: it cannot be opened.
        EncoderMismatch: another encoder wrote the collection.
    """
    if not isinstance(model, Checkpoint):
        limit = stored.manifest.max_passage_tokens if stored is not None else None
        model = Checkpoint.open(model, max_passage_tokens=limit, neutralise=not read_control_tokens)
    if stored is not None:
        Collection.open(stored.store, stored.name, fingerprint=model.identity().fingerprint, checkpoint=model.name)
    return model


def load_encoder(checkpoint: Checkpoint, device: str | None, dtype: str | None) -> PassageEncoder:
    """Tokenizer and encoder half of a checkpoint. Raises CheckpointError, ValueError as loading does."""
    half = Encoder.load(checkpoint, device=device, dtype=dtype)
    return PassageEncoder(checkpoint, half, BatchLimits.for_device(half.device_name))


def _num_changed(judged: JudgedCollection, stored: Collection, first: Run) -> int:
    """Candidates whose states are of another text than the corpus has now."""
    ids = sorted({p for ranking in first.values() for p, _ in ranking if p in judged.passages})
    digests = zip(ids, stored.digests(ids), strict=True)
    return sum(digest is not None and digest != text_digest(judged.passages[p]) for p, digest in digests)


def _compare(systems: Sequence[System], settings: EvaluationSettings) -> list[System]:
    """The systems with intervals, each against the first, reranked ones against the finest ratio too.

    Args:
        systems: the first is the first stage; at least one has a ratio.
    """
    names = list(systems[0].per_query)
    columns = np.stack([system.per_query[name] for system in systems for name in names], axis=1)
    bootstrap = Bootstrap(columns, seed=settings.seed, num_resamples=settings.num_resamples)
    finest = min((system.ratio, i) for i, system in enumerate(systems) if system.ratio is not None)[1]
    return [
        replace(
            system,
            measures={m: bootstrap.interval(i * len(names) + k) for k, m in enumerate(names)},
            gain={m: bootstrap.difference(i * len(names) + k, k) for k, m in enumerate(names)} if i else None,
            relative={m: bootstrap.share(i * len(names) + k, k) for k, m in enumerate(names)} if i else None,
            kept={m: bootstrap.share(i * len(names) + k, finest * len(names) + k) for k, m in enumerate(names)}
            if system.ratio is not None
            else None,
        )
        for i, system in enumerate(systems)
    ]
