"""A name to a loaded cross-encoder: finds the files, chooses the profile, checks both, loads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from checkpoint.compute import choose_device, choose_dtype, cpu_multiplies_bfloat16
from checkpoint.errors import CheckpointError
from checkpoint.files import read_json, resolve
from decoder_server.cross_encoder import heads
from decoder_server.cross_encoder.choosing import (
    check_architecture,
    generic_profile,
    limited,
    named_profile,
    own_profile,
)
from decoder_server.cross_encoder.model import CrossEncoder
from decoder_server.cross_encoder.profiles import Profile
from decoder_server.cross_encoder.runner import Runner
from decoder_server.cross_encoder.texts import PairReader
from decoder_server.cross_encoder.torch_runner import ClassifierRunner, LastTokenRunner
from decoder_server.cross_encoder.transformer import keep_heads_in_float32, load_config, load_transformer
from decoder_server.cross_encoder.weights import StoredTensors

log = logging.getLogger(__name__)
RUNTIMES = ("torch",)


def open_cross_encoder(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    runtime: str = "torch",
    profile: str | Profile | None = None,
    revision: str | None = None,
    max_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> CrossEncoder:
    """Loads a reranker that reads query and passage together.

    Args:
        name: directory or hub id.
        device: auto, cpu or cuda[:N]; None is auto.
        dtype: auto, float32 or bfloat16; None is auto.
        profile: a model id whose recipe to use, a TOML file, `generic`, or a Profile; None: by exact id, by the
            checkpoint's own file, or from its configuration.
        max_tokens: a lower or higher limit than the profile's.
        trust_remote_code: run Python that comes with the checkpoint; never without being told to.

    Raises:
        CheckpointError: files that cannot be served, with the reason.
        ValueError: a device, dtype or runtime that is not to be had.
    """
    name = str(name)
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime is {runtime!r}; expected {' or '.join(RUNTIMES)}")
    where = choose_device(device)
    number_format = choose_dtype(dtype, where)
    if number_format is torch.bfloat16 and where.type == "cpu" and not cpu_multiplies_bfloat16():
        log.warning("this processor has no bfloat16 instructions: they are emulated, slower than float32")
    chosen = named_profile(name, profile)
    _check_allowed(name, chosen, trust_remote_code)  # before anything is downloaded
    directory = resolve(name, revision)
    raw = read_json(directory / "config.json")
    if chosen is None:
        chosen = (own_profile(directory) if profile is None else None) or generic_profile(name, raw)
        _check_allowed(name, chosen, trust_remote_code)
    check_architecture(chosen, raw, name)
    chosen = limited(chosen, raw, max_tokens)
    tokenizer, pad_id, typed = _load_tokenizer(directory, raw, trust_remote_code)
    reader = PairReader(tokenizer, chosen)
    tensors = StoredTensors(directory)
    runner = _load(directory, chosen, tokenizer, tensors, where, number_format, pad_id, typed, trust_remote_code)
    model = CrossEncoder(
        reader, runner, chosen, model=name, fingerprint=lambda: _fingerprint(tensors, tokenizer, raw, chosen)
    )
    if model.license_notice is not None:
        log.log(logging.WARNING if chosen.restricted else logging.INFO, "%s", model.license_notice)
    return model


def _check_allowed(name: str, profile: Profile | None, trust_remote_code: bool) -> None:
    if profile is None:
        return
    if profile.refused:
        raise CheckpointError(f"{name} cannot be served: {profile.refused}")
    if profile.needs_remote_code and not trust_remote_code:
        raise CheckpointError(
            f"{name} runs Python code that comes with the checkpoint; allow it with trust_remote_code if you trust it"
        )


def _load(
    directory: Path,
    profile: Profile,
    tokenizer: Tokenizer,
    tensors: StoredTensors,
    device: torch.device,
    dtype: torch.dtype,
    pad_id: int,
    typed: bool,
    trust_remote_code: bool,
) -> Runner:
    if profile.head == "listwise":
        raise CheckpointError(f"{directory}: listwise models are not served yet")
    config = load_config(directory, trust_remote_code=trust_remote_code)
    if tokenizer.get_vocab_size(with_added_tokens=True) > config.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.get_vocab_size(with_added_tokens=True)} tokens; "
            f"the embedding has {config.vocab_size} rows"
        )
    head = None
    if profile.head == "score":
        head = heads.score_head(directory, tensors)
    elif profile.head == "vocabulary":
        answers = heads.answer_ids(directory, tokenizer, profile)
        head = heads.vocabulary_head(directory, tensors, config, answers)
    model: Any = load_transformer(
        directory, config, dtype, device, headless=head is not None, trust_remote_code=trust_remote_code
    )
    if head is not None:
        return LastTokenRunner(model, head, device, dtype, pad_id=pad_id)
    keep_heads_in_float32(model)
    return ClassifierRunner(model, device, dtype, side=profile.padding, pad_id=pad_id, typed=typed)


def _load_tokenizer(directory: Path, config: dict[str, Any], trust_remote_code: bool) -> tuple[Tokenizer, int, bool]:
    """The tokenizer, the id that pads, and whether the model reads segment ids."""
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
        tokenizer: Tokenizer = loaded.backend_tokenizer
    except Exception as exc:  # a missing file, a broken one and an unknown class raise unrelated types
        lines = str(exc).strip().splitlines() or [""]
        raise CheckpointError(f"{directory}: no tokenizer that can be read ({lines[0][:300]})") from exc
    candidates = (config.get("pad_token_id"), loaded.pad_token_id, loaded.eos_token_id, 0)
    pad_id = next(id_ for id_ in candidates if isinstance(id_, int) and id_ >= 0)
    typed = int(config.get("type_vocab_size") or 0) > 1 and "token_type_ids" in loaded.model_input_names
    return tokenizer, pad_id, typed


def _fingerprint(tensors: StoredTensors, tokenizer: Tokenizer, config: dict[str, Any], profile: Profile) -> str:
    """Hashes the weights: a second or two per gigabyte."""
    rest = json.dumps([config, dataclasses.asdict(profile)], sort_keys=True)
    return hashlib.sha256("\n".join([tensors.digest(), tokenizer.to_str(), rest]).encode()).hexdigest()
