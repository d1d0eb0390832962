"""The collection an index run writes to: found as it is, or made when the first states are there.

Does not know sources or tokens.

One group of passages into a collection; those it will not have cost only themselves. Blocks on the store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cache import DEFAULT_CODEC
from cache.codecs import Codec
from cache.collection import Collection, StoredPassage
from cache.errors import CollectionExists, CollectionNotFound, InvalidPassage, OutOfRange, StoreLocked, StoreUnavailable
from cache.manifest import Manifest
from cache.record import check_name
from cache.store import Store
from checkpoint import CheckpointSettings, EncoderIdentity


@dataclass(frozen=True)
class CollectionSettings:
    """How to make a collection that does not exist yet; None leaves it to the checkpoint or the default.

    On a collection that exists they must agree with it wherever they are not None.
    """

    compression_ratio: int | None = None
    codec: str | None = None
    stores_text: bool | None = None

    def __post_init__(self) -> None:
        if self.compression_ratio is not None and self.compression_ratio < 1:
            raise ValueError(f"compression_ratio is {self.compression_ratio}; expected at least 1")


class Target:
    """A collection by name or alias, existing or still to be made.

    Raises:
        EncoderMismatch: another encoder wrote it.
        CollectionExists: it was made with other settings than asked for.
        CodecError, InvalidName: settings no collection can have.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        wanted: CollectionSettings,
        identity: EncoderIdentity,
        defaults: CheckpointSettings,
    ) -> None:
        self.store = store
        self.name = check_name("collection", name)
        self._identity = identity
        self.collection: Collection | None = None
        try:
            self.collection = Collection.open(
                store, name, fingerprint=identity.fingerprint, checkpoint=identity.checkpoint
            )
        except CollectionNotFound:
            self.compression_ratio = wanted.compression_ratio or defaults.default_compression_ratio
            self.codec = Codec(wanted.codec or DEFAULT_CODEC, identity.dim)
            self.stores_text = wanted.stores_text is not False
        else:
            manifest = self.collection.manifest
            self.compression_ratio = manifest.compression_ratio
            self.codec = self.collection.codec
            self.stores_text = manifest.stores_text
            _check_agreement(manifest, wanted)

    @property
    def num_training_states(self) -> int:
        """States to hold back until the codec can be trained; 0 when the collection is there or none is needed."""
        return 0 if self.collection is not None else num_training_states(self.codec)

    def create(self, sample: NDArray[np.float32] | None) -> Collection:
        """Makes the collection, its codec trained on `sample` (num_states, dim) where it needs that.

        Raises:
            CodecError: the sample is too small.
        """
        if self.collection is None:
            if self.codec.needs_training:
                self.codec.train(sample if sample is not None else np.empty((0, self._identity.dim), np.float32))
            manifest = Manifest.of(
                self._identity,
                collection=self.name,
                compression_ratio=self.compression_ratio,
                codec=self.codec.factory,
                codec_table=self.codec.table(),
                stores_text=self.stores_text,
            )
            # exist_ok: another run may have made the same one meanwhile.
            self.collection = Collection.create(self.store, manifest, exist_ok=True)
        return self.collection

    def digests(self, passage_ids: Sequence[str]) -> list[bytes | None]:
        """Digest of the text each id is stored with, or None."""
        return self.collection.digests(passage_ids) if self.collection is not None else [None] * len(passage_ids)

    def stored_truncated(self, passage_ids: Sequence[str]) -> list[bool]:
        """Which of the stored passages were cut when they were encoded."""
        if self.collection is None or not self.collection.stats().num_truncated:
            return [False] * len(passage_ids)
        headers = self.store.headers_many(self.collection.name, passage_ids)
        return [header is not None and header.truncated for header in headers]


def num_training_states(codec: Codec) -> int:
    """States a codec is trained on where there are as many; 0 where it needs none.

    64 points for each centroid of a product or residual quantizer (FAISS asks for 39 and uses 256).
    """
    return max(8192, 64 * codec.num_centroids, codec.min_training_states) if codec.needs_training else 0


def _check_agreement(manifest: Manifest, wanted: CollectionSettings) -> None:
    for name in ("compression_ratio", "codec", "stores_text"):
        asked, there = getattr(wanted, name), getattr(manifest, name)
        if asked is not None and asked != there:
            raise CollectionExists(
                f"collection {manifest.collection!r} exists with {name} {there!r}, asked for {asked!r}; "
                "index into a new collection and move an alias to it"
            )


log = logging.getLogger(__name__)


@dataclass
class Written:
    """Outcome of a group, by passage id: why it was refused, or how many of its numbers lie outside the codec's
    trained range; 0 of them is left out."""

    refused: dict[str, str] = field(default_factory=dict)
    clipped: dict[str, int] = field(default_factory=dict)
    out_of_range: set[str] = field(default_factory=set)  # of the refused: the codec was not trained for them


def put(
    collection: Collection,
    passages: Sequence[StoredPassage],
    retry_seconds: Sequence[float] = (),
    *,
    allow_clipped: bool = False,
) -> Written:
    """Stores passages (ids are distinct) in one durable write; all but the refused ones are stored.

    Args:
        retry_seconds: pauses before trying a store again that did not answer.
        allow_clipped: store also what the codec was not trained for.

    Raises:
        CacheError: the store failed.
    """
    written = Written()
    pauses = iter(retry_seconds)
    while len(written.refused) < len(passages):
        rest = [passage for passage in passages if passage.passage_id not in written.refused]
        try:
            clipped = collection.put_many(rest, allow_clipped=allow_clipped)
            written.clipped = {one.passage_id: num for one, num in zip(rest, clipped, strict=True) if num}
            break
        except InvalidPassage as exc:
            written.refused[exc.passage_id] = exc.reason
        except OutOfRange as exc:
            written.refused |= exc.reasons
            written.out_of_range |= exc.reasons.keys()
        except (StoreUnavailable, StoreLocked) as exc:
            pause = next(pauses, None)
            if pause is None:
                raise
            log.warning("%s; trying again in %g s", exc, pause)
            time.sleep(pause)
    return written
