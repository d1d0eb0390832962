"""Indexing as one call: a source of passages into a collection of a store.

Everything a job needs and nothing of a command line: no terminal, no signals, no exit codes.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from cache.errors import CollectionExists
from cache.record import HEADER_BYTES, check_name
from cache.store import Store
from encoder_worker.passage_encoder import PassageEncoder, Tokenized, plan_batches
from encoder_worker.pipeline import Pipeline, PipelineLimits
from encoder_worker.reading import Intake, ReadBatch, ReadLimits, ahead, read_batches
from encoder_worker.report import IndexReport, Progress, Speedometer
from encoder_worker.scheduler import EncodeScheduler, Priority, make_model_thread
from encoder_worker.sources import Passage, Refused
from encoder_worker.writing import CollectionSettings, GroupLimits, Target

RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
SAMPLE_PASSAGES = 256
MAX_SAMPLE_SECONDS = 10.0


@dataclass(frozen=True)
class IndexOptions:
    """How to go about it; none of this changes a state except `split`."""

    split: bool = False  # passages over the token limit become windows instead of being cut
    strict: bool = False  # stop at the first refused item
    force: bool = False  # encode also what is stored with the same text
    allow_clipped: bool = False  # store also passages that the codec was not trained for
    alias: str | None = None  # moved to the collection when everything was read
    read: ReadLimits = field(default_factory=ReadLimits)
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
    on_progress: Callable[[Progress], None] = lambda progress: None,
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
    stop = stop or threading.Event()
    target = _target(encoder, store, collection, settings, options)
    begun = time.monotonic()
    try:
        _run_blocking(_index(source, encoder, target, options, report, stop, on_progress))
    finally:
        report.seconds = time.monotonic() - begun
    if options.alias is not None and target.collection is not None and report.complete:
        store.set_alias(options.alias, target.collection.name)
        report.alias = options.alias
    return report


async def _index(
    source: Iterable[Passage | Refused],
    encoder: PassageEncoder,
    target: Target,
    options: IndexOptions,
    report: IndexReport,
    stop: threading.Event,
    on_progress: Callable[[Progress], None],
) -> None:
    meter = Speedometer()
    limits = PipelineLimits(
        max_unencoded=1, group=options.group, retry_seconds=RETRY_SECONDS, allow_clipped=options.allow_clipped
    )
    with make_model_thread() as model_thread, ThreadPoolExecutor(1, thread_name_prefix="store") as store_thread:
        scheduler = EncodeScheduler(encoder, model_thread, report.count_pass, shuffle=random.Random(0))
        pipeline = Pipeline(scheduler, Priority.BULK, target, store_thread, limits, stop)
        computing = asyncio.create_task(scheduler.run())
        try:
            batches = ahead(_batches(source, encoder, target, options), stop, name="read and tokenize")
            async with aclosing(pipeline.run(batches)) as changes:
                async for finished in changes:
                    for batch in finished:
                        report.add(batch, encoder.settings.max_passage_tokens)
                    num_done = pipeline.num_read - pipeline.num_unencoded
                    on_progress(meter.read(num_done, pipeline.num_encoded, pipeline.fraction))
        finally:
            computing.cancel()
            store_thread.shutdown()  # what was written is acknowledged, whatever went wrong
            for batch in pipeline.unacknowledged:
                report.add(batch, encoder.settings.max_passage_tokens)
            report.num_values = report.num_states * encoder.dim
            report.num_training_states = target.num_trained
            report.interrupted = stop.is_set()


def _run_blocking(job: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(job)
    else:  # called on an event loop, as in a notebook: it blocks there too
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, job).result()


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
    """The cost of `index` with the same arguments. Raises what it would raise before encoding.

    Reads and tokenizes everything, encodes a uniform sample for at most some ten seconds, writes nothing.
    """
    options = options or IndexOptions()
    report = report if report is not None else IndexReport(collection)
    target = _target(encoder, store, collection, settings, options)
    begun = time.monotonic()
    sample: list[Tokenized] = []
    chance = random.Random(0)
    num_passages = num_tokens = num_states = num_padded = size_bytes = 0
    for batch in _batches(source, encoder, target, options):
        lengths: list[int] = []
        for one in batch.upserts:
            if (tokens := one.tokenized) is None:
                continue
            num_passages += 1
            one.num_states = tokens.num_states(target.compression_ratio)
            num_states += one.num_states
            size_bytes += HEADER_BYTES + 4 * len(tokens.windows)
            size_bytes += len(one.passage.text.encode()) if target.stores_text else 0
            lengths += tokens.window_tokens
            if len(sample) < SAMPLE_PASSAGES:
                sample.append(tokens)
            elif (at := chance.randrange(num_passages)) < SAMPLE_PASSAGES:
                sample[at] = tokens
        num_tokens += sum(lengths)
        num_padded += sum(lengths[rows[0]] * len(rows) for rows in plan_batches(lengths, encoder.limits))
        report.add(batch, encoder.settings.max_passage_tokens)
        if stop is not None and stop.is_set():
            report.interrupted = True
            break
    num_sample_tokens, seconds = _measure(sample, encoder, target.compression_ratio)
    rate = num_sample_tokens / seconds if seconds else 0.0
    report.seconds = time.monotonic() - begun
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


def _measure(sample: list[Tokenized], encoder: PassageEncoder, ratio: int) -> tuple[int, float]:
    """Tokens encoded and seconds they took, the first pass (which warms up) left out where there are more."""
    windows = [window for tokens in sample for window in tokens.windows]
    batches = plan_batches([len(window) for window in windows], encoder.limits)
    if not batches:
        return 0, 0.0
    random.Random(0).shuffle(batches)
    encoder.encode([windows[i] for i in batches[0]], ratio)
    num_tokens, begun = 0, time.monotonic()
    for batch in batches[1:] or batches:
        encoder.encode([windows[i] for i in batch], ratio)
        num_tokens += sum(len(windows[i]) for i in batch)
        if time.monotonic() - begun > MAX_SAMPLE_SECONDS:
            break
    return num_tokens, time.monotonic() - begun


def _target(
    encoder: PassageEncoder, store: Store, collection: str, settings: CollectionSettings | None, options: IndexOptions
) -> Target:
    target = Target(store, collection, settings or CollectionSettings(), encoder.identity, encoder.settings)
    if options.alias is not None:
        # Refused now, not after hours of encoding.
        check_name("alias", options.alias)
        if options.alias == target.name or options.alias in store.list_collections():
            raise CollectionExists(f"alias: {options.alias!r} is the name of a collection; expected another name")
    return target


def _batches(
    source: Iterable[Passage | Refused], encoder: PassageEncoder, target: Target, options: IndexOptions
) -> Iterator[ReadBatch]:
    intake = Intake(encoder, target, split=options.split, force=options.force)
    return read_batches(source, intake, strict=options.strict, limits=options.read)
