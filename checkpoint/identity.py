"""The identity of an encoder: everything that changes a stored state, in one fingerprint.

Two directories with the same files have the same fingerprint wherever they lie and however
their tensors are spread over shards.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

# Raised whenever pooling or the encoder pass changes a state beyond rounding.
POOLING_VERSION = 1


@dataclass(frozen=True)
class EncoderIdentity:
    """Which encoder wrote (or may read) a collection."""

    fingerprint: str  # sha256, hex
    checkpoint: str  # name it was opened by; for people, not part of the fingerprint
    dim: int
    max_passage_tokens: int
    passage_template: str
    pooling_version: int


def fingerprint(weights: bytes, tokenizer: bytes, config: dict[str, object]) -> str:
    """sha256 over digests of weights and tokenizer and the canonical JSON of everything else."""
    rest = json.dumps(config, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
    return hashlib.sha256(weights + tokenizer + rest).hexdigest()
