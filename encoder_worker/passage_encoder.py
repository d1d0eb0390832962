"""Texts to pooled states, in the steps that run on different threads: tokenize, plan batches, encode."""

import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cache.states import PassageStates, text_digest
from checkpoint import Checkpoint, EncoderIdentity
from encoder_worker.encoder import Encoder

log = logging.getLogger(__name__)

States = NDArray[np.float32]
TOKENIZE_TEXTS = 64  # at a time, so that a cancelled call is noticed in between
# Padded tokens of one pass, and how many may all be padding. A CPU runs at full rate far below; a GPU needs more to be
# busy, and a pass that is mostly launching kernels may as well carry padding.
_BATCH_TOKENS = {"cpu": (2048, 0), "cuda": (65_536, 4096)}


@dataclass(frozen=True)
class BatchLimits:
    """How large and how ragged a batch may be; a sequence over the limit goes alone."""

    max_batch_tokens: int  # padded, of one pass
    max_padding: float = 0.05  # share of a batch's tokens
    free_padding_tokens: int = 0  # batches up to this size may pad as they like

    def __post_init__(self) -> None:
        if self.max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {self.max_batch_tokens}; expected at least 1")
        if not 0 <= self.max_padding < 1:
            raise ValueError(f"max_padding is {self.max_padding}; expected 0 to below 1")

    @classmethod
    def for_device(cls, device_name: str, max_batch_tokens: int | None = None) -> "BatchLimits":
        """The defaults of a device (`cpu`, `cuda:0`), with another budget where one is given."""
        usual, free_padding_tokens = _BATCH_TOKENS.get(device_name.split(":")[0], _BATCH_TOKENS["cpu"])
        return cls(max_batch_tokens or usual, free_padding_tokens=free_padding_tokens)

    def plan(self, lengths: Sequence[int]) -> list[list[int]]:
        """Batches, longest first, of indices into `lengths`, each exactly once.

        Padding has a bound that no input breaks: a batch is closed when one more, shorter sequence would take it over
        `max_padding`. That costs little: lengths within about a tenth of each other always share, so at most some fifty
        batches of any plan are closed for raggedness.
        """
        batches: list[list[int]] = []
        padded_tokens = num_tokens = 0  # of the last batch
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batches:
                padded_tokens += lengths[batches[-1][0]]
                num_tokens += lengths[i]
                max_padding = self.max_padding * padded_tokens
                ragged = padded_tokens > self.free_padding_tokens and padded_tokens - num_tokens > max_padding
                if padded_tokens <= self.max_batch_tokens and not ragged:
                    batches[-1].append(i)
                    continue
            batches.append([i])
            padded_tokens = num_tokens = lengths[i]
        return batches


class EncodingFailed(Exception):  # noqa: N818 - says what happened
    """One sequence could not be encoded; `reason` is a constant for machines."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Tokenized:
    """One text as token windows: one, or several when it was split."""

    windows: "tuple[array[int], ...]"  # 4 bytes a token: lists of int take nine times that
    truncated: bool
    text_digest: bytes
    failed: EncodingFailed | None = None  # why there is nothing to encode

    @property
    def window_tokens(self) -> tuple[int, ...]:
        return tuple(map(len, self.windows))

    @property
    def num_tokens(self) -> int:
        return sum(self.window_tokens)

    def num_states(self, ratio: int) -> int:
        return sum(-(-num_tokens // ratio) for num_tokens in self.window_tokens)

    def join(self, windows: Mapping[int, States | EncodingFailed], ratio: int) -> "Encoded":
        """The passage out of its encoded windows by number, or why the first failing one failed."""
        if self.failed is not None:
            return self.failed
        encoded: list[States] = []
        for _, window in sorted(windows.items()):
            if isinstance(window, EncodingFailed):
                return window
            encoded.append(window)
        states = encoded[0] if len(encoded) == 1 else np.concatenate(encoded)
        return PassageStates(states, self.window_tokens, ratio, self.truncated, self.text_digest)


Encoded = PassageStates | EncodingFailed


class PassageEncoder:
    """A checkpoint's tokenizer and encoder. `tokenize` may run on any thread, `encode` on one at a time."""

    def __init__(self, checkpoint: Checkpoint, encoder: Encoder, limits: BatchLimits) -> None:
        self.identity: EncoderIdentity = checkpoint.identity
        self.dim = self.identity.dim
        self.settings = checkpoint.settings
        self.dtype_name, self.device_name = encoder.dtype_name, encoder.device_name
        self.limits = limits
        self._text, self._encoder = checkpoint.text, encoder

    @classmethod
    def load(
        cls,
        model: Checkpoint | str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        max_passage_tokens: int | None = None,
        max_batch_tokens: int | None = None,
        read_control_tokens: bool = False,
    ) -> "PassageEncoder":
        """Loads the encoder half of a checkpoint, which is opened here where `model` is its directory or hub id.

        Only then do these count: `max_passage_tokens` and `read_control_tokens` (in texts, as KaLM's own code does).
        Raises CheckpointError for files that cannot be used or a limit over the encoder's positions, ValueError for a
        device or dtype that is not to be had.
        """
        if not isinstance(model, Checkpoint):
            model = Checkpoint.open(model, max_passage_tokens=max_passage_tokens, neutralise=not read_control_tokens)
        encoder = Encoder(model, device=device, dtype=dtype)
        return cls(model, encoder, BatchLimits.for_device(encoder.device_name, max_batch_tokens))

    def is_empty(self, text: str) -> bool:
        """As TextTokenizer.is_empty; False where the tokenizer does not take the text."""
        try:
            return self._text.is_empty(text)
        except Exception:  # `tokenize` says so
            return False

    def why_not(self, text: str, max_bytes: int | None = None) -> str | None:
        """Why a text cannot be encoded, or None. May tokenize: off the event loop."""
        if max_bytes is not None and (num_bytes := len(text.encode())) > max_bytes:
            return f"text is {num_bytes:,} bytes; at most {max_bytes:,} are encoded"
        return "text is empty" if self.is_empty(text) else None

    def tokenize(self, texts: Sequence[str], *, split: bool = False) -> list[Tokenized]:
        """Texts under the passage template, cut at the limit or split into windows; one that is not read has failed."""
        try:
            tokenized = [Tokenized((), False, b"", EncodingFailed("empty_text", "text is empty"))] * len(texts)
            full = [(i, text) for i, text in enumerate(texts) if not self.is_empty(text)]
            for (i, text), passage in zip(full, self._text.passages([text for _, text in full]), strict=True):
                read = self._text.passage_windows(text) if split and passage.truncated else [passage]
                if windows := tuple(array("i", window.ids) for window in read if window.ids):
                    tokenized[i] = Tokenized(windows, any(one.truncated for one in read), text_digest(text))
            return tokenized
        except Exception:  # whatever a tokenizer raises, it costs the text that it is about
            if len(texts) > 1:
                return [one for text in texts for one in self.tokenize([text], split=split)]
            log.exception("a text of %d characters could not be tokenized", len(texts[0]))
            return [Tokenized((), False, b"", EncodingFailed("encoding_failed", "text cannot be tokenized"))]

    def encode(self, batch: Sequence[Sequence[int]], ratio: int) -> list[States | EncodingFailed]:
        """(num_states, dim) of each sequence, or why there are none. A batch that fails is tried again in halves."""
        try:
            encoded = self._encoder.encode(batch, ratio)
        except Exception as exc:  # whatever the model raises, it costs the sequence that it is about
            if len(batch) == 1:
                # torch's CPU allocator raises a plain RuntimeError.
                if isinstance(exc, torch.OutOfMemoryError) or "can't allocate memory" in str(exc):
                    return [EncodingFailed("out_of_memory", f"{len(batch[0])} tokens do not fit into memory")]
                log.exception("a sequence of %d tokens could not be encoded", len(batch[0]))
                return [EncodingFailed("encoding_failed", "the encoder failed on this text; its log has the cause")]
        else:
            broken = EncodingFailed("not_finite", "its states hold NaN or infinity")
            return [states if np.isfinite(states).all() else broken for states in encoded]
        half = len(batch) // 2
        return self.encode(batch[:half], ratio) + self.encode(batch[half:], ratio)

    def encode_all(self, texts: Sequence[Tokenized], ratio: int) -> Iterator[tuple[int, Encoded]]:
        """Texts in batches of like length; each comes with its index when it is done."""
        windows = [(i, w, tokens) for i, text in enumerate(texts) for w, tokens in enumerate(text.windows)]
        encoded: dict[int, dict[int, States | EncodingFailed]] = {i: {} for i in range(len(texts))}
        for rows in self.limits.plan([len(tokens) for _, _, tokens in windows]):
            batch = [windows[row] for row in rows]
            results = self.encode([tokens for _, _, tokens in batch], ratio)
            for (i, w, _), states in zip(batch, results, strict=True):
                encoded[i][w] = states
                if len(encoded[i]) == len(texts[i].windows):
                    yield i, texts[i].join(encoded.pop(i), ratio)

    def encode_one(self, text: str, ratio: int, *, split: bool = False) -> PassageStates:
        """One text alone, window by window; what every batch must agree with. Raises EncodingFailed."""
        (tokenized,) = self.tokenize([text], split=split)
        joined = tokenized.join({w: self.encode([ids], ratio)[0] for w, ids in enumerate(tokenized.windows)}, ratio)
        if isinstance(joined, EncodingFailed):
            raise joined
        return joined
