"""Encoded passages into a collection: found as it is, or made when the first states are there."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from cache import DEFAULT_CODEC, errors
from cache.codecs import Codec
from cache.collection import Collection, StoredPassage
from cache.manifest import Manifest
from cache.record import check_name
from cache.states import AnyStates, PassageStates
from cache.store import Store
from encoder_worker.config import CollectionSettings, PipelineLimits
from encoder_worker.passage_encoder import Encoded, EncodingFailed, PassageEncoder, Tokenized
from encoder_worker.sources import Reason, Refused, SourcePassage

T = TypeVar("T", bound="Target")

_WAIT_SECONDS = 1.0

log = logging.getLogger(__name__)

ENCODED_STATES = 1024  # that a group holds as float32 before the codec encodes them


@dataclass(eq=False, slots=True)
class Upsert:
    """One passage on its way: it ends refused, unchanged (stored before with the same text) or encoded and stored."""

    passage: SourcePassage
    refused: Refused | None = None
    tokenized: Tokenized | None = None  # None: nothing to encode
    states: AnyStates | None = None  # until they are stored
    num_states: int = 0  # 0: not encoded
    num_clipped_before: int = 0  # numbers that another codec had cut before the states were read back
    num_clipped: int = 0  # numbers outside what the codec was trained for
    stored: bool = False

    @property
    def finished(self) -> bool:
        return self.stored or self.refused is not None or (self.tokenized is None and self.states is None)

    def refuse(self, reason: Reason, message: str) -> None:
        self.refused = Refused(self.passage.place, self.passage.passage_id, reason, message)
        self.states = None

    def take(self, states: Encoded) -> bool:
        """Whether there are states to store; without them it is refused."""
        if isinstance(states, EncodingFailed):
            self.refuse(Reason(states.reason), str(states))
            return False
        self.states, self.num_states = states, states.num_states
        return True

    def to_store(self) -> StoredPassage:
        assert self.states is not None
        passage = self.passage
        return StoredPassage(
            passage.passage_id, self.states, passage.text, self.num_clipped_before, num_clipped=self.num_clipped
        )


class Target:
    """A collection by name or alias, existing or still to be made; `alias` is to be pointed at it in the end.

    Raises EncoderMismatch where another encoder wrote it, CollectionExists where it was made with other settings than
    asked for or the alias is a collection's name, CodecError and InvalidName for what no collection can have.
    """

    collection: Collection | None = None
    check_lease: Callable[[], None] = staticmethod(lambda: None)  # StoreLocked where another writer took over
    num_trained: int = 0  # states that the codec was trained on here
    allow_clipped: bool = False  # store also what the codec was not trained for
    _manifest: Callable[..., Manifest]

    def __init__(
        self, store: Store, name: str, settings: CollectionSettings, encoder: PassageEncoder, alias: str | None = None
    ) -> None:
        self.store, self.name, identity = store, check_name("collection", name), encoder.identity
        if alias is not None and (check_name("alias", alias) == name or alias in store.list_collections()):
            raise errors.CollectionExists(
                f"alias: {alias!r} is the name of a collection; "
                "expected another name, or rename that collection (`preread collection rename`)"
            )
        try:
            found = Collection.open(store, name, fingerprint=identity.fingerprint, checkpoint=identity.checkpoint)
        except errors.CollectionNotFound:
            self.compression_ratio = settings.compression_ratio or encoder.settings.default_compression_ratio
            self.codec = Codec(settings.codec or DEFAULT_CODEC, identity.dim)
            self.stores_text = settings.stores_text is not False
            self._manifest = partial(Manifest.of, identity, collection=name)
            return
        for field_name in ("compression_ratio", "codec", "stores_text"):
            asked, there = getattr(settings, field_name), getattr(found.manifest, field_name)
            if asked is not None and asked != there:
                raise errors.CollectionExists(
                    f"collection {found.name!r} exists with {field_name} {there!r}, asked for {asked!r}; "
                    "index into a new collection and move an alias to it"
                )
        self.collection, self.codec = found, found.codec
        self.compression_ratio, self.stores_text = found.manifest.compression_ratio, found.manifest.stores_text

    @property
    def held_name(self) -> str:
        """The collection's own name, where it was opened by an alias."""
        return self.name if self.collection is None else self.collection.name

    @property
    def num_training_states(self) -> int:
        """States to hold back until the codec can be trained; 0 when the collection is there or none is needed."""
        return 0 if self.collection is not None else num_training_states(self.codec)

    def create(self, sample: Sequence[PassageStates] = ()) -> Collection:
        """Makes the collection, its codec trained on the sample where needed. CodecError if that is too small."""
        if self.collection is None:
            if self.codec.needs_training:
                states = np.concatenate([np.empty((0, self.codec.dim), np.float32), *(one.states for one in sample)])
                self.codec.train(states)
                self.num_trained = len(states)
            codec, table = self.codec.factory, self.codec.table()
            manifest = self._manifest(
                compression_ratio=self.compression_ratio, codec=codec, codec_table=table, stores_text=self.stores_text
            )
            # exist_ok: another run may have made the same one meanwhile.
            self.collection = Collection.create(self.store, manifest, exist_ok=True)
        return self.collection


@contextmanager
def held(
    make: Callable[[], T], *, shared: bool = False, wait_until: threading.Event | None = None
) -> Iterator[T | None]:
    """The target that `make` opens, held for writing: alone, or next to other `shared` ones.

    With `wait_until` waits for another writer to end; None where the event was set before. Raises StoreLocked, naming
    that writer, and what `make` raises, before anything is written.
    """
    target, told = make(), ""
    with ExitStack() as lease:
        while True:
            try:
                check = lease.enter_context(target.store.lease(target.held_name, shared=shared))
                break
            except errors.StoreLocked as exc:
                if wait_until is None:
                    raise
                if told != str(exc):
                    log.warning("waiting: %s", str(exc).rpartition("; ")[0])  # not: try again
                told = str(exc)
            if wait_until.wait(_WAIT_SECONDS):
                yield None
                return
        target = make()  # as the writer before has left it
        target.check_lease = check
        yield target


@dataclass
class WriteGroup:
    """Encoded passages of one durable write, so also what an interruption may cost."""

    upserts: list[Upsert] = field(default_factory=list)
    num_bytes: int = 0  # of their states as float32
    num_states: int = 0
    begun: float = field(default_factory=time.monotonic)
    _plain: list[Upsert] = field(default_factory=list)  # whose states the codec has not encoded
    _num_plain_states: int = 0

    def add(self, upsert: Upsert) -> None:
        assert isinstance(upsert.states, PassageStates)
        self.upserts.append(upsert)
        self.num_bytes += upsert.states.states.nbytes
        self.num_states += upsert.num_states
        self._plain.append(upsert)
        self._num_plain_states += upsert.num_states

    def take_plain(self, target: Target) -> list[Upsert]:
        """Upserts for `encode`, when they are some and the codec is trained."""
        if self._num_plain_states < ENCODED_STATES or target.num_training_states:
            return []
        plain, self._plain, self._num_plain_states = self._plain, [], 0
        return plain

    def is_full(self, limits: PipelineLimits, target: Target) -> bool:
        if held_back := target.num_training_states:
            return self.num_states >= held_back
        full = len(self.upserts) >= limits.group_passages or self.num_bytes >= limits.group_bytes
        return full or time.monotonic() - self.begun >= limits.group_seconds

    def write(self, target: Target, limits: PipelineLimits) -> None:
        """One durable write: every passage (ids are distinct) is then stored, or refused at its own cost.

        Raises CodecError for too few states to train the codec on, CacheError where the store failed.
        """
        target.check_lease()
        sample = (one.states for one in self.upserts)
        collection = target.create([states for states in sample if isinstance(states, PassageStates)])
        pauses = iter(limits.retry_seconds)
        while todo := {one.passage.passage_id: one for one in self.upserts if one.states is not None}:
            passages = [one.to_store() for one in todo.values()]
            try:
                clipped = collection.put_many(passages, allow_clipped=target.allow_clipped)
            except errors.InvalidPassage as exc:
                todo[exc.passage_id].refuse(Reason.NOT_STORABLE, exc.reason)
            except errors.OutOfRange as exc:
                for passage_id, message in exc.reasons.items():
                    todo[passage_id].refuse(Reason.OUT_OF_RANGE, message)
            except (errors.StoreUnavailable, errors.StoreLocked) as exc:
                pause = next(pauses, None)
                if pause is None:
                    raise
                log.warning("%s; trying again in %g s", exc, pause)
                time.sleep(pause)
            else:
                for one, num_clipped in zip(todo.values(), clipped, strict=True):
                    one.num_clipped, one.stored, one.states = num_clipped, True, None


def encode(upserts: Sequence[Upsert], target: Target) -> None:
    """Their states as the codec writes them, which take a fraction of the memory while a group gathers."""
    with suppress(errors.InvalidPassage):  # `write` finds it again, and refuses it
        passages = target.create().encode([one.to_store() for one in upserts])
        for one, passage in zip(upserts, passages, strict=True):
            one.states, one.num_clipped = passage.states, passage.num_clipped


def num_training_states(codec: Codec) -> int:
    """States a codec is trained on where there are as many; 0 where it needs none."""
    # 64 points for each centroid of a product or residual quantizer: FAISS asks for 39 and uses 256.
    return max(8192, 64 * codec.num_centroids, codec.min_training_states) if codec.needs_training else 0
