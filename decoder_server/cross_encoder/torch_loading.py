"""Loads what a profile's head needs into torch. Does not know texts."""

from __future__ import annotations

from typing import Any

import torch

from decoder_server.cross_encoder import heads
from decoder_server.cross_encoder.heads import RowHead
from decoder_server.cross_encoder.listwise import PROJECTOR, ListwiseRunner, read_projector
from decoder_server.cross_encoder.runner import Runner
from decoder_server.cross_encoder.source import Source
from decoder_server.cross_encoder.torch_runner import ClassifierRunner, LastTokenRunner
from decoder_server.cross_encoder.transformer import keep_heads_in_float32, load_transformer

# Tensors that a head reads beside the transformers model, and an output embedding that it has no use for.
READ_BESIDE = {
    "score": ("score.weight", "lm_head.weight"),
    "vocabulary": ("lm_head.weight",),
    "listwise": (*PROJECTOR, "lm_head.weight"),
}


def load_torch(source: Source, device: torch.device, dtype: torch.dtype) -> Runner:
    """
    Raises:
        CheckpointError: weights that are missing, of another shape, or unreadable.
    """
    profile = source.profile
    if profile.head == "listwise":
        projector = read_projector(source.directory, source.tensors, source.config.hidden_size)
        model = load_model(source, dtype, device)
        return ListwiseRunner(model, projector, source.reader.tokenizers, profile, device, dtype)
    head = row_head(source)  # before the weights: a wrong one should fail fast
    model = load_model(source, dtype, device)
    if head is not None:
        return LastTokenRunner(model, head, device, dtype, pad_id=source.pad_id)
    keep_heads_in_float32(model)
    return ClassifierRunner(model, device, dtype, side=profile.padding, pad_id=source.pad_id, typed=source.typed)


def load_model(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """The transformers model below a profile's head, or with it where it is the model's own.

    Raises:
        CheckpointError: as load_transformer does.
    """
    headless = source.profile.head != "classifier"
    return load_transformer(
        source.tensors,
        source.config,
        dtype,
        device,
        kind="AutoModel" if headless else "AutoModelForSequenceClassification",
        beside=READ_BESIDE.get(source.profile.head, ()),
        trust_remote_code=source.trust_remote_code and not source.profile.listwise,
    )


def row_head(source: Source) -> RowHead | None:
    """The rows that read out a decoder's last token; None for a model with a head of its own."""
    if source.profile.head == "score":
        return heads.score_head(source.directory, source.tensors, source.config)
    if source.profile.head == "vocabulary":
        answers = heads.answer_ids(source.directory, source.tokenizer, source.profile)
        return heads.vocabulary_head(source.directory, source.tensors, source.config, answers)
    return None
