"""Evaluation on one screen: candidates, states once, margins at each ratio, measures, intervals.

    report = evaluate("examples/corpus", "preread/models/preread-mini", EvaluationSettings(ratios=(1, 4)))
    report.baseline.measures["nDCG@10"].mean, report.reranked(4).measures["nDCG@10"].mean

Knows no file format, metric or model by itself; each is a neighbour's.
"""

from __future__ import annotations

import math
from collections.abc import Collection as AnyOf
from collections.abc import Mapping
from pathlib import Path

from cache.collection import Collection
from cache.record import Record
from cache.states import text_digest
from checkpoint import Checkpoint
from decoder_server.models.fbnl.backend import FbnlBackend
from encoder_worker.encoder import Encoder
from encoder_worker.passage_encoder import BatchLimits, PassageEncoder
from tuning import baselines as first_stage
from tuning.baselines import TEACHERS, teacher_run
from tuning.judged import JudgedCollection, read_judged
from tuning.metrics import per_query
from tuning.progress import SILENT, Progress
from tuning.report import Counts, EvaluationReport, EvaluationSettings, Measured, compare
from tuning.rerank import EncodedStates, Reranked, StateSource, StoredStates, rerank
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
    progress: Progress = SILENT,
) -> EvaluationReport:
    """Reranks first-stage candidates with a checkpoint and measures both.

    Args:
        judged: a collection, or a BEIR folder to read it from.
        model: a checkpoint, or its directory or hub id.
        candidates: the first stage's ranking; BM25's own where there is none.
        stored: read states from this collection instead of encoding the passages.

    Raises:
        EvaluationError: input that cannot be evaluated.
        CheckpointError, CacheError: a checkpoint or collection that cannot be used.
    """
    judged = judged if isinstance(judged, JudgedCollection) else read_judged(judged)
    settings = (settings or EvaluationSettings()).with_ratios(stored.manifest.compression_ratio if stored else 1)
    assert settings.ratios is not None
    checkpoint = open_checkpoint(model, stored)
    if stored is not None and not judged.passages:
        judged = judged.with_passages(stored_texts(stored))
    if settings.max_queries is not None:
        judged = judged.sample(settings.max_queries, settings.seed)
    measured: list[Measured] = []

    def measure(name: str, ratio: int | None, run: Run) -> None:
        measured.append((name, ratio, run, per_query(judged.qrels, run, settings.top_k, settings.min_grade)))

    name, first = first_stage.candidates(judged.passages, judged.queries, candidates, settings.top_k, progress)
    measure(name, None, first)
    if settings.teacher is not None:
        taught = teacher_run(settings.teacher, judged.passages, judged.queries, first, device=device, progress=progress)
        measure(TEACHERS[settings.teacher], None, taught)

    backend = FbnlBackend.load(checkpoint, device=device, dtype=dtype)
    source: StateSource
    if stored is not None:
        source = StoredStates(stored)
    else:
        half = Encoder.load(checkpoint, device=device, dtype=dtype)
        encoder = PassageEncoder(checkpoint, half, BatchLimits.for_device(half.device_name))
        source = EncodedStates(encoder, judged.passages, math.gcd(*settings.ratios), split=settings.split)
    reranked = rerank(backend, source, judged.queries, first, settings.ratios, settings.instruction, progress)
    for ratio, run in reranked.runs.items():
        measure(f"r = {ratio}", ratio, run)

    return EvaluationReport(
        collection=judged.name,
        checkpoint=checkpoint.name,
        fingerprint=checkpoint.identity().fingerprint,
        stored_as=stored.name if stored is not None else None,
        codec=stored.manifest.codec if stored is not None else None,
        dtype=backend.dtype_name,
        device=backend.device_name,
        instruction=(checkpoint.settings.default_instruction if settings.instruction is None else settings.instruction),
        settings=settings,
        counts=_count(judged, candidates, first, stored, reranked, settings),
        query_ids=list(judged.qrels),
        qrels=judged.qrels,
        systems=compare(measured, settings, reranked.seconds),
        refused=judged.refused,
    )


def open_checkpoint(
    model: Checkpoint | str | Path, stored: Collection | None, *, read_control_tokens: bool = False
) -> Checkpoint:
    """The checkpoint, at the passage limit a stored collection was written with, checked against it.

    Args:
        read_control_tokens: in texts, as KaLM's own code does; of a checkpoint that is opened here.

    Raises:
        CheckpointError: it cannot be opened.
        EncoderMismatch: another encoder wrote the collection.
    """
    if stored is None:
        return model if isinstance(model, Checkpoint) else Checkpoint.open(model, neutralise=not read_control_tokens)
    if not isinstance(model, Checkpoint):
        limit = stored.manifest.max_passage_tokens
        model = Checkpoint.open(model, max_passage_tokens=limit, neutralise=not read_control_tokens)
    Collection.open(stored.store, stored.name, fingerprint=model.identity().fingerprint, checkpoint=model.name)
    return model


def stored_texts(stored: Collection) -> dict[str, str]:
    """Texts kept beside the states, by passage id in order of ids; states are not decoded."""
    texts = {
        passage_id: record.text
        for passage_id, record in stored.store.scan(stored.name)
        if isinstance(record, Record) and record.text is not None
    }
    return dict(sorted(texts.items()))


def _known_passages(judged: JudgedCollection, stored: Collection | None) -> AnyOf[str]:
    """Ids the collection has; of a store without texts, those of the judged ones it has."""
    if judged.passages or stored is None:
        return judged.passages.keys()
    ids = sorted({p for grades in judged.qrels.values() for p in grades})
    return {p for p, digest in zip(ids, stored.digests(ids), strict=True) if digest is not None}


def _count(
    judged: JudgedCollection,
    candidates: RunFile | None,
    first: Run,
    stored: Collection | None,
    reranked: Reranked,
    settings: EvaluationSettings,
) -> Counts:
    known = _known_passages(judged, stored)
    grades: list[Mapping[str, int]] = list(judged.qrels.values())
    return Counts(
        num_queries=len(judged.queries),
        num_passages=len(judged.passages) if stored is None else stored.stats().num_passages,
        num_candidates=sum(map(len, first.values())),
        num_judgements=sum(map(len, grades)),
        num_judgements_of_unknown_queries=judged.num_judgements_of_unknown_queries,
        num_unknown_queries=len(judged.unknown_queries),
        num_judgements_of_unknown_passages=sum(p not in known for own in grades for p in own),
        num_queries_without_relevant=sum(max(own.values()) < settings.min_grade for own in grades),
        num_queries_without_candidates=sum(not ranking for ranking in first.values()),
        num_run_queries_ignored=len(candidates.run.keys() - judged.queries.keys()) if candidates is not None else 0,
        num_missing_passages=len(reranked.missing_passages),
        num_changed_passages=_num_changed(judged, stored, first) if stored is not None else 0,
        num_truncated_passages=len(reranked.truncated_passages),
        num_unscored_pairs=reranked.num_unscored_pairs,
        num_refused_lines=len(judged.refused),
    )


def _num_changed(judged: JudgedCollection, stored: Collection, first: Run) -> int:
    """Candidates whose states are of another text than the corpus has now."""
    ids = sorted({p for ranking in first.values() for p, _ in ranking if p in judged.passages})
    digests = zip(ids, stored.digests(ids), strict=True)
    return sum(digest is not None and digest != text_digest(judged.passages[p]) for p, digest in digests)
