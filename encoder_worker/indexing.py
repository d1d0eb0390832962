"""Indexing as one call: a source of passages into a collection of a store.

Everything a job needs and nothing of a command line: no terminal, no signals, no exit codes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cache.errors import CollectionExists
from cache.names import check_name
from cache.store import Store
from encoder_worker import pipeline
from encoder_worker.dry_run import Estimate, estimate
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.pipeline import OnProgress
from encoder_worker.report import IndexReport
from encoder_worker.sink import GroupLimits, Sink
from encoder_worker.sources import Passage, Refused
from encoder_worker.target import CollectionSettings, Target
from encoder_worker.windows import Window, WindowLimits, read_windows


@dataclass(frozen=True)
class IndexOptions:
    """How to go about it; none of this changes a state except `split`."""

    split: bool = False  # passages over the token limit become windows instead of being cut
    strict: bool = False  # stop at the first refused item
    force: bool = False  # encode also what is stored with the same text
    allow_clipped: bool = False  # store also passages that the codec was not trained for
    alias: str | None = None  # moved to the collection when everything was read
    window: WindowLimits = field(default_factory=WindowLimits)
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
) -> Estimate:
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
) -> Iterator[Window]:
    return read_windows(
        source,
        encoder,
        target,
        split=options.split,
        strict=options.strict,
        force=options.force,
        limits=options.window,
    )
