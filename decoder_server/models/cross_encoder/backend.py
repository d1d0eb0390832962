"""The cross_encoder backend: query and passage read together, as text. Knows no request, store or batching policy.

What a model wants of its texts, and how its answer is read, is `cross_encoder`'s; here it only meets the seam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from decoder_server.config import ModelConfig
from preread.errors import InvalidRequest

if TYPE_CHECKING:
    from decoder_server.models.cross_encoder import CrossEncoder, TextPair


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Query and instruction; a cross-encoder reads them anew with every passage."""

    query: str
    instruction: str | None
    num_tokens: int
    num_query_tokens: int
    query_truncated: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class TextItem:
    """One query and passage as token ids."""

    pair: TextPair

    @property
    def num_prompt_tokens(self) -> int:
        return self.pair.num_tokens

    @property
    def num_states(self) -> int:
        return 0

    @property
    def num_tokens(self) -> int:
        return self.pair.num_tokens

    @property
    def truncated(self) -> bool:
        return self.pair.truncated


@dataclass(frozen=True, slots=True)
class TextSettings:
    """The limits of a model that reads text."""

    default_instruction: str
    max_passage_tokens: int
    max_query_tokens: int
    default_compression_ratio: int = 0


class CrossEncoderBackend:
    """One loaded cross-encoder."""

    name = "cross_encoder"
    num_compilations = 0

    def __init__(self, checkpoint_name: str, model: CrossEncoder) -> None:
        self.checkpoint_name = checkpoint_name
        self.model = model
        self.dtype_name, self.device_name = model.dtype_name, model.device_name
        self.notice = model.license_notice
        self.listwise = model.profile.listwise
        profile = model.profile
        self.settings = TextSettings(
            profile.default_instruction, profile.max_passage_tokens or profile.max_tokens, profile.max_query_tokens
        )

    @classmethod
    def load(cls, config: ModelConfig) -> CrossEncoderBackend:
        """
        Raises:
            CheckpointError, ValueError: what cannot be served, and why.
        """
        from decoder_server.models.cross_encoder import open_cross_encoder

        model = open_cross_encoder(
            config.checkpoint,
            device=config.device,
            dtype=config.dtype,
            runtime=config.runtime,
            profile=config.profile or None,
            max_tokens=config.max_passage_tokens,
            trust_remote_code=config.trust_remote_code,
        )
        return cls(config.checkpoint, model)

    def identity(self) -> None:
        """It reads no states."""

    def prompt(self, query: str, instruction: str | None = None) -> TextPrompt:
        """
        Raises:
            InvalidRequest: an instruction over the model's limit.
        """
        try:
            question = self.model.question(query, instruction)
        except ValueError as exc:
            limit = self.model.profile.max_instruction_tokens
            raise InvalidRequest("instruction", f"too long ({exc})", f"at most {limit} tokens") from exc
        num_query = self.model.count_tokens(question.query)
        num_tokens = num_query + self.model.count_tokens(question.instruction)
        return TextPrompt(query, instruction, num_tokens, num_query, question.truncated)

    def pairs(self, prompt: TextPrompt, passages: Sequence[str]) -> list[list[TextItem]]:
        """
        Raises:
            ValueError: query and instruction leave no room for a passage.
        """
        texts = [(prompt.query, prompt.instruction, passage) for passage in passages]
        return [[TextItem(pair)] for pair in self.model.pairs(texts)]

    def cut(self, text: str, max_tokens: int | None, *, keep_end: bool = False) -> str:
        return self.model.cut(text, max_tokens, keep_end=keep_end)

    def is_empty(self, text: str) -> bool:
        return self.model.is_empty(text)

    def score(self, pairs: Sequence[TextItem]) -> NDArray[np.float32]:
        return self.model.score_pairs([item.pair for item in pairs])

    def activate(self, margin: float) -> float:
        """In 0..1 for every model, as the wire promises; some publish the bare logit, which is the margin."""
        return float(self.model.bounded(np.array([margin], dtype=np.float32))[0])

    def warm_up(self) -> None:
        """One real pass over a real pair.

        Raises:
            CheckpointError: the weights give no finite margin.
        """
        self.model.warm_up()
