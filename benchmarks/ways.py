"""Every way to score the same candidates on the same weights; side_by_side and scaling time them.

    straightforward          transformers: encode and decode per call, full vocabulary at every position
    joint                    a cross-encoder of like size: the text encoder over prompt + passage
    cached, full vocabulary  transformers' decoder over cached states, full vocabulary
    preread, texts           our encoder and our decoder, nothing kept
    preread                  cached states, our decoder
    preread, keys            the same with every layer's passage keys and values kept
    preread, prefix          the same with the constant beginning of the prompt kept per passage as well

Passages and states are random: no time depends on their values. Does not know clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import T5Gemma2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from benchmarks.operations import PREFIX_TOKENS, PROMPT_TOKENS, Operations
from checkpoint import Checkpoint, TokenizedPrompt
from checkpoint.compute import DTYPES
from decoder_server.backend import Pair
from decoder_server.decoder import Decoder, KeysValues
from decoder_server.fbnl import FbnlBackend
from decoder_server.layout import Layout
from encoder_worker.encoder import Encoder

BATCH = 10  # candidates a batch; every way gets the same
NUM_DISTINCT = 40  # candidates; more are these again. Few processors' caches hold even them


class Models:
    """Both halves, as transformers runs them and as Preread does."""

    def __init__(self, directory: Path, dtype: str) -> None:
        quiet: Any = transformers_logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        self.checkpoint = Checkpoint.open(directory)
        self.dtype = DTYPES[dtype]
        self.backend = FbnlBackend.load(self.checkpoint, device="cpu", dtype=dtype)
        self.encoder = Encoder.load(self.checkpoint, device="cpu", dtype=dtype)
        whole: Any = T5Gemma2ForConditionalGeneration.from_pretrained(directory, dtype=self.dtype)
        self.whole = whole.eval()

    def operations(self, way: str, passage_tokens: int, ratio: int) -> int:
        """Of one candidate."""
        shape = Operations(self.checkpoint.encoder_config, self.checkpoint.decoder_config, passage_tokens, ratio)
        return OPERATIONS[way](shape)


class Candidates:
    """Passages of one length, read at one ratio. Every way takes how many of them to score."""

    def __init__(self, models: Models, passage_tokens: int, ratio: int, num_distinct: int = NUM_DISTINCT) -> None:
        rng = np.random.default_rng(0)
        vocab = int(models.checkpoint.decoder_config.vocab_size)
        shape = (num_distinct, -(-passage_tokens // ratio), models.checkpoint.dim)
        self._models, self._ratio = models, ratio
        self._passages = rng.integers(min(300, vocab // 2), vocab, (num_distinct, passage_tokens))
        self._states = rng.standard_normal(shape, dtype=np.float32)
        prompt = rng.integers(min(300, vocab // 2), vocab, PROMPT_TOKENS).tolist()
        self._prompt = TokenizedPrompt(prompt, PROMPT_TOKENS - PREFIX_TOKENS, query_truncated=False)

    def straightforward(self, count: int) -> None:
        for some in self._batches(count):
            ids = torch.from_numpy(self._passages[some])
            states = self._models.whole.get_encoder()(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            groups = states.split(self._ratio, dim=1)
            self._decode(torch.stack([group.mean(1) for group in groups], dim=1))

    def joint(self, count: int) -> None:
        model = self._models.whole.get_encoder().text_model
        for some in self._batches(count):
            prompts = np.tile(self._prompt.ids, (len(some), 1))
            ids = torch.from_numpy(np.concatenate([prompts, self._passages[some]], axis=1))
            model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, -1].sum(1)

    def cached_full_vocabulary(self, count: int) -> None:
        for some in self._batches(count):
            self._decode(torch.from_numpy(self._states[some]).to(self._models.dtype))

    def texts(self, count: int) -> None:
        for some in self._batches(count):
            states = self._models.encoder.encode(self._passages[some].tolist(), self._ratio)
            self._models.backend.score([Pair(self._prompt, one) for one in states])

    def states(self, count: int) -> None:
        for some in self._batches(count):
            self._models.backend.score([Pair(self._prompt, self._states[i]) for i in some])

    def keys(self, count: int) -> None:
        self._continued(self._kept_keys, 0, count)

    def prefix(self, count: int) -> None:
        self._continued(self._kept_prefix, PREFIX_TOKENS, count)

    @cached_property
    def _kept_keys(self) -> list[list[KeysValues]]:
        states = torch.from_numpy(self._states).to(self._models.dtype)
        return [list(self._decoder.passage_kv(one)) for one in states]

    @cached_property
    def _kept_prefix(self) -> list[list[KeysValues]]:
        beginning = torch.tensor(self._prompt.ids[:PREFIX_TOKENS])
        layout = Layout([PREFIX_TOKENS], [self._states.shape[1]], beginning.device)
        return [packed([self._decoder.prompt_kv(beginning, keys, layout), keys]) for keys in self._kept_keys]

    @property
    def _decoder(self) -> Decoder:
        return self._models.backend._decoder

    def _continued(self, contexts: list[list[KeysValues]], begin: int, count: int) -> None:
        for some in self._batches(count):
            ids = torch.tensor(self._prompt.ids[begin:] * len(some))
            lengths, counts = [PROMPT_TOKENS - begin] * len(some), [self._states.shape[1]] * len(some)
            layout = Layout(lengths, counts, ids.device, [begin] * len(some))
            self._decoder.margins(ids, packed([contexts[i] for i in some]), layout, 4, 5)

    def _batches(self, count: int) -> Iterator[list[int]]:
        """Which candidates each batch scores."""
        for first in range(0, count, BATCH):
            yield [i % len(self._states) for i in range(first, min(first + BATCH, count))]

    def _decode(self, states: torch.Tensor) -> None:
        self._models.whole(
            decoder_input_ids=torch.tensor([self._prompt.ids] * len(states)),
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
        )


def packed(contexts: list[list[KeysValues]]) -> list[KeysValues]:
    """Contexts end to end, layer by layer."""
    return [(torch.cat([k for k, _ in rows]), torch.cat([v for _, v in rows])) for rows in zip(*contexts, strict=True)]


WAYS: dict[str, Callable[[Candidates, int], None]] = {
    "straightforward": Candidates.straightforward,
    "joint": Candidates.joint,
    "cached, full vocabulary": Candidates.cached_full_vocabulary,
    "preread, texts": Candidates.texts,
    "preread": Candidates.states,
    "preread, keys": Candidates.keys,
    "preread, prefix": Candidates.prefix,
}
OPERATIONS: dict[str, Callable[[Operations], int]] = {
    "straightforward": Operations.straightforward,
    "joint": Operations.joint,
    "cached, full vocabulary": Operations.cached_full_vocabulary,
    "preread, texts": Operations.texts,
    "preread": Operations.states,
    "preread, keys": Operations.keys,
    "preread, prefix": Operations.prefix,
}
SLOW = ("straightforward", "joint", "cached, full vocabulary", "preread, texts")  # these score few candidates
