"""Every variant to score the same candidates on the same weights; side_by_side and scaling time them.

    transformers             transformers: encode and decode per call, full vocabulary at every position
    joint                    a cross-encoder of like size: the text encoder over prompt + passage
    cached, full vocabulary  transformers' decoder over cached states, full vocabulary
    preread, texts           our encoder and our decoder, nothing kept
    preread                  cached states, our decoder
    preread, keys            every layer's passage keys and values in the KV cache
    preread, prefix          the constant beginning of the prompt over each passage in the prefix cache as well
    … cold                   the access that fills the cache
    … int8                   kept as int8, not as computed

Passages and states are random: no time depends on their values. Does not know clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from decoder_server.config import KvCacheConfig
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair
from encoder_worker.encoder import Encoder

BATCH = 10  # candidates a batch; every variant gets the same
NUM_DISTINCT = 100  # candidates; more are these again. No processor's caches hold even them
TIER_BYTES = 4 << 30


class Models:
    """Both halves, as transformers runs them and as Preread does."""

    def __init__(self, directory: Path, dtype: str) -> None:
        quiet: Any = transformers_logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        self.checkpoint = Checkpoint.open(directory)
        self.dtype = DTYPES[dtype]
        self.backend = FbnlBackend(self.checkpoint, device="cpu", dtype=dtype)
        self.encoder = Encoder(self.checkpoint, device="cpu", dtype=dtype)
        whole: Any = T5Gemma2ForConditionalGeneration.from_pretrained(directory, dtype=self.dtype)
        self.whole = whole.eval()
        self._tiered: dict[tuple[str, bool], FbnlBackend] = {}

    def tiered(self, form: str, *, prefix: bool) -> FbnlBackend:
        """Our decoder with the KV cache, and the prefix cache where asked for, each as large as it likes."""
        if (form, prefix) not in self._tiered:
            budgets = KvCacheConfig(TIER_BYTES, TIER_BYTES if prefix else 0, form)
            self._tiered[form, prefix] = self.backend.with_caches(budgets)
        return self._tiered[form, prefix]

    def forget(self) -> None:
        """Empties all caches."""
        self._tiered.clear()

    def operations(self, variant: str, passage_tokens: int, ratio: int) -> int:
        """Of one candidate."""
        shape = Operations(self.checkpoint.encoder_config, self.checkpoint.decoder_config, passage_tokens, ratio)
        return VARIANTS[variant].operations(shape)


class Candidates:
    """Passages of one length, read at one ratio. Every variant takes how many of them to score."""

    def __init__(self, models: Models, passage_tokens: int, ratio: int, num_distinct: int = NUM_DISTINCT) -> None:
        models.forget()  # other passages' keys and prefixes
        rng = np.random.default_rng(0)
        vocab = int(models.checkpoint.decoder_config.vocab_size)
        shape = (num_distinct, -(-passage_tokens // ratio), models.checkpoint.dim)
        self._models, self._ratio = models, ratio
        self._passages = rng.integers(min(300, vocab // 2), vocab, (num_distinct, passage_tokens))
        self._states = rng.standard_normal(shape, dtype=np.float32)
        prompt = rng.integers(min(300, vocab // 2), vocab, PROMPT_TOKENS).tolist()
        num_query = PROMPT_TOKENS - PREFIX_TOKENS
        self._prompt = TokenizedPrompt(prompt, num_query, query_truncated=False, prefix_length=PREFIX_TOKENS)

    def transformers(self, count: int) -> None:
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
            self._models.backend.score([StatePair(self._prompt, one) for one in states])

    def states(self, count: int) -> None:
        for some in self._batches(count):
            self._models.backend.score(self._pairs(some))

    def kept(self, count: int, form: str, *, prefix: bool) -> None:
        """Our decoder over what the caches hold; what they lack it computes and keeps, if it is asked for again."""
        for some in self._batches(count):
            self._models.tiered(form, prefix=prefix).score(self._pairs(some))

    def fill(self, count: int, form: str, *, prefix: bool) -> None:
        """All that passes need is in the caches."""
        for some in self._batches(min(count, len(self._states))):
            self._models.tiered(form, prefix=prefix).fill(self._pairs(some))

    def empty(self, count: int, form: str, *, prefix: bool) -> None:
        """Nothing is in the caches, and every passage was asked for once."""
        self._models.forget()
        self.kept(min(count, len(self._states)), form, prefix=prefix)

    def _pairs(self, some: list[int]) -> list[StatePair]:
        return [StatePair(self._prompt, self._states[i], key=b"%d" % i) for i in some]

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


Call = Callable[[Candidates, int], None]


@dataclass(frozen=True)
class Way:
    score: Call
    operations: Callable[[Operations], int]
    prepare: Call = lambda candidates, count: None  # before every timed call
    slow: bool = False  # few candidates show what one costs


def tiered(form: str = "auto", *, prefix: bool, cold: bool = False) -> Way:
    warm_operations, cold_operations = (
        (Operations.prefix, Operations.prefix_cold) if prefix else (Operations.keys, Operations.states)
    )
    return Way(
        partial(Candidates.kept, form=form, prefix=prefix),
        cold_operations if cold else warm_operations,
        partial(Candidates.empty if cold else Candidates.fill, form=form, prefix=prefix),
        slow=cold,
    )


VARIANTS = {
    "transformers": Way(Candidates.transformers, Operations.transformers, slow=True),
    "joint": Way(Candidates.joint, Operations.joint, slow=True),
    "cached, full vocabulary": Way(Candidates.cached_full_vocabulary, Operations.cached_full_vocabulary, slow=True),
    "preread, texts": Way(Candidates.texts, Operations.texts, slow=True),
    "preread": Way(Candidates.states, Operations.states),
    "preread, keys cold": tiered(prefix=False, cold=True),
    "preread, keys": tiered(prefix=False),
    "preread, keys int8": tiered("int8", prefix=False),
    "preread, prefix cold": tiered(prefix=True, cold=True),
    "preread, prefix": tiered(prefix=True),
    "preread, prefix int8": tiered("int8", prefix=True),
}
