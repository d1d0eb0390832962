"""Bytes of a collection at each stored ratio and codec, from how many tokens its passages have. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache.codecs import Codec
from cache.collection import Collection
from cache.record import Record, record_bytes
from encoder_worker.passage_encoder import PassageEncoder
from tuning.progress import SILENT, Progress

STAGE = "count (passages)"
_BATCH = 1024


@dataclass(frozen=True)
class Lengths:
    """Tokens of every window of every passage of the collection."""

    windows: list[tuple[int, ...]]

    @property
    def num_passages(self) -> int:
        return len(self.windows)

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.windows))

    def num_states(self, ratio: int) -> int:
        return sum(-(-tokens // ratio) for windows in self.windows for tokens in windows)


@dataclass(frozen=True)
class Size:
    """Of one stored ratio and codec. Texts are not counted: whether they are kept is another choice."""

    bytes_per_passage: float  # mean of the stored records
    bytes_per_token: float  # of passage text, states alone
    collection_bytes: int  # all records and the codec's table
    num_passages: int


def size_of(lengths: Lengths, ratio: int, codec: Codec) -> Size:
    """What the collection's records take, header and window lengths included."""
    num_bytes = sum(
        record_bytes(sum(-(-tokens // ratio) for tokens in windows), codec.code_size_bytes, len(windows))
        for windows in lengths.windows
    )
    return Size(
        num_bytes / max(1, lengths.num_passages),
        lengths.num_states(ratio) * codec.code_size_bytes / max(1, lengths.num_tokens),
        num_bytes + len(codec.table()),
        lengths.num_passages,
    )


def of_texts(
    encoder: PassageEncoder, texts: Sequence[str], *, split: bool = False, progress: Progress = SILENT
) -> Lengths:
    """By tokenizing them; nothing is encoded. Empty texts are not stored."""
    progress.begin(STAGE, len(texts))
    windows: list[tuple[int, ...]] = []
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        windows += [one.window_tokens for one in encoder.tokenize(part, split=split) if one.failed is None]
        progress.advance(STAGE, len(part))
    return Lengths(windows)


def of_stored(collection: Collection, progress: Progress = SILENT) -> Lengths:
    """From what is stored; states are not decoded."""
    progress.begin(STAGE, collection.stats().num_passages)
    windows = []
    for _, record in collection.store.scan(collection.name):
        if isinstance(record, Record):
            windows.append(record.window_tokens)
        progress.advance(STAGE, 1)
    return Lengths(windows)
