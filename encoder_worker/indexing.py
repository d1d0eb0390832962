"""What an index run would cost: counted to the last token, timed on a few real forward passes. Writes nothing.

Indexing as one call: a source of passages into a collection of a store.

Everything a job needs and nothing of a command line: no terminal, no signals, no exit codes.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cache.errors import CollectionExists
from cache.record import HEADER_BYTES, check_name
from cache.store import Store
from encoder_worker import pipeline
from encoder_worker.passage_encoder import PassageEncoder, plan_batches
from encoder_worker.pipeline import Forward, GroupLimits, OnProgress, Sink
from encoder_worker.reading import ReadBatch, ReadLimits, Todo, read_batches
from encoder_worker.report import IndexReport
from encoder_worker.sources import Passage, Refused
from encoder_worker.writing import CollectionSettings, Target

SAMPLE_PASSAGES = 256
MAX_SAMPLE_SECONDS = 10.0


@dataclass(frozen=True)
class IndexEstimate:
    """Costs of the passages that an index run would encode now."""

    num_passages: int
    num_tokens: int
    num_padding_tokens: int
    num_states: int
    size_bytes: int  # of their records in the store: states in the codec, headers, texts where they are kept
    tokens_per_second: float  # measured, padding not counted
    seconds: float
    num_sample_tokens: int  # that the speed was measured on


def estimate(
    windows: Iterable[ReadBatch],
    encoder: PassageEncoder,
    target: Target,
    report: IndexReport,
    stop: threading.Event | None = None,
) -> IndexEstimate:
    """Reads and tokenizes everything, encodes a uniform sample for at most some ten seconds.

    Args:
        report: filled with what was read, refused, unchanged, cut and split.
        stop: set it to end with what was read so far.
    """
    sample: list[Todo] = []
    chance = random.Random(0)
    num_passages = num_tokens = num_states = num_padded = size_bytes = 0
    for window in windows:
        report.take(window.num_read, window.num_unchanged, window.refused)
        report.stopped_by = window.stopped_by
        for one in window.todo:
            num_passages += 1
            tokens = one.tokenized
            num_tokens += tokens.num_tokens
            num_states += tokens.num_states(target.compression_ratio)
            size_bytes += HEADER_BYTES + 4 * len(tokens.windows)
            size_bytes += len(one.passage.text.encode()) if target.stores_text else 0
            report.note(one.passage, len(tokens.windows), tokens.truncated, encoder.settings.max_passage_tokens)
            if len(sample) < SAMPLE_PASSAGES:
                sample.append(one)
            elif (at := chance.randrange(num_passages)) < SAMPLE_PASSAGES:
                sample[at] = one
        report.end_window()
        lengths = [length for one in window.todo for length in one.tokenized.window_tokens]
        num_padded += sum(lengths[batch[0]] * len(batch) for batch in plan_batches(lengths, encoder.limits))
        if stop is not None and stop.is_set():
            report.interrupted = True
            break
    num_sample_tokens, seconds = _measure(sample, encoder, target.compression_ratio)
    rate = num_sample_tokens / seconds if seconds else 0.0
    return IndexEstimate(
        num_passages=num_passages,
        num_tokens=num_tokens,
        num_padding_tokens=num_padded - num_tokens,
        num_states=num_states,
        size_bytes=size_bytes + num_states * target.codec.code_size_bytes,
        tokens_per_second=rate,
        seconds=num_tokens / rate if rate else 0.0,
        num_sample_tokens=num_sample_tokens,
    )


def _measure(sample: list[Todo], encoder: PassageEncoder, ratio: int) -> tuple[int, float]:
    """Tokens encoded and seconds they took, the first pass (which warms up) left out where there are more."""
    forward = Forward(sample, encoder, ratio)
    if not forward.batches:
        return 0, 0.0
    forward.encode(forward.batches[0])
    num_tokens, begun = 0, time.monotonic()
    for batch in forward.batches[1:] or forward.batches:
        forward.encode(batch)
        num_tokens += sum(forward.lengths(batch))
        if time.monotonic() - begun > MAX_SAMPLE_SECONDS:
            break
    return num_tokens, time.monotonic() - begun


@dataclass(frozen=True)
class IndexOptions:
    """How to go about it; none of this changes a state except `split`."""

    split: bool = False  # passages over the token limit become windows instead of being cut
    strict: bool = False  # stop at the first refused item
    force: bool = False  # encode also what is stored with the same text
    allow_clipped: bool = False  # store also passages that the codec was not trained for
    alias: str | None = None  # moved to the collection when everything was read
    window: ReadLimits = field(default_factory=ReadLimits)
    group: GroupLimits = field(default_factory=GroupLimits)


def index(
    source: Iterable[Passage | Refused],
    encoder: PassageEncoder,
    store: Store,
    collection: str,
    settings: CollectionSettings | None = None,
    options: IndexOptions | None = None,
    *,
    stop: threading.Event | None = None,
    on_progress: OnProgress | None = None,
    report: IndexReport | None = None,
) -> IndexReport:
    """Encodes what is missing or changed and stores it. Running it again does nothing twice.

    Args:
        source: items in any order; a `fraction()` method, as Source has, makes progress and ETA possible.
        collection: name or alias; made when it does not exist.
        stop: set it from anywhere to end after the batch in hand; what was encoded is then stored.
        report: to fill in, for a caller who wants the counts also when this raises.

    Raises:
        EncoderMismatch, CollectionExists: the collection is another encoder's, or made with other settings.
        CodecError: the codec needs more states to train on than the source gave.
        CacheError: the store failed; what it acknowledged stays.
    """
    options = options or IndexOptions()
    report = report if report is not None else IndexReport(collection)
    target = _target(encoder, store, collection, settings, options)
    begun = time.monotonic()
    try:
        pipeline.run(
            _windows(source, encoder, target, options),
            encoder,
            target.compression_ratio,
            Sink(target, report, options.group, allow_clipped=options.allow_clipped),
            report,
            stop or threading.Event(),
            on_progress or (lambda progress: None),
        )
    finally:
        report.seconds = time.monotonic() - begun
    if options.alias is not None and target.collection is not None and report.complete:
        store.set_alias(options.alias, target.collection.name)
        report.alias = options.alias
    return report


def dry_run(
    source: Iterable[Passage | Refused],
    encoder: PassageEncoder,
    store: Store,
    collection: str,
    settings: CollectionSettings | None = None,
    options: IndexOptions | None = None,
    *,
    stop: threading.Event | None = None,
    report: IndexReport | None = None,
) -> IndexEstimate:
    """What `index` with the same arguments would cost. Raises what it would raise before encoding."""
    options = options or IndexOptions()
    report = report if report is not None else IndexReport(collection)
    target = _target(encoder, store, collection, settings, options)
    begun = time.monotonic()
    result = estimate(_windows(source, encoder, target, options), encoder, target, report, stop)
    report.seconds = time.monotonic() - begun
    return result


def _target(
    encoder: PassageEncoder, store: Store, collection: str, settings: CollectionSettings | None, options: IndexOptions
) -> Target:
    target = Target(store, collection, settings or CollectionSettings(), encoder.identity, encoder.settings)
    if options.alias is not None:
        # Refused now, not after hours of encoding.
        check_name("alias", options.alias)
        if options.alias == target.name or options.alias in store.list_collections():
            raise CollectionExists(f"alias: {options.alias!r} is the name of a collection; expected a name of its own")
    return target


def _windows(
    source: Iterable[Passage | Refused], encoder: PassageEncoder, target: Target, options: IndexOptions
) -> Iterator[ReadBatch]:
    return read_batches(
        source,
        encoder,
        target,
        split=options.split,
        strict=options.strict,
        force=options.force,
        limits=options.window,
    )
