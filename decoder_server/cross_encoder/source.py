"""A cross-encoder's files, opened and checked against each other, before any large tensor is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checkpoint.errors import CheckpointError
from checkpoint.tensors import StoredTensors
from decoder_server.cross_encoder.declared import check_declared
from decoder_server.cross_encoder.profiles import Profile
from decoder_server.cross_encoder.texts import PairReader
from decoder_server.cross_encoder.transformer import load_config

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spm.model",
    "tokenizer.model",
    "tekken.json",
)


@dataclass(frozen=True, slots=True)
class Source:
    """What every runtime loads from."""

    directory: Path
    profile: Profile
    config: Any  # transformers' configuration object
    raw: dict[str, Any]  # config.json as it stands
    tokenizer: Tokenizer
    reader: PairReader
    tensors: StoredTensors
    pad_id: int
    typed: bool  # whether the model reads segment ids
    trust_remote_code: bool

    @classmethod
    def open(cls, directory: Path, raw: dict[str, Any], profile: Profile, *, trust_remote_code: bool) -> Source:
        """
        Raises:
            CheckpointError: a tokenizer, configuration or weights file that is missing, broken or of another model.
        """
        config = load_config(directory, trust_remote_code=trust_remote_code)
        check_declared(directory, raw, config, profile)
        tokenizer, pad_id, names = _load_tokenizer(directory, raw, trust_remote_code)
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        if size > config.vocab_size:
            raise CheckpointError(
                f"{directory}: the tokenizer has {size} tokens; the embedding has {config.vocab_size} rows"
            )
        typed = int(raw.get("type_vocab_size") or 0) > 1 and "token_type_ids" in names
        return cls(
            directory,
            profile,
            config,
            raw,
            tokenizer,
            PairReader(tokenizer, profile),
            StoredTensors(directory),
            pad_id,
            typed,
            trust_remote_code,
        )

    def fingerprint(self) -> str:
        """sha256 over weights, tokenizer, configuration and profile: a second or two per gigabyte."""
        rest = json.dumps([self.raw, dataclasses.asdict(self.profile)], sort_keys=True)
        return hashlib.sha256("\n".join([self.tensors.digest(), self.tokenizer.to_str(), rest]).encode()).hexdigest()


def _load_tokenizer(directory: Path, raw: dict[str, Any], trust_remote_code: bool) -> tuple[Tokenizer, int, list[str]]:
    """The tokenizer, the id that pads, and the names of a model's inputs."""
    from transformers import AutoTokenizer

    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        # Given none of these, transformers makes a tokenizer that reads every text as nothing.
        raise CheckpointError(f"{directory}: no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}")
    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
        tokenizer: Tokenizer = loaded.backend_tokenizer
    except Exception as exc:  # a missing file, a broken one and an unknown class raise unrelated types
        lines = str(exc).strip().splitlines() or [""]
        raise CheckpointError(f"{directory}: no tokenizer that can be read ({lines[0][:300]})") from exc
    if len(tokenizer.encode("a query and a passage", add_special_tokens=False).ids) == 0:
        raise CheckpointError(f"{directory}: the tokenizer reads every text as nothing; its files are not all there")
    # Encoders that count positions from the pad id want the configuration's; elsewhere padding is masked.
    candidates = (raw.get("pad_token_id"), loaded.pad_token_id, loaded.eos_token_id, 0)
    pad_id = next(id_ for id_ in candidates if isinstance(id_, int) and id_ >= 0)
    return tokenizer, pad_id, list(loaded.model_input_names)
