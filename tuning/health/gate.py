"""The whole check of one model, and the same for one that is loaded already.

    report = check("BAAI/bge-reranker-v2-m3", dtype="bfloat16")
    report = health_gate(backend)                                # what `preread serve --check` runs

Knows which comparisons a backend needs; the comparisons are its neighbours'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from checkpoint.files import read_json, resolve
from checkpoint.model import MODEL_TYPE
from decoder_server.backend import Backend
from decoder_server.cross_encoder import CrossEncoder, open_cross_encoder
from decoder_server.cross_encoder.choosing import named_profile
from decoder_server.fbnl import FbnlBackend
from tuning.errors import EvaluationError
from tuning.health.check_cross import check_cross
from tuning.health.check_fbnl import check_fbnl
from tuning.health.cross import CrossScorer
from tuning.health.fbnl import FbnlScorer
from tuning.health.pairs import PairSet, built_in_pairs
from tuning.health.report import HealthReport
from tuning.health.scorer import Scorer
from tuning.progress import SILENT, Progress

FLOAT32_NAMES = ("fp32", "float32")


def check(
    model: str | Path,
    *,
    against: str = "fp32",
    pairs: PairSet | None = None,
    device: str | None = None,
    dtype: str | None = None,
    runtime: str = "torch",
    profile: str | None = None,
    codec: str | None = None,
    ratio: int | None = None,
    max_tokens: int | None = None,
    trust_remote_code: bool = False,
    read_control_tokens: bool = False,
    progress: Progress = SILENT,
) -> HealthReport:
    """Loads a model as it would be served and checks its scores.

    Args:
        against: fp32, the same weights in float32; or another directory or hub id, whose float32 scores it must give.
        pairs: None: the built-in hundred.
        codec, ratio: how passages are stored; fbnl only.
        read_control_tokens: in texts, as KaLM's own code does; fbnl only.
        runtime, profile, max_tokens, trust_remote_code: of cross-encoders only.

    Raises:
        CheckpointError, ValueError: a model that cannot be loaded, or a setting that it does not have.
        EvaluationError: pairs that it cannot score at all.
    """
    name, given = str(model), pairs or built_in_pairs()
    other = None if against in FLOAT32_NAMES else against
    if is_fbnl(name):
        _refuse("cross-encoders", runtime=runtime != "torch", profile=profile, max_tokens=max_tokens)
        checkpoint = Checkpoint.open(name, neutralise=not read_control_tokens)
        backend = FbnlBackend.load(checkpoint, device=device, dtype=dtype)
        beside = _open_other(other, device, trust_remote_code) if other is not None else None
        return check_fbnl(
            FbnlScorer.beside(backend, checkpoint, ratio),
            checkpoint,
            given,
            codec=codec,
            other=beside,
            progress=progress,
        )
    _refuse("fbnl checkpoints", codec=codec, ratio=ratio, read_control_tokens=read_control_tokens)
    loaded = open_cross_encoder(
        name,
        device=device,
        dtype=dtype,
        runtime=runtime,
        profile=profile,
        max_tokens=max_tokens,
        trust_remote_code=trust_remote_code,
    )
    beside = _open_other(other, device, trust_remote_code) if other is not None else None
    return check_cross(CrossScorer(loaded), given, other=beside, trust_remote_code=trust_remote_code, progress=progress)


def health_gate(
    model: CrossEncoder | Backend,
    *,
    pairs: PairSet | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> HealthReport:
    """Checks a model that is loaded, whatever its runtime, against float32 torch of the same weights.

    Loads those weights once more while it runs. Call it from the thread that the model is scored on, before
    anybody else scores.
    """
    given = pairs or built_in_pairs()
    if isinstance(model, FbnlBackend):
        scorer = FbnlScorer.beside(model, model.checkpoint)
        return check_fbnl(scorer, model.checkpoint, given, every_format=False, progress=progress)
    loaded = model if isinstance(model, CrossEncoder) else getattr(model, "model", None)
    if not isinstance(loaded, CrossEncoder):
        raise TypeError(f"{type(model).__name__} is no backend that can be checked")
    return check_cross(CrossScorer(loaded), given, trust_remote_code=trust_remote_code, progress=progress)


def is_fbnl(name: str) -> bool:
    """Whether a checkpoint is an encoder-decoder with stored states, and no cross-encoder.

    Raises:
        CheckpointError: neither a directory nor a hub id.
    """
    if named_profile(name, None) is not None:
        return False
    return read_json(resolve(name) / "config.json").get("model_type") == MODEL_TYPE


def _open_other(name: str, device: str | None, trust_remote_code: bool) -> tuple[str, Scorer]:
    if is_fbnl(name):
        return name, FbnlScorer.load(Checkpoint.open(name), device=device, dtype="float32")
    other = open_cross_encoder(name, device=device, dtype="float32", trust_remote_code=trust_remote_code)
    return name, CrossScorer(other)


def _refuse(whose: str, **settings: Any) -> None:
    for name, value in settings.items():
        if value:
            raise EvaluationError(f"{name} is for {whose}; this model is none")
