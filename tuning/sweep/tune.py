"""One sentence for each thing a reader of the numbers should know. Computes counts, no measure.

A sweep on one screen: candidates, states once, margins of every unit, quality, costs.

    report = tune(read_judged("examples/scifact"), "preread/models/preread-mini", SweepSettings(), work_dir="work")

Knows no file format, metric or model by itself; each is a neighbour's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache import DEFAULT_CODEC
from cache.codecs import Codec
from cache.collection import Collection
from checkpoint import Checkpoint
from checkpoint.compute import hardware
from decoder_server.models.backend import Backend
from decoder_server.models.fbnl.backend import FbnlBackend
from encoder_worker.encoder import Encoder
from encoder_worker.passage_encoder import BatchLimits, PassageEncoder
from encoder_worker.writing import num_training_states
from tuning import EvaluationError
from tuning import baselines as first_stage
from tuning.evaluate import open_checkpoint, stored_texts
from tuning.judged import JudgedCollection
from tuning.progress import SILENT, Progress
from tuning.rerank import EncodedStates, StateSource, StoredStates
from tuning.sweep import costs as sizes
from tuning.sweep import costs as timing
from tuning.sweep import quality
from tuning.sweep.costs import Lengths
from tuning.sweep.margins import Codecs, Margins, Pairs, with_fallback
from tuning.sweep.quality import Judgements, Quality
from tuning.sweep.report import IndexingCost, SweepReport, SweepRow
from tuning.sweep.settings import Configuration, SweepSettings, units_of
from tuning.sweep.workdir import SpilledStates, WorkDir, inputs_of
from tuning.trec import RunFile


def notes(
    judged: JudgedCollection,
    candidates: RunFile | None,
    from_states: Collection | None,
    judgements: Judgements,
    pairs: Pairs,
    states: SpilledStates,
    reference: NDArray[np.float32],
    margins: Margins,
    codecs: Codecs,
    is_empty: Callable[[str], bool],
) -> list[str]:
    """In the order of the data: judgements, candidates, states, codecs, margins.

    Args:
        is_empty: whether a passage's text is empty to the model's tokenizer.
    """
    there = set(states.passage_ids)
    absent = pairs.places.keys() - there
    unread = {p for p in absent if not is_empty(judged.passages.get(p, ""))}
    grades = list(judged.qrels.values())
    unscored = sum(int(np.isnan(flat).sum()) for flat in margins.values.values()) - len(margins.values) * sum(
        len(places) for p, places in pairs.places.items() if p not in there
    )
    counted = (
        (len(judged.refused), "lines of the judged files cannot be used: left out"),
        (
            judged.num_judgements_of_unknown_queries,
            f"judgements name queries without a text ({len(judged.unknown_queries)} of them): left out",
        ),
        (
            sum(p not in judged.passages for own in grades for p in own) if judged.passages else 0,
            "judgements name passages that the collection does not have: relevant, and never found",
        ),
        (
            len(candidates.run.keys() - judged.queries.keys()) if candidates is not None else 0,
            "queries of the run have no text or no judgement: left out",
        ),
        (
            sum(max(own.values()) < judgements.min_grade for own in grades),
            "queries have no relevant passage: they count 0",
        ),
        (
            sum(not found for found in pairs.candidates.values()),
            "queries have no candidates: " + ("left out" if judgements.taught else "they count 0"),
        ),
        (states.num_not_finite, "candidate passages have states that are NaN or infinite: ranked last"),
        (len(absent) - len(unread) - states.num_not_finite, "candidate passages have no text or states: ranked last"),
        (len(unread), "candidate passages gave no states (NaN, infinite, or out of memory): ranked last"),
        (len(states.truncated & pairs.places.keys()), "candidate passages were read up to the passage limit only"),
        (unscored, "margins, over all configurations, were not finite: those candidates are ranked last"),
    )
    told = [f"{number:,} {text}" for number, text in counted if number > 0]
    if from_states is not None:
        manifest = from_states.manifest
        told.append(
            f"{manifest.collection} keeps no texts: the reference is its stored states (ratio "
            f"{manifest.compression_ratio}, {manifest.codec}), and codecs are laid over theirs"
        )
    told += [
        f"{factory} at stored ratio {ratio} is left out"
        f"{f', {DEFAULT_CODEC} stands in for it' if factory != DEFAULT_CODEC else ''}: {reason}"
        for (ratio, factory), reason in codecs.left_out.items()
    ]
    told += [
        f"{factory} was trained on few states: {', '.join(f'{n:,} at {r}' for r, n in sorted(few.items()))}. An index "
        f"run takes {num_training_states(Codec(factory, states.dim)):,} where it has them, and may do better"
        for factory, few in codecs.few.items()
    ]
    return told


SPILL_CHUNK_BYTES = 32 << 20  # how much a killed run encodes again at most


def tune(
    judged: JudgedCollection,
    model: Checkpoint | str | Path,
    settings: SweepSettings | None = None,
    *,
    work_dir: str | Path,
    candidates: RunFile | None = None,
    stored: Collection | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress = SILENT,
) -> SweepReport:
    """Measures every configuration on the candidates of every query.

    Args:
        judged: passages and queries; without judgements the reference's own ranking is taken for them.
        candidates: the first stage's ranking; BM25's own where there is none.
        stored: take the passages of this collection: their texts, or where it keeps none their states.
        work_dir: where states and margins are kept; a run that was killed goes on from there.

    Raises:
        EvaluationError: input that cannot be tuned on.
        CheckpointError, CacheError: a checkpoint, collection or codec that cannot be used.
    """
    settings = settings or SweepSettings()
    checkpoint = open_checkpoint(model, stored)
    if stored is not None and not judged.passages:
        judged = judged.with_passages(stored_texts(stored))
    if settings.max_queries is not None:
        judged = judged.sample(settings.max_queries, settings.seed)
    from_states = stored if stored is not None and not judged.passages else None
    source_ratio = from_states.manifest.compression_ratio if from_states is not None else 1
    settings = settings.resolved(source_ratio, checkpoint.dim)
    configurations = settings.grid()
    name, first = first_stage.candidates(judged.passages, judged.queries, candidates, settings.top_k, progress)
    pairs = Pairs({q: [p for p, _ in found] for q, found in first.items()})
    if not pairs.num:
        raise EvaluationError("no query has any candidate; a run file with --run names some")

    backend = FbnlBackend.load(checkpoint, device=device, dtype=dtype)
    exact = backend if backend.dtype_name == "float32" else FbnlBackend.load(checkpoint, device=device, dtype="float32")
    half = Encoder.load(checkpoint, device=device, dtype=dtype)
    encoder = PassageEncoder(checkpoint, half, BatchLimits.for_device(half.device_name))
    work = WorkDir(Path(work_dir), inputs_of(judged, checkpoint, backend, settings, first, from_states))
    with work.held():
        source: StateSource
        if from_states is not None:
            source = StoredStates(from_states)
        else:
            source = EncodedStates(encoder, judged.passages, 1, split=settings.split, chunk_bytes=SPILL_CHUNK_BYTES)
        states = SpilledStates(work.path, source.ratio, checkpoint.dim)
        states.fill(source, pairs.passage_ids, progress)
        if not states.passage_ids:
            raise EvaluationError("no candidate has states: none of their passages has a text that can be read")

        margins = Margins(work, states, pairs, judged.queries)
        reference = margins.reference(exact, settings.instruction, progress)
        codecs = Codecs(states, work, settings.few_samples, settings.seed)
        configurations = with_fallback(configurations, codecs)
        margins.fill(backend, units_of(configurations), codecs, settings.instruction, progress)

        taught = not judged.qrels
        judgements = (
            Judgements(quality.taught_by(reference, pairs), True, 1)
            if taught
            else Judgements(judged.qrels, False, settings.min_grade)
        )
        if not judgements.qrels:
            raise EvaluationError("the reference scored no candidate: every margin is NaN")
        first_quality, reference_quality, measured = quality.measure(
            judgements,
            first,
            reference,
            margins,
            configurations,
            overlap_k=settings.overlap_k,
            seed=settings.seed,
            num_resamples=settings.num_resamples,
            progress=progress,
        )
        if from_states is not None:
            lengths = sizes.of_stored(from_states, progress)
        else:
            lengths = sizes.of_texts(encoder, list(judged.passages.values()), split=settings.split, progress=progress)
        timings = None
        if settings.timed_queries and measured:
            timings = timing.measure_times(
                backend,
                checkpoint.identity(),
                states,
                codecs,
                _timed(margins, states, judged, backend, settings),
                list(measured),
                settings.rounds,
                work.path / "store",
                progress,
            )

    encoded = from_states is None and states.num_tokens > 0
    seconds_per_token = states.seconds / states.num_tokens if encoded else None
    wanted = {p for found in pairs.candidates.values() for p in found}
    return SweepReport(
        collection=judged.name,
        checkpoint=checkpoint.name,
        fingerprint=checkpoint.identity().fingerprint,
        dtype=backend.dtype_name,
        device=backend.device_name,
        hardware=hardware(),
        instruction=(checkpoint.settings.default_instruction if settings.instruction is None else settings.instruction),
        settings=settings,
        reference_ratio=source.ratio,
        taught=taught,
        first_stage_name=name,
        num_queries=len(judged.queries),
        num_passages=lengths.num_passages,
        num_candidates=pairs.num,
        mean_tokens=lengths.num_tokens / max(1, lengths.num_passages),
        notes=notes(
            judged, candidates, from_states, judgements, pairs, states, reference, margins, codecs, encoder.is_empty
        ),
        first_stage=first_quality,
        reference=reference_quality,
        rows=_rows(measured, codecs, lengths, timings, seconds_per_token),
        query_ids=list(judgements.qrels),
        qrels=judgements.qrels,
        queries=judged.queries,
        passages={p: judged.passages[p] for p in judged.passages if p in wanted},
    )


def _rows(
    measured: dict[Configuration, Quality],
    codecs: Codecs,
    lengths: Lengths,
    timings: timing.MeasuredTimes | None,
    seconds_per_token: float | None,
) -> list[SweepRow]:
    """Quality beside cost; what indexing takes is carried over from what was encoded and written here."""
    rows = []
    for one, own in measured.items():
        trained = codecs.get(one.stored_ratio, one.codec)
        assert trained is not None  # or it would not have been measured
        writing = timings.writing[one.stored_ratio, one.codec] if timings is not None else None
        indexing = IndexingCost(
            seconds_per_token * lengths.num_tokens if seconds_per_token is not None else None,
            writing.codec_seconds * lengths.num_passages if writing is not None else None,
            trained.train_seconds,
            writing.store_seconds * lengths.num_passages if writing is not None else None,
        )
        size = sizes.size_of(lengths, one.stored_ratio, trained.codec)
        rows.append(SweepRow(one, own, size, timings.of(one) if timings is not None else None, indexing))
    return rows


def _timed(
    margins: Margins, states: SpilledStates, judged: JudgedCollection, backend: Backend, settings: SweepSettings
) -> list[timing.TimedQuery]:
    """Queries drawn from those that have candidates with states."""
    there = set(states.passage_ids)
    pairs = margins.pairs
    some = [q for q, found in pairs.candidates.items() if not there.isdisjoint(found)]
    drawn = sorted(random.Random(settings.seed).sample(some, min(len(some), settings.timed_queries)))
    # Who goes on in a cascade hardly depends on the codec: any unit that is read at the ratio will do.
    by_ratio = {unit.read_ratio: pairs.split(flat) for unit, flat in reversed(margins.values.items())}
    return [
        timing.TimedQuery(
            backend.prompt(judged.queries[q], settings.instruction),
            [p for p in pairs.candidates[q] if p in there],
            {
                ratio: own[q][[row for row, p in enumerate(pairs.candidates[q]) if p in there]]
                for ratio, own in by_ratio.items()
            },
        )
        for q in drawn
    ]
