"""Whether a converted classifier gives the scores of the language model it came from, on the same padded batches.

Runs transformers' own classes, one loaded at a time. Does not know how the conversion was done.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from checkpoint.compute import DTYPES
from checkpoint.files import CheckpointError
from decoder_server.models.cross_encoder.backend import batches, pad
from decoder_server.models.cross_encoder.conversion import COLUMN, CausalSource
from decoder_server.models.cross_encoder.files import load_transformer
from tuning.health.scorers import Margins, PairSet
from tuning.metrics import kendall_tau
from tuning.progress import SILENT, StageProgress, counted

_BATCH_TOKENS = 4096
# float32: the same sums in another kernel; 2e-7 was measured, and a margin more than 1e-4 off is wrong by any account.
# bfloat16: the language model rounds its logit to 8 bits, the classifier may not: a step of the largest score.
_MAX_DELTA = {"float32": 1e-4, "bfloat16": 2.0**-7}  # absolute; a share of the largest score
_MIN_TAU = {"float32": 0.999, "bfloat16": 0.98}


@dataclass(frozen=True)
class ParityRow:
    """One number format."""

    dtype: str
    num_pairs: int
    max_delta: float
    allowed_delta: float
    tau: float
    rank_agreement: float  # share of places that the same pair holds; equal scores stay in input order
    passed: bool

    @classmethod
    def of(cls, dtype: str, original: Margins, converted: Margins) -> Self:
        """Raises CheckpointError where a score is not finite."""
        if not (np.isfinite(original).all() and np.isfinite(converted).all()):
            raise CheckpointError(f"a score is not finite in {dtype}: nothing to compare")
        allowed = _MAX_DELTA[dtype] * (1.0 if dtype == "float32" else max(1.0, float(np.abs(original).max())))
        places = np.argsort(-original, kind="stable") == np.argsort(-converted, kind="stable")
        delta, tau = float(np.abs(original - converted).max()), kendall_tau(original, converted)
        passed = delta <= allowed and tau >= _MIN_TAU[dtype]
        return cls(dtype, len(original), delta, allowed, tau, float(places.mean()), passed)


@torch.inference_mode()
def parity(
    source: CausalSource,
    converted: Path,
    pairs: PairSet,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    progress: StageProgress = SILENT,
) -> list[ParityRow]:
    """Both models' scores of the pairs, by format. Raises CheckpointError: not loaded, or a score is not finite."""
    read = source.files.reader.read(pairs.pairs)
    groups = list(batches([pair.num_tokens for pair in read], _BATCH_TOKENS))
    padded = [pad([read[i].ids for i in group], side="left", pad_id=source.pad_token_id) for group in groups]
    rows = []
    for dtype in dtypes:
        both = []
        for side, path, causal in (("original", source.files.directory, True), ("converted", converted, False)):
            with counted(progress, f"{side} {dtype}", len(pairs), "pairs") as advance:
                kind = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
                model = load_transformer(path, DTYPES[dtype], torch.device("cpu"), kind=kind)
                margins = np.empty(len(pairs), dtype=np.float32)
                for group, batch in zip(groups, padded, strict=True):
                    inputs = {name: torch.from_numpy(batch[name]) for name in ("input_ids", "attention_mask")}
                    last = {"logits_to_keep": 1} if causal else {}
                    logits = model(**inputs, use_cache=False, **last).logits  # as either model's own forward gives them
                    margins[group] = (logits[:, -1, COLUMN] if causal else logits.squeeze(-1)).float().numpy()
                    advance(len(group))
                del model
                gc.collect()  # the next one needs the room
            both.append(margins)
        rows.append(ParityRow.of(dtype, *both))
    return rows
