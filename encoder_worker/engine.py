"""What every call of a worker shares: the encoder, the model's thread, the store and threads to wait on it.

Does not know gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from cache.store import Store
from encoder_worker.config import EncoderConfig
from encoder_worker.passage_encoder import PassageEncoder, Tokenized
from encoder_worker.scheduler import Scheduler

P = ParamSpec("P")
T = TypeVar("T")

_TOKENIZE_TEXTS = 64


@dataclass(frozen=True)
class Engine:
    """A loaded worker."""

    config: EncoderConfig
    encoder: PassageEncoder
    scheduler: Scheduler
    store: Store
    threads: Executor  # for the tokenizer
    store_threads: Executor  # for the store alone: one that hangs must not keep texts from being encoded

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs something that blocks off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, lambda: function(*args, **kwargs))

    async def call_store(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for what waits for the store."""
        return await asyncio.get_running_loop().run_in_executor(self.store_threads, lambda: function(*args, **kwargs))

    async def tokenize(self, texts: Sequence[str], *, split: bool = False) -> list[Tokenized]:
        """In pieces, so that a caller who left is noticed between them."""
        tokenized: list[Tokenized] = []
        for start in range(0, len(texts), _TOKENIZE_TEXTS):
            tokenized += await self.call(self.encoder.tokenize, texts[start : start + _TOKENIZE_TEXTS], split=split)
        return tokenized

    def why_not(self, text: str) -> str | None:
        """Why a text cannot be encoded, or None. May tokenize: off the event loop."""
        num_bytes = len(text.encode())
        if num_bytes > self.config.max_text_bytes:
            return f"text is {num_bytes:,} bytes; at most {self.config.max_text_bytes:,} are encoded"
        return "text is empty" if self.encoder.is_empty(text) else None
