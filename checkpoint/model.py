"""One opened checkpoint: configuration, settings, tokenizer, and the tensors of either half.

Opening reads only small files. Does not run anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from checkpoint.errors import CheckpointError
from checkpoint.files import read_json, resolve
from checkpoint.identity import POOLING_VERSION, EncoderIdentity, fingerprint
from checkpoint.settings import CheckpointSettings
from checkpoint.shapes import embedding_shapes, stack_shapes
from checkpoint.tensors import TensorFiles
from checkpoint.text import TextTokenizer

if TYPE_CHECKING:
    from transformers import T5Gemma2Config
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2DecoderConfig, T5Gemma2TextConfig

MODEL_TYPE = "t5gemma2"

# What config.json says that changes a state without changing a tensor.
NUMERIC_KEYS = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_activation",
    "rms_norm_eps",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "rope_parameters",
)


class Checkpoint:
    """A T5Gemma2ForConditionalGeneration directory, opened for reading."""

    def __init__(
        self, path: Path, name: str, config: T5Gemma2Config, settings: CheckpointSettings, *, neutralise: bool
    ):
        self.path = path
        self.name = name
        self.config = config
        self.settings = settings
        self.neutralise = neutralise

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        max_passage_tokens: int | None = None,
        neutralise: bool = True,
    ) -> Checkpoint:
        """Opens a directory or hub id.

        Args:
            revision: hub revision; ignored for a directory.
            max_passage_tokens: overrides the checkpoint's limit, up to the encoder's positions.
            neutralise: tokenize control-token text from outside as plain text.

        Raises:
            CheckpointError: missing or unreadable files, another model type, a limit out of range.
        """
        path = resolve(str(name), revision)
        config = _read_config(path)
        settings = CheckpointSettings.load(path)
        if max_passage_tokens is not None:
            settings = dataclasses.replace(settings, max_passage_tokens=max_passage_tokens)
        positions = int(cast(Any, config.encoder).text_config.max_position_embeddings)
        if not 1 <= settings.max_passage_tokens <= positions:
            raise CheckpointError(
                f"max_passage_tokens is {settings.max_passage_tokens}; expected 1..{positions}, the encoder's positions"
            )
        return cls(path, str(name), config, settings, neutralise=neutralise)

    @property
    def encoder_config(self) -> T5Gemma2TextConfig:
        """The text encoder's part of config.json."""
        return cast("T5Gemma2TextConfig", cast(Any, self.config.encoder).text_config)

    @property
    def decoder_config(self) -> T5Gemma2DecoderConfig:
        return cast("T5Gemma2DecoderConfig", self.config.decoder)

    @property
    def eoi_id(self) -> int:
        """The token whose embedding is stored apart (end of image)."""
        return cast(int, self.config.eoi_token_index)

    @property
    def dim(self) -> int:
        return int(self.decoder_config.hidden_size)

    @cached_property
    def text(self) -> TextTokenizer:
        tokenizer = TextTokenizer(self.path, self.settings, neutralise=self.neutralise)
        rows = self.decoder_config.vocab_size
        if tokenizer.max_id >= rows:
            raise CheckpointError(
                f"{self.path}: the tokenizer's largest token is {tokenizer.max_id}; the embedding has {rows} rows"
            )
        return tokenizer

    @cached_property
    def _tensors(self) -> TensorFiles:
        return TensorFiles(self.path)

    def encoder_tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Encoder layers, norm and embedding by canonical name (`encoder.…`)."""
        config = self.encoder_config
        return self._tensors.read(stack_shapes("encoder", config) | embedding_shapes("encoder", config), dtype)

    def decoder_tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Decoder layers, norm and embedding by canonical name (`decoder.…`).

        The embedding is usually stored once, under the encoder; `lm_head.weight` comes along
        only where it is stored and not tied.
        """
        config = self.decoder_config
        stored = set(self._tensors.names())
        half = "decoder" if "decoder.embed_tokens.weight" in stored else "encoder"
        wanted = stack_shapes("decoder", config) | embedding_shapes(half, config)
        if "lm_head.weight" in stored and not self.config.tie_word_embeddings:
            wanted["lm_head.weight"] = (config.vocab_size, config.hidden_size)
        tensors = self._tensors.read(wanted, dtype)
        return {name.replace(f"{half}.embed_tokens", "decoder.embed_tokens"): t for name, t in tensors.items()}

    @cached_property
    def _identity(self) -> EncoderIdentity:
        config = self.encoder_config
        names = list(stack_shapes("encoder", config) | embedding_shapes("encoder", config))
        value = fingerprint(
            weights=self._tensors.digest(names),
            tokenizer=hashlib.sha256((self.path / "tokenizer.json").read_bytes()).digest(),
            config={
                "config": {key: getattr(config, key) for key in NUMERIC_KEYS},
                "eoi_token_index": self.eoi_id,
                "passage_template": self.settings.passage_template,
                "max_passage_tokens": self.settings.max_passage_tokens,
                "neutralise": self.neutralise,
                "pooling_version": POOLING_VERSION,
            },
        )
        return EncoderIdentity(
            fingerprint=value,
            checkpoint=self.name,
            dim=self.dim,
            max_passage_tokens=self.settings.max_passage_tokens,
            passage_template=self.settings.passage_template,
            pooling_version=POOLING_VERSION,
        )

    def weights_digest(self) -> str:
        """sha256, hex, of every tensor either half reads; with `settings` it is what margins depend on."""
        encoder, decoder = self.encoder_config, self.decoder_config
        wanted = stack_shapes("encoder", encoder) | embedding_shapes("encoder", encoder)
        wanted |= stack_shapes("decoder", decoder) | embedding_shapes("decoder", decoder)
        wanted["lm_head.weight"] = ()
        stored = set(self._tensors.names())
        return self._tensors.digest([name for name in wanted if name in stored]).hex()

    def identity(self) -> EncoderIdentity:
        """Hashes the encoder's weights (about a second per gigabyte) the first time it is asked."""
        return self._identity


def _read_config(path: Path) -> T5Gemma2Config:
    from transformers import T5Gemma2Config  # a second to import; `--help` should not pay it

    raw = read_json(path / "config.json")
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path / 'config.json'}: model_type is {raw.get('model_type')!r}; expected {MODEL_TYPE!r} "
            "(T5Gemma2ForConditionalGeneration)"
        )
    try:
        config: T5Gemma2Config = T5Gemma2Config.from_dict(raw)
    except Exception as exc:  # the strict config classes raise several unrelated types
        raise CheckpointError(f"{path / 'config.json'}: no valid T5Gemma 2 configuration ({exc})") from exc
    for half in (cast(Any, config.encoder).text_config, cast(Any, config.decoder)):
        if half.attention_bias:
            raise CheckpointError(f"{path / 'config.json'}: attention_bias is true; no published T5Gemma 2 has biases")
    return config
