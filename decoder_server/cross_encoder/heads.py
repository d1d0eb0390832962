"""The rows of weights that turn a decoder's last hidden state into a margin, read from the checkpoint in float32.

One row for a score head or a single answer token, two for a pair of answers: the whole vocabulary is never multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from checkpoint.errors import CheckpointError
from checkpoint.tensors import StoredTensors
from decoder_server.cross_encoder.profiles import Profile

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
