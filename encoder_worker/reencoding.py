"""A collection under a table that is trained again: what the old one had cut comes from the kept texts.

Passages go to a new collection, whose table learns from a random sample of them; the old one serves until names move.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import xxhash

from cache.codecs import Codec
from cache.collection import Collection
from cache.errors import CollectionExists, CollectionNotFound
from cache.manifest import Manifest
from cache.record import Record
from cache.states import PassageStates
from encoder_worker.config import PipelineLimits
from encoder_worker.indexing import IndexReport
from encoder_worker.passage_encoder import PassageEncoder, Tokenized
from encoder_worker.reading import ReadBatch
from encoder_worker.sources import Place, SourcePassage
from encoder_worker.writing import Target, Upsert, WriteGroup, held

_CHUNK_PASSAGES = 256
_MAX_PASSES = 5  # over a collection that is written to meanwhile


class _Successor(Target):
    """The collection that takes the passages over: made when its codec's table can be trained, or there already."""

    allow_clipped = True  # the new table was trained on a sample of just these passages

    def __init__(self, source: Collection, name: str, codec: str) -> None:
        old = source.manifest
        self.store, self.name = source.store, name
        self.compression_ratio, self.stores_text = old.compression_ratio, old.stores_text
        self._manifest = partial(Manifest.of, old, collection=name)
        manifest = self.store.read_manifest(name)
        if manifest is None:
            self.codec = Codec(codec, old.dim)
            return
        same = ("fingerprint", "compression_ratio", "stores_text")
        if manifest.codec != codec or any(getattr(manifest, one) != getattr(old, one) for one in same):
            raise CollectionExists(f"collection: {name!r} exists and is no copy of {old.collection!r}")
        self.collection = Collection(self.store, manifest)
        self.codec = self.collection.codec


def reencode(
    source: Collection,
    into: str,
    codec: str,
    load: Callable[[], PassageEncoder],
    *,
    move_names: bool = True,
    stop: threading.Event | None = None,
    on_progress: Callable[[int, int], None] = lambda num_done, num_passages: None,
    limits: PipelineLimits | None = None,
) -> "Reencoding":
    """Writes every passage into the collection `into`; when all are there the name and aliases of `source` mean it.

    A passage of which the old table cut something is encoded from its text, by the encoder that wrote it, which `load`
    opens then; what it did not cut is decoded, and so is what has no text, whose count of cut numbers then stays.
    Running it again goes on where it was interrupted. `on_progress` gets the passages done, and how many there are.
    Raises CollectionExists where `into` is something else, StoreLocked where another process writes it, EncoderMismatch
    where the encoder is not the collection's, CodecError for too few states to train the codec on, CacheError where the
    store failed.
    """
    stop = stop or threading.Event()
    with held(partial(_Successor, source, into, codec)) as target:
        assert target is not None
        run = Reencoding(source, target, load, stop, on_progress, limits or PipelineLimits(), IndexReport(into))
        run.run(move_names=move_names)
    return run


@dataclass
class Reencoding:
    """A run, and what became of it."""

    source: Collection
    target: Target  # the new one
    load: Callable[[], PassageEncoder]
    stop: threading.Event
    on_progress: Callable[[int, int], None]
    limits: PipelineLimits
    report: IndexReport
    num_passages: int = 0
    num_from_texts: int = 0  # of the stored ones
    needs_input: list[str] = field(default_factory=list)  # cut, and without a text: as they were
    damaged: list[str] = field(default_factory=list)  # left out
    moved_names: list[str] = field(default_factory=list)
    overtaken: bool = False  # the source was written to during every pass: not all of it is taken over
    complete: bool = False

    def run(self, *, move_names: bool) -> None:
        """Takes the passages over until the source stays as it is, and then its names."""
        store, source, stop = self.source.store, self.source, self.stop
        for _ in range(_MAX_PASSES):
            generation = store.generation(source.storage_name)
            self.take_over()
            if stop.is_set() or store.generation(source.storage_name) == generation:
                break
        else:
            self.overtaken = True
        self.report.num_values = self.report.num_states * self.target.codec.dim
        self.report.interrupted = stop.is_set()
        self.complete = not stop.is_set() and not self.overtaken and not self.report.num_refused
        if self.complete and move_names and self.target.collection is not None:
            self._move_names(self.target.collection.name)

    def _move_names(self, into: str) -> None:
        store, source = self.source.store, self.source
        if store.read_manifest(source.name) != source.manifest:
            meanwhile = f"was renamed or dropped meanwhile; its passages are in {into!r}, and no name was moved"
            raise CollectionNotFound(f"collection: {source.name!r} {meanwhile}")
        aliases = (alias for alias, name in sorted(store.aliases().items()) if name == source.name)
        for name in dict.fromkeys([*aliases, source.name]):
            store.set_alias(name, into, shadowing=True)
            self.moved_names.append(name)

    def take_over(self) -> None:
        """Every passage that the target does not hold as it is now; then drops there what the source lost."""
        scan = self.source.store.scan(self.source.storage_name)
        # In the order of a hash: the first of them are a fair sample to train on, the same in every run.
        ids = sorted((one for one, _ in scan), key=lambda one: xxhash.xxh3_64_intdigest(one.encode()))
        self.num_passages, self.needs_input, self.damaged = len(ids), [], []
        group = WriteGroup()
        for start in range(0, len(ids), _CHUNK_PASSAGES):
            if self.stop.is_set():
                break
            for upsert in self._chunk(ids[start : start + _CHUNK_PASSAGES]):
                group.add(upsert)
                if group.is_full(self.limits, self.target):
                    self._write(group)
                    group = WriteGroup()
            self.on_progress(min(start + _CHUNK_PASSAGES, len(ids)), len(ids))
        # A codec is not trained on the few states of an interrupted run, because its table would stay.
        if group.upserts and not (self.stop.is_set() and self.target.num_training_states):
            self._write(group)
        if not self.stop.is_set() and (target := self.target.collection) is not None:
            gone = {passage_id for passage_id, _ in target.store.scan(target.storage_name)} - set(ids)
            target.delete_many(sorted(gone))

    def _write(self, group: WriteGroup) -> None:
        group.write(self.target, self.limits)
        self.report.add(ReadBatch(group.upserts), 0)

    def _chunk(self, ids: Sequence[str]) -> Iterator[Upsert]:
        """Passages with the states to write."""
        records = self.source.store.get_many(self.source.storage_name, ids)
        held = [None] * len(ids) if self.target.collection is None else self.target.collection.digests(ids)
        todo: list[tuple[Upsert, Tokenized]] = []
        for passage_id, record, states, digest in zip(ids, records, self.source.get_many(ids), held, strict=True):
            if record is None or states is None:  # deleted meanwhile
                continue
            if not isinstance(record, Record) or not isinstance(states, PassageStates):
                self.damaged.append(passage_id)
                continue
            # Records of version 1 do not tell, so of a codec that cuts all of them may be.
            cut = self.source.codec.needs_training and (record.header.num_clipped > 0 or record.header.version == 1)
            if cut and record.text is None:
                self.needs_input.append(passage_id)
            if digest == record.header.text_digest:
                continue
            upsert = Upsert(SourcePassage(passage_id, record.text or "", Place(self.source.name, 0)))
            if cut and record.text is not None:
                (tokenized,) = self._encoder.tokenize([record.text], split=len(record.window_tokens) > 1)
                todo.append((upsert, tokenized))
            else:
                upsert.take(states)
                upsert.num_clipped_before = record.header.num_clipped
                yield upsert
        texts, ratio = [tokens for _, tokens in todo], self.target.compression_ratio
        for i, encoded in self._encoder.encode_all(texts, ratio) if todo else ():
            if self.stop.is_set():
                return
            upsert, _ = todo[i]
            if upsert.take(encoded):
                self.num_from_texts += 1
                yield upsert
            else:
                self.report.add(ReadBatch([upsert]), 0)

    @cached_property
    def _encoder(self) -> PassageEncoder:
        encoder = self.load()
        fingerprint, checkpoint = encoder.identity.fingerprint, encoder.identity.checkpoint
        Collection.open(self.source.store, self.source.name, fingerprint=fingerprint, checkpoint=checkpoint)
        return encoder
