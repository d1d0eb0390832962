"""What names a work directory: a digest of everything that states and margins depend on. Computes none of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from cache.collection import Collection
from cache.states import text_digest
from checkpoint import Checkpoint
from decoder_server.backend import Backend
from tuning.judged import JudgedCollection
from tuning.sweep.settings import SweepSettings
from tuning.trec import Run

WORK_VERSION = 1  # raised when what is kept in a work directory means something else


def inputs_of(
    judged: JudgedCollection,
    checkpoint: Checkpoint,
    backend: Backend,
    settings: SweepSettings,
    first: Run,
    from_states: Collection | None,
) -> dict[str, Any]:
    """Everything that states and margins depend on."""
    wanted = sorted({p for found in first.values() for p, _ in found})
    if from_states is not None:
        digests = from_states.digests(wanted)
        passages: list[Any] = [
            [p, digest.hex() if digest is not None else None] for p, digest in zip(wanted, digests, strict=True)
        ]
    else:
        passages = [[p, text_digest(judged.passages[p]).hex()] for p in wanted if p in judged.passages]
    candidates = [[q, judged.queries[q], [p for p, _ in found]] for q, found in first.items()]
    return {
        "version": WORK_VERSION,
        # Another codec, pass or product may round otherwise.
        "packages": {name: version(name) for name in ("preread", "faiss-cpu", "torch")},
        "fingerprint": checkpoint.identity().fingerprint,
        "weights": checkpoint.weights_digest(),
        "checkpoint_settings": asdict(checkpoint.settings),
        "states_of": from_states.manifest.binding if from_states is not None else None,
        "dtype": backend.dtype_name,
        "device": backend.device_name,
        "split": settings.split,
        "instruction": settings.instruction,
        "seed": settings.seed,
        "passages": _digest(passages),
        "candidates": _digest(candidates),
    }


def _digest(value: list[Any]) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()
