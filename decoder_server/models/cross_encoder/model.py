"""Pairs to padded batches: sorted by length, filled by a token budget. Pure arithmetic; knows no model.

The seam between what a model reads and how it is computed: padded token ids in, margins out.

A loaded cross-encoder: texts in, margins out, in batches by token budget. Does not know requests or servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from checkpoint.files import CheckpointError
from decoder_server.models.cross_encoder.files import one_line
from decoder_server.models.cross_encoder.profiles import Profile
from decoder_server.models.cross_encoder.templates import PairReader, Question, TextPair, Texts

# Padding may add at most this share to a batch's real tokens: dense layers compute it too.
MAX_PADDING = 0.25


class Sized(Protocol):
    @property
    def num_tokens(self) -> int: ...


def batches(items: Sequence[Sized], max_tokens: int) -> Iterator[list[int]]:
    """Indices of `items` by length, in batches of at most `max_tokens` padded tokens (one item at least)."""
    batch: list[int] = []
    real = 0
    for index in sorted(range(len(items)), key=lambda i: items[i].num_tokens):
        longest = items[index].num_tokens  # sorted, so the longest so far
        padded = (len(batch) + 1) * longest
        if batch and (padded > max_tokens or padded > (1 + MAX_PADDING) * (real + longest)):
            yield batch
            batch, real = [], 0
        batch.append(index)
        real += longest
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Padded:
    """Rows of one length."""

    ids: NDArray[np.int64]  # (batch, length)
    mask: NDArray[np.int64]  # (batch, length), 1 where a token is real
    type_ids: NDArray[np.int64]  # (batch, length)
    positions: NDArray[np.int64]  # (batch, length), each row's first real token at 0


def pad(
    rows: Sequence[Sequence[int]],
    types: Sequence[Sequence[int] | None],
    *,
    side: Literal["left", "right"],
    pad_id: int,
) -> Padded:
    """Pads rows to the longest."""
    length = max(len(row) for row in rows)
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    mask, type_ids = np.zeros_like(ids), np.zeros_like(ids)
    for i, (row, kinds) in enumerate(zip(rows, types, strict=True)):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
        if kinds is not None:
            type_ids[i, where] = kinds
    return Padded(ids, mask, type_ids, np.maximum(mask.cumsum(1) - 1, 0))


class Runner(Protocol):
    """Loaded weights. Called from one thread only."""

    dtype_name: str
    device_name: str

    def margins(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        """Margins (len(pairs),) of one padded pass, as the arithmetic gives them."""
        ...


# Padded tokens per pass, by device: above it a pass is no faster per token.
BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
# Texts tokenized at a time, so that a long list never stands in memory as tokens all at once.
CHUNK_TEXTS = 1024


class CrossEncoder:
    """Weights with the profile they are read by. Scoring is for one thread; `pair` is safe from any."""

    name = "cross_encoder"

    def __init__(
        self,
        reader: PairReader,
        runner: Runner,
        profile: Profile,
        *,
        model: str,
        runtime: str,
        fingerprint: Callable[[], str],
    ) -> None:
        self.profile = profile
        self.model = model  # as it was opened
        self.runtime = runtime  # torch, onnx or onnx-int8
        self._reader, self._runner, self._fingerprint = reader, runner, fingerprint

    @property
    def settings(self) -> Profile:
        """Limits and default instruction."""
        return self.profile

    @property
    def max_tokens(self) -> int:
        """Of template, query, instruction and passage together; for a listwise model of all passages."""
        return self.profile.max_tokens

    @property
    def dtype_name(self) -> str:
        return self._runner.dtype_name

    @property
    def device_name(self) -> str:
        return self._runner.device_name

    @cached_property
    def identity(self) -> str:
        """Weights, tokenizer, configuration and profile in one fingerprint; reads the weights the first time."""
        return self._fingerprint()

    @property
    def license_notice(self) -> str:
        """What a user of this model should be told; empty where its profile names no licence."""
        if not self.profile.license:
            return ""
        limits = "; not for commercial use" if "-NC" in self.profile.license else ""
        return f"{self.model} is under the licence {self.profile.license}{limits}"

    def question(self, query: str, instruction: str | None = None) -> Question:
        """Query and instruction as every passage meets them; safe from any thread.

        Raises:
            ValueError: an instruction over its limit.
        """
        return self._reader.question(query, instruction)

    def pair(self, query: str, instruction: str | None, passage: str) -> TextPair:
        """Token ids as the model reads them; safe from any thread.

        Raises:
            ValueError: an instruction over its limit, or a query that leaves no room for a passage.
        """
        return self._reader.pairs([(query, instruction, passage)])[0]

    def pairs(self, texts: Sequence[Texts]) -> list[TextPair]:
        """`pair` for many, which is faster."""
        return self._reader.pairs(texts)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text alone; safe from any thread."""
        return self._reader.tokenizers.count(text)

    def is_empty(self, text: str) -> bool:
        """Whether a passage's text adds no token to a pair; safe from any thread."""
        return self._reader.is_empty(text)

    def cut(self, text: str, max_tokens: int | None = None, *, keep_end: bool = False) -> str:
        """A text's beginning, or end, of at most `max_tokens` (None: what a passage may have); safe from any thread."""
        most = max_tokens or self.profile.max_passage_tokens or self.profile.max_tokens
        return self._reader.tokenizers.cut(text, most, keep_end=keep_end)

    def score_pairs(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        """Margins (len(pairs),) of one padded pass; NaN where not finite."""
        if not pairs:
            return np.empty(0, dtype=np.float32)
        margins = self._runner.margins(pairs)
        return np.where(np.isfinite(margins), margins, np.float32("nan"))

    def score_texts(self, texts: Sequence[Texts], max_batch_tokens: int | None = None) -> NDArray[np.float32]:
        """Margins (len(texts),) in the order of `texts`: pairs of like length share a pass.

        Args:
            texts: (query, instruction or None, passage).
            max_batch_tokens: padded tokens per pass; None: as suits the device.
        """
        if self.profile.listwise:  # one list is one pass, whatever its length
            return self.score_pairs(self.pairs(texts))
        budget = max_batch_tokens or BATCH_TOKENS[self.device_name.split(":")[0]]
        margins = np.empty(len(texts), dtype=np.float32)
        for first in range(0, len(texts), CHUNK_TEXTS):
            pairs = self.pairs(texts[first : first + CHUNK_TEXTS])
            for batch in batches(pairs, budget):
                margins[[first + i for i in batch]] = self.score_pairs([pairs[i] for i in batch])
        return margins

    def activation(self, margins: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores as the model publishes them, computed in float32."""
        margins = np.asarray(margins, dtype=np.float32)
        if self.profile.activation == "identity":
            return margins
        return sigmoid(margins / np.float32(self.profile.temperature))

    def bounded(self, margins: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores in 0..1 for interfaces that demand them, in the order of the margins.

        The published activation where that is a sigmoid; else a sigmoid of the margin, which is no probability; of a
        listwise cosine its half above a half.
        """
        margins = np.asarray(margins, dtype=np.float32)
        if self.profile.listwise:
            return ((1 + margins) / 2).clip(0, 1)
        return self.activation(margins) if self.profile.activation == "sigmoid" else sigmoid(margins)

    def first_pass(self) -> NDArray[np.float32]:
        """The margin of one real pair, (1,).

        Raises:
            CheckpointError: configuration and weights load, and cannot be computed with.
        """
        try:
            return self.score_texts([("Does this model answer?", None, "It gives a number for every pair.")])
        except (RuntimeError, KeyError, IndexError, TypeError, AttributeError, ValueError) as exc:
            raise CheckpointError(f"{self.model}: the first forward pass failed ({one_line(exc)})") from exc

    def warm_up(self) -> None:
        """One real pass.

        Raises:
            CheckpointError: as first_pass, or the weights give no finite margin.
        """
        if not np.isfinite(self.first_pass()).all():
            raise CheckpointError(f"{self.model}: the first forward pass gave no finite margin")


def sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
