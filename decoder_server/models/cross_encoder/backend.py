"""The cross_encoder backend: query and passage read together, as text; margins in padded batches by token budget."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from checkpoint.files import CheckpointError, one_line
from decoder_server.models.backend import TextSettings, sigmoid
from decoder_server.models.cross_encoder.files import CheckpointFiles
from decoder_server.models.cross_encoder.profiles import Padding
from decoder_server.models.cross_encoder.templates import TextPair, TextPrompt, Texts

# Padded tokens per pass, by device: above it a pass is no faster per token.
BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
# Texts tokenized at a time, so that a long list never stands in memory as tokens all at once.
CHUNK_TEXTS = 1024
# Padding may add at most this share to a batch's real tokens: dense layers compute it too.
MAX_PADDING = 0.25


class Runner(Protocol):
    """Loaded weights. Called from one thread only."""

    dtype_name: str
    device_name: str

    def margins(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]: ...  # (len(pairs),) of one padded pass


class CrossEncoder:
    """Weights with the profile they are read by. Scoring is for one thread; all else is safe from any."""

    name = "cross_encoder"
    num_compilations = 0

    def __init__(self, source: CheckpointFiles, runner: Runner, *, checkpoint_name: str, runtime: str) -> None:
        self.profile = profile = source.profile
        self.listwise = profile.listwise
        self.checkpoint_name = checkpoint_name  # as it was opened
        self.runtime = runtime  # torch, onnx or onnx-int8
        self.dtype_name, self.device_name = runner.dtype_name, runner.device_name
        limits = "; not for commercial use" if "-NC" in profile.license else ""
        notice = f"{checkpoint_name} is under the licence {profile.license}{limits}"
        self.notice = notice if profile.license else ""
        most = profile.max_passage_tokens or profile.max_tokens
        self.settings = TextSettings(profile.default_instruction, most, profile.max_query_tokens)
        self._source, self._reader, self._runner = source, source.reader, runner

    @cached_property
    def fingerprint(self) -> str:
        """Of weights, tokenizer, configuration and profile; reads the weights the first time."""
        return self._source.fingerprint()

    def identity(self) -> None: ...  # it reads no states

    def prompt(self, query: str, instruction: str | None = None) -> TextPrompt:
        return self._reader.prompt(query, instruction)

    def read(self, texts: Sequence[Texts]) -> list[TextPair]:
        """Pairs of any queries, instructions and passages; ValueError where one does not fit."""
        return self._reader.read(texts)

    def is_empty(self, text: str) -> bool:
        return self._reader.is_empty(text)

    def pairs(self, prompt: TextPrompt, passages: Sequence[str]) -> list[list[TextPair]]:
        """Per passage one pair; ValueError where query and instruction leave no room for a passage."""
        return [[pair] for pair in self._reader.pairs([(prompt, passage) for passage in passages])]

    def cut(self, text: str, max_tokens: int | None = None, *, keep_end: bool = False) -> str:
        """A text's beginning, or end, of at most `max_tokens` (None: as many as a passage may have)."""
        return self._reader.cut(text, max_tokens or self.settings.max_passage_tokens, keep_end=keep_end)[0]

    def score(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        """Margins (len(pairs),) of one padded pass; NaN where not finite."""
        if not pairs:
            return np.empty(0, dtype=np.float32)
        margins = self._runner.margins(pairs)
        return np.where(np.isfinite(margins), margins, np.float32("nan"))

    def score_texts(self, texts: Sequence[Texts], max_batch_tokens: int | None = None) -> NDArray[np.float32]:
        """Margins (len(texts),); pairs of like length share a pass of `max_batch_tokens`, or as suits the device."""
        if self.listwise:  # one list is one pass, whatever its length
            return self.score(self.read(texts))
        budget = max_batch_tokens or BATCH_TOKENS[self.device_name.split(":")[0]]
        margins = np.empty(len(texts), dtype=np.float32)
        for first in range(0, len(texts), CHUNK_TEXTS):
            pairs = self.read(texts[first : first + CHUNK_TEXTS])
            for batch in batches([pair.num_tokens for pair in pairs], budget):
                margins[[first + i for i in batch]] = self.score([pairs[i] for i in batch])
        return margins

    def activation(self, margins: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores as the model publishes them, computed in float32."""
        margins, profile = np.asarray(margins, dtype=np.float32), self.profile
        return margins if profile.activation == "identity" else sigmoid(margins / np.float32(profile.temperature))

    def bounded(self, margins: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores in 0..1 for interfaces that demand them, in the order of the margins.
        The published activation where that is a sigmoid; else a sigmoid of the margin, which is no probability; of a
        listwise cosine its half above a half.
        """
        margins = np.asarray(margins, dtype=np.float32)
        if self.listwise:
            return ((1 + margins) / 2).clip(0, 1)
        return self.activation(margins) if self.profile.activation == "sigmoid" else sigmoid(margins)

    def activate(self, margin: float) -> float:
        """In 0..1 for every model, as the wire promises; some publish the bare logit, which is the margin."""
        return float(self.bounded(np.array([margin], dtype=np.float32))[0])

    def first_pass(self) -> NDArray[np.float32]:
        """The margin of one real pair, (1,); CheckpointError where what was loaded cannot be computed with."""
        try:
            return self.score_texts([("Does this model answer?", None, "It gives a number for every pair.")])
        except (RuntimeError, KeyError, IndexError, TypeError, AttributeError, ValueError) as exc:
            raise CheckpointError(f"{self.checkpoint_name}: the first forward pass failed ({one_line(exc)})") from exc

    def warm_up(self) -> None:
        if not np.isfinite(self.first_pass()).all():
            raise CheckpointError(f"{self.checkpoint_name}: the first forward pass gave no finite margin")


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences by length, in batches of at most `max_tokens` padded tokens (one sequence at least)."""
    batch: list[int] = []
    real = 0  # tokens in the batch
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        longest = lengths[index]  # sorted, so the longest so far
        padded = (len(batch) + 1) * longest
        if batch and (padded > max_tokens or padded > (1 + MAX_PADDING) * (real + longest)):
            yield batch
            batch, real = [], 0
        batch.append(index)
        real += longest
    if batch:
        yield batch


def pad(
    rows: Sequence[Sequence[int]], types: Sequence[Sequence[int] | None] | None = None, *, side: Padding, pad_id: int
) -> dict[str, NDArray[np.int64]]:
    """A model's possible inputs, (batch, longest) each; of `position_ids` a row's first real token is at 0."""
    length = max(len(row) for row in rows)
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    mask, type_ids = np.zeros_like(ids), np.zeros_like(ids)
    for i, (row, kinds) in enumerate(zip(rows, types or [None] * len(rows), strict=True)):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
        if kinds is not None:
            type_ids[i, where] = kinds
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": type_ids, "position_ids": positions}
