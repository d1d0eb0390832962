"""The rows of weights that turn a decoder's last hidden state into a margin, read from the checkpoint in float32.

One row for a score head or a single answer token, two for a pair of answers: the whole vocabulary is never multiplied.

One padded pass of a transformers model in torch. Does not know texts or batching policy.

Loads what a profile's head needs into torch. Does not know texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from checkpoint.compute import dtype_name
from checkpoint.files import CheckpointError
from checkpoint.tensors import StoredTensors
from decoder_server.models.cross_encoder.files import Source, keep_heads_in_float32, load_transformer
from decoder_server.models.cross_encoder.listwise import PROJECTOR, ListwiseRunner, read_projector
from decoder_server.models.cross_encoder.model import Runner, pad
from decoder_server.models.cross_encoder.profiles import Padding, Profile
from decoder_server.models.cross_encoder.templates import TextPair

# A tokenizer this large is a published one, whose answers have known ids; smaller ones are made for tests.
REAL_VOCABULARY = 10_000


@dataclass(frozen=True, slots=True)
class RowHead:
    """Margin of a hidden state: the first row's logit, minus the second's where there is one."""

    rows: torch.Tensor  # (1 or 2, hidden), float32
    softcap: float | None = None  # logits are capped at +-softcap, as Gemma 2 does

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, hidden) -> (batch,), in float32."""
        logits = hidden.float() @ self.rows.T  # (batch, 1 or 2)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 0] - logits[:, 1]


def score_head(directory: Path, tensors: StoredTensors, config: Any) -> RowHead:
    """`score.weight` of a decoder with a sequence-classification head.

    Raises:
        CheckpointError: it is not stored, as in a checkpoint that was never converted, or has another shape.
    """
    if "score.weight" not in tensors:
        raise CheckpointError(
            f"{directory}: score.weight is not in the checkpoint and would be random; convert the original first"
        )
    _check_shape(tensors, "score.weight", (1, config.hidden_size))
    return RowHead(tensors.rows("score.weight", [0]))


def vocabulary_head(directory: Path, tensors: StoredTensors, config: Any, answers: tuple[int, ...]) -> RowHead:
    """The answers' rows of the output embedding, tied to the input embedding or not.

    Raises:
        CheckpointError: no output embedding is stored and none is tied.
    """
    for key in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise CheckpointError(
                f"{directory}: config.json scales its logits by {key}; that readout is not known here"
            )
    tied = "model.embed_tokens.weight"
    if "lm_head.weight" in tensors:  # transformers prefers a stored head to a tied one, too
        name = "lm_head.weight"
    elif config.tie_word_embeddings and tied in tensors:
        name = tied
    else:
        raise CheckpointError(f"{directory}: lm_head.weight is not in the checkpoint and would be random")
    _check_shape(tensors, name, (config.vocab_size, config.hidden_size))
    return RowHead(tensors.rows(name, list(answers)), getattr(config, "final_logit_softcapping", None))


def _check_shape(tensors: StoredTensors, name: str, shape: tuple[int, int]) -> None:
    found = tensors.weights[name].shape
    if found != shape:
        raise CheckpointError(f"{tensors.directory}: {name} has the shape {found}; config.json says {shape}")


def answer_ids(directory: Path, tokenizer: Tokenizer, profile: Profile) -> tuple[int, ...]:
    """Token ids of the profile's answers.

    Raises:
        CheckpointError: an answer that is not exactly one token.
    """
    ids: list[int] = []
    for key, answer in (("yes", profile.yes), ("no", profile.no)):
        if isinstance(answer, int):
            ids.append(answer)
        elif answer is not None:
            found = tokenizer.encode(answer, add_special_tokens=False).ids
            if len(found) != 1:
                raise CheckpointError(
                    f"{directory}: the {key} answer {answer!r} is {len(found)} tokens {found}; expected exactly one"
                )
            ids.append(found[0])
    if len(set(ids)) != len(ids):
        raise CheckpointError(f"{directory}: yes and no are the same token {ids[0]}")
    if profile.answer_ids and tuple(ids) != profile.answer_ids and tokenizer.get_vocab_size() >= REAL_VOCABULARY:
        raise CheckpointError(
            f"{directory}: the answers are the tokens {ids}; the published tokenizer of {profile.model} "
            f"has {list(profile.answer_ids)}: this one is another model's"
        )
    return tuple(ids)


class ClassifierRunner:
    """An encoder with the classification head it was trained with."""

    def __init__(
        self, model: Any, device: torch.device, dtype: torch.dtype, *, side: Padding, pad_id: int, typed: bool
    ) -> None:
        self.dtype_name, self.device_name = dtype_name(dtype), str(device)
        self._model, self._device = model, device
        self._side, self._pad_id, self._typed = side, pad_id, typed

    @torch.inference_mode()
    def margins(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        batch = pad([p.ids for p in pairs], [p.type_ids for p in pairs], side=self._side, pad_id=self._pad_id)
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if self._typed:
            inputs["token_type_ids"] = batch.type_ids
        logits = self._model(**{k: torch.from_numpy(v).to(self._device) for k, v in inputs.items()}).logits.float()
        margins = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]  # (batch,)
        result: NDArray[np.float32] = margins.cpu().numpy()
        return result


class LastTokenRunner:
    """A decoder whose last token is read out through a row or two."""

    def __init__(self, model: Any, head: RowHead, device: torch.device, dtype: torch.dtype, *, pad_id: int) -> None:
        self.dtype_name, self.device_name = dtype_name(dtype), str(device)
        self._model, self._device = model, device
        self._head = RowHead(head.rows.to(device), head.softcap)
        self._pad_id = pad_id

    @torch.inference_mode()
    def margins(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        # Left padding with a mask and positions: the last column is every row's last token, whatever pads them.
        batch = pad([p.ids for p in pairs], [None] * len(pairs), side="left", pad_id=self._pad_id)
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
        tensors = {k: torch.from_numpy(v).to(self._device) for k, v in inputs.items()}
        hidden = self._model(**tensors, use_cache=False).last_hidden_state[:, -1]  # (batch, hidden)
        result: NDArray[np.float32] = self._head(hidden).cpu().numpy()
        return result


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
        return score_head(source.directory, source.tensors, source.config)
    if source.profile.head == "vocabulary":
        answers = answer_ids(source.directory, source.tokenizer, source.profile)
        return vocabulary_head(source.directory, source.tensors, source.config, answers)
    return None
