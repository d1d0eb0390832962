"""A sweep on one screen: candidates, states once, margins of every unit, quality, costs.

    report = tune(read_judged("examples/scifact"), "preread/models/preread-mini", SweepSettings(), work_dir="work")

Knows no file format, metric or model by itself; each is a neighbour's.
"""

from __future__ import annotations

import random
from pathlib import Path

from cache.collection import Collection
from checkpoint import Checkpoint
from checkpoint.hardware import hardware
from decoder_server.backend import Backend
from decoder_server.fbnl import FbnlBackend
from encoder_worker.batching import BatchLimits
from encoder_worker.encoder import Encoder
from encoder_worker.passage_encoder import PassageEncoder
from tuning import first_stage
from tuning.errors import EvaluationError
from tuning.evaluate import open_checkpoint, stored_texts
from tuning.judged import JudgedCollection
from tuning.progress import SILENT, Progress
from tuning.states import EncodedStates, StateSource, StoredStates
from tuning.sweep import quality, sizes, timing
from tuning.sweep.configurations import Configuration, units_of
from tuning.sweep.inputs import inputs_of
from tuning.sweep.margins import Margins, Pairs
from tuning.sweep.notes import notes
from tuning.sweep.quality import Judgements, Quality
from tuning.sweep.recode import Codecs, with_fallback
from tuning.sweep.result import Indexing, Row, SweepReport
from tuning.sweep.settings import SweepSettings
from tuning.sweep.sizes import Lengths
from tuning.sweep.spill import SpilledStates
from tuning.sweep.workdir import WorkDir
from tuning.trec import RunFile

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
            timings = timing.measure(
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
    timings: timing.Timings | None,
    seconds_per_token: float | None,
) -> list[Row]:
    """Quality beside cost; what indexing takes is carried over from what was encoded and written here."""
    rows = []
    for one, own in measured.items():
        trained = codecs.get(one.stored_ratio, one.codec)
        assert trained is not None  # or it would not have been measured
        writing = timings.writing[one.stored_ratio, one.codec] if timings is not None else None
        indexing = Indexing(
            seconds_per_token * lengths.num_tokens if seconds_per_token is not None else None,
            writing.codec_seconds * lengths.num_passages if writing is not None else None,
            trained.train_seconds,
            writing.store_seconds * lengths.num_passages if writing is not None else None,
        )
        size = sizes.size_of(lengths, one.stored_ratio, trained.codec)
        rows.append(Row(one, own, size, timings.of(one) if timings is not None else None, indexing))
    return rows


def _timed(
    margins: Margins, states: SpilledStates, judged: JudgedCollection, backend: Backend, settings: SweepSettings
) -> list[timing.Timed]:
    """Queries drawn from those that have candidates with states."""
    there = set(states.passage_ids)
    pairs = margins.pairs
    some = [q for q, found in pairs.candidates.items() if not there.isdisjoint(found)]
    drawn = sorted(random.Random(settings.seed).sample(some, min(len(some), settings.timed_queries)))
    # Who goes on in a cascade hardly depends on the codec: any unit that is read at the ratio will do.
    by_ratio = {unit.read_ratio: pairs.split(flat) for unit, flat in reversed(margins.values.items())}
    return [
        timing.Timed(
            backend.prompt(judged.queries[q], settings.instruction),
            [p for p in pairs.candidates[q] if p in there],
            {
                ratio: own[q][[row for row, p in enumerate(pairs.candidates[q]) if p in there]]
                for ratio, own in by_ratio.items()
            },
        )
        for q in drawn
    ]
