"""Indexing as one call: a source of passages into a collection, with a report, progress and an estimate beforehand."""

import asyncio
import json
import random
import tempfile
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from cache.collection import Collection
from cache.errors import CacheError, CollectionNotFound
from cache.record import HEADER_BYTES
from cache.store import Store
from encoder_worker.config import CollectionSettings, IndexOptions
from encoder_worker.passage_encoder import PassageEncoder, Tokenized
from encoder_worker.pipeline import Pipeline
from encoder_worker.reading import Intake, ReadBatch, ahead
from encoder_worker.scheduler import EncodeScheduler
from encoder_worker.sources import Columns, Item, Place, SeenIds
from encoder_worker.writing import Target, held
from preread_edge.outputs import open_output

SAMPLE_PASSAGES, MAX_SAMPLE_SECONDS = 256, 10.0
OnProgress = Callable[["Progress"], None]
_SPOOL_BYTES = 4 << 20
_MEMORY_SECONDS = 60.0
_PAGE_IDS = 10_000
_SUMMARY = (
    "collection", "alias", "alias_was", "num_read", "num_encoded", "num_stored", "num_unchanged", "num_refused",
    "refused_by_reason", "num_truncated", "num_split", "num_tokens", "num_padding_tokens", "padding_share",
    "num_states", "num_clipped", "clipped_share", "num_clipped_passages", "num_training_states", "num_batches",
    "num_not_in_input", "seconds", "passages_per_second", "tokens_per_second", "interrupted", "stopped_by",
)  # fmt: skip


class _IssueLog:
    """Items worth a line in the report, in the order they came; on disk beyond a few megabytes."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_SPOOL_BYTES, mode="w+", encoding="utf-8")  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # it lives as long as the log

    def add(self, place: Place, passage_id: str | None, reason: str, message: str) -> None:
        entry = {"source": place.source, "line": place.line, "passage_id": passage_id, "reason": reason}
        self._file.write(json.dumps(entry | {"message": message}) + "\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        yield from map(json.loads, self._file)
        self._file.seek(0, 2)


@dataclass
class IndexReport:
    """Counts of one run. Every item read is stored, unchanged or refused, or the run was stopped before it."""

    collection: str
    num_read: int = 0
    num_encoded: int = 0
    num_stored: int = 0  # of those encoded: acknowledged by the store
    num_unchanged: int = 0  # stored before, with the same text
    num_refused: int = 0
    num_truncated: int = 0
    num_split: int = 0
    num_tokens: int = 0  # encoded
    num_padding_tokens: int = 0
    num_states: int = 0
    num_values: int = 0  # numbers in the stored states
    num_clipped: int = 0  # of them: outside what the codec was trained for
    num_clipped_passages: int = 0  # that have any
    num_training_states: int = 0  # that this run trained the codec on
    num_batches: int = 0
    num_not_in_input: int | None = None  # stored, and not read as whole here (absent, or refused); None: not known
    seconds: float = 0.0
    interrupted: bool = False
    stopped_by: str | None = None  # the refused item that ended a strict run, or the failure that ended this one
    alias: str | None = None  # moved to the collection at the end
    alias_was: str | None = None  # the other collection that it pointed to
    columns: list[Columns] = field(default_factory=list)  # of CSV, TSV and Parquet inputs
    refused_by_reason: Counter[str] = field(default_factory=Counter)
    refused: _IssueLog = field(default_factory=_IssueLog)
    truncated: _IssueLog = field(default_factory=_IssueLog)
    seen: SeenIds = field(default_factory=SeenIds)

    @property
    def complete(self) -> bool:
        """The source was read to its end."""
        return not self.interrupted and self.stopped_by is None

    @property
    def clipped_share(self) -> float:
        return self.num_clipped / max(1, self.num_values)

    @property
    def padding_share(self) -> float:
        return self.num_padding_tokens / max(1, self.num_tokens + self.num_padding_tokens)

    @property
    def passages_per_second(self) -> float:
        return self.num_stored / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def add(self, batch: ReadBatch, max_passage_tokens: int) -> None:
        """What became of a batch, in the order of the source; a passage that was stopped halfway counts as read."""
        self.num_read += len(batch.upserts)
        self.stopped_by = self.stopped_by or batch.stopped_by
        for one in batch.upserts:
            if one.num_states and one.tokenized is not None:
                self.num_encoded += 1
                self.num_split += len(one.tokenized.windows) > 1
                if one.tokenized.truncated:
                    self.num_truncated += 1
                    message = f"cut at {max_passage_tokens} tokens"
                    self.truncated.add(one.passage.place, one.passage.passage_id, "truncated", message)
            if (item := one.refused) is not None:
                self.num_refused += 1
                self.refused_by_reason[item.reason.value] += 1
                self.refused.add(item.place, item.passage_id, item.reason.value, item.message)
            elif one.stored:
                self.num_stored += 1
                self.num_states += one.num_states
                self.num_clipped += one.num_clipped
                self.num_clipped_passages += one.num_clipped > 0
            elif one.finished:
                self.num_unchanged += 1

    def count_pass(self, num_tokens: int, num_padding_tokens: int, seconds: float) -> None:
        self.num_batches += 1
        self.num_tokens += num_tokens
        self.num_padding_tokens += num_padding_tokens

    def summary(self) -> dict[str, Any]:
        """The counts as JSON values."""
        values = {name: getattr(self, name) for name in _SUMMARY}
        values["refused_by_reason"] = dict(sorted(self.refused_by_reason.items()))
        values["columns"] = [asdict(one) for one in self.columns]
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}

    def write(self, path: Path) -> None:
        """The counts and every refused and truncated item as one JSON document; items are streamed."""
        with open_output(path) as out:
            out.write(json.dumps(self.summary(), indent=1).removesuffix("\n}"))
            for name, log in (("refused", self.refused), ("truncated", self.truncated)):
                out.write(f',\n "{name}": [')
                for number, entry in enumerate(log):
                    out.write((",\n  " if number else "\n  ") + json.dumps(entry))
                out.write("]")
            out.write("\n}\n")


@dataclass(frozen=True, slots=True)
class Progress:
    """One moment of a run."""

    num_done: int = 0  # encoded, unchanged or refused
    num_encoded: int = 0
    fraction: float | None = 0.0  # of the source, 0 to 1; None where its size is not known
    seconds: float = 0.0
    passages_per_second: float = 0.0  # encoded, over the last minute
    eta_seconds: float | None = None

    def since(self, then: Self) -> Self:
        """With speed and time left by an earlier moment."""
        seconds, eta = self.seconds - then.seconds, None
        if not seconds:
            return self
        if self.fraction is not None and then.fraction is not None and self.fraction > then.fraction:
            eta = (1 - self.fraction) / (self.fraction - then.fraction) * seconds
        return replace(self, passages_per_second=(self.num_encoded - then.num_encoded) / seconds, eta_seconds=eta)


def index(
    source: Iterable[Item],
    encoder: PassageEncoder,
    store: Store,
    collection: str,
    settings: CollectionSettings | None = None,
    options: IndexOptions | None = None,
    *,
    stop: threading.Event | None = None,
    on_progress: OnProgress = lambda progress: None,
    report: IndexReport | None = None,
) -> IndexReport:
    """Encodes what is missing or changed and stores it in a collection. Running it again does nothing twice.

    A `fraction()` method of the source, as Source has, makes progress and ETA possible. Set `stop` from anywhere to end
    after the batch in hand; what was encoded is then stored. `report` is filled in, also when this raises.

    Raises what Target raises, StoreLocked where another process writes the collection, CodecError where the codec needs
    more states to train on than the source gave, CacheError where the store failed; what it acknowledged stays.
    """
    options, stop = options or IndexOptions(), stop or threading.Event()
    report = report if report is not None else IndexReport(collection)
    make = partial(Target, store, collection, settings or CollectionSettings(), encoder, options.alias)
    with held(make, wait_until=stop if options.wait else None) as target:
        if target is None:
            report.interrupted = True
        else:
            intake = Intake(encoder, target, options, seen=report.seen)
            _run_job(_index(source, intake, report, stop, on_progress), report)
            _finish(target, options.alias, report)
    return report


def _run_job(job: Coroutine[Any, Any, None], report: IndexReport) -> None:
    begun = time.monotonic()
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(job)
    else:  # called on an event loop, as in a notebook: it blocks there too
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, job).result()
    finally:
        report.seconds = time.monotonic() - begun


def _finish(target: Target, alias: str | None, report: IndexReport) -> None:
    """What follows a source that was read to its end."""
    if target.collection is None or not report.complete:
        return
    with suppress(CacheError):  # a count is no reason to fail
        # Ids of a run are unique, so these are distinct passages of the collection.
        num_known = report.num_stored + report.num_unchanged
        report.num_not_in_input = max(0, target.collection.stats().num_passages - num_known)
    if alias is not None:
        before = target.store.aliases().get(alias)
        target.store.set_alias(alias, target.collection.name)
        report.alias, report.alias_was = alias, before if before != target.collection.name else None


async def _index(
    source: Iterable[Item], intake: Intake, report: IndexReport, stop: threading.Event, on_progress: OnProgress
) -> None:
    # Rates are over the last minute, so that a resumed run's skipped beginning does not promise too much.
    begun, moments = time.monotonic(), deque([Progress()])
    encoder, target = intake.encoder, intake.target
    target.allow_clipped = intake.options.allow_clipped
    with (
        EncodeScheduler.make_model_thread() as model_thread,
        ThreadPoolExecutor(1, thread_name_prefix="store") as store_thread,
    ):
        scheduler = EncodeScheduler(encoder, model_thread, report.count_pass, shuffle=random.Random(0))
        pipeline = Pipeline(scheduler, target, store_thread, intake.options.limits, stop)
        computing = asyncio.create_task(scheduler.run())
        try:
            reading = ahead(intake.batches(source), stop, name="read and tokenize")
            async with aclosing(pipeline.run(reading)) as changes:
                async for finished in changes:
                    for batch in finished:
                        report.add(batch, encoder.settings.max_passage_tokens)
                    num_done, seconds = pipeline.num_read - pipeline.num_unencoded, time.monotonic() - begun
                    moments.append(Progress(num_done, pipeline.num_encoded, pipeline.fraction, seconds))
                    while len(moments) > 2 and seconds - moments[0].seconds > _MEMORY_SECONDS:
                        moments.popleft()
                    on_progress(moments[-1].since(moments[0]))
        finally:
            computing.cancel()
            store_thread.shutdown()  # what was written is acknowledged, whatever went wrong
            for batch in pipeline.unacknowledged:
                report.add(batch, encoder.settings.max_passage_tokens)
            report.num_values = report.num_states * encoder.dim
            report.num_training_states = target.num_trained
            report.interrupted = stop.is_set()
            if report.interrupted:  # what a batch held that was not full yet was read too
                report.num_read = max(report.num_read, intake.num_checked)


def ids_not_in_input(store: Store, report: IndexReport) -> Iterator[str]:
    """Stored ids that a complete run, dry or not, neither read nor refused; Redis may repeat some."""
    try:
        collection, page_token = Collection.open(store, report.collection), ""
    except CollectionNotFound:
        return
    refused = {entry["passage_id"] for entry in report.refused}
    while True:
        ids, page_token = collection.list_ids(_PAGE_IDS, page_token)
        yield from (one for one in ids if one not in report.seen and one not in refused)
        if not page_token:
            return


@dataclass
class IndexEstimate:
    """Costs of the passages that an index run would encode now."""

    num_passages: int = 0
    num_tokens: int = 0
    num_padding_tokens: int = 0
    num_states: int = 0
    size_bytes: int = 0  # of their records in the store: states in the codec, headers, texts where they are kept
    tokens_per_second: float = 0.0  # measured, padding not counted
    seconds: float = 0.0
    num_sample_tokens: int = 0  # that the speed was measured on


def dry_run(
    source: Iterable[Item],
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
    report = report if report is not None else IndexReport(collection)
    options = options or IndexOptions()
    target = Target(store, collection, settings or CollectionSettings(), encoder, options.alias)
    begun = time.monotonic()
    costs, sample, chance = IndexEstimate(), list[Tokenized](), random.Random(0)
    for batch in Intake(encoder, target, options, seen=report.seen).batches(source):
        lengths: list[int] = []
        for one in batch.upserts:
            if (tokens := one.tokenized) is None:
                continue
            one.num_states = tokens.num_states(target.compression_ratio)
            lengths += tokens.window_tokens
            costs.num_passages += 1
            costs.num_states += one.num_states
            costs.size_bytes += HEADER_BYTES + 4 * len(tokens.windows) + one.num_states * target.codec.code_size_bytes
            costs.size_bytes += len(one.passage.text.encode()) if target.stores_text else 0
            if len(sample) < SAMPLE_PASSAGES:
                sample.append(tokens)
            elif (at := chance.randrange(costs.num_passages)) < SAMPLE_PASSAGES:
                sample[at] = tokens
        costs.num_tokens += sum(lengths)
        padded = sum(lengths[rows[0]] * len(rows) for rows in encoder.limits.plan(lengths))
        costs.num_padding_tokens += padded - sum(lengths)
        report.add(batch, encoder.settings.max_passage_tokens)
        if stop is not None and stop.is_set():
            report.interrupted = True
            break
    costs.num_sample_tokens, seconds = _measure(sample, encoder, target.compression_ratio)
    if seconds:
        costs.tokens_per_second = costs.num_sample_tokens / seconds
        costs.seconds = costs.num_tokens / costs.tokens_per_second
    report.seconds = time.monotonic() - begun
    return costs


def _measure(sample: list[Tokenized], encoder: PassageEncoder, ratio: int) -> tuple[int, float]:
    """Tokens encoded and seconds they took, the first pass (which warms up) left out where there are more."""
    windows = [window for tokens in sample for window in tokens.windows]
    batches = encoder.limits.plan([len(window) for window in windows])
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
