"""What `preread serve` checks before it serves: scores of a model that is not run as published. Knows when, not what.

A cross-encoder in bfloat16, or through ONNX Runtime, is compared once with its own weights in float32; that it passed
is remembered by what it was made of, so the next start is as quick as any.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from preread_cli.process import say

if TYPE_CHECKING:
    from decoder_server.config import ModelConfig
    from decoder_server.models.backend import Backend

    Load = Callable[[ModelConfig], Backend]

log = logging.getLogger(__name__)

PASSED = Path("~/.cache/preread/health")
# What may change scores beside the model's own files.
_PACKAGES = ("preread", "torch", "transformers", "tokenizers", "onnxruntime")


def checked(load: Load, *, every: bool = True, passed: Path = PASSED) -> Load:
    """`load`, and then the health check of what it loaded, on the thread that will score.

    Args:
        every: whatever the model, and now; otherwise only what is not run as published, and only the first time.
        passed: the directory that remembers.
    """

    def load_and_check(model: ModelConfig) -> Backend:
        backend = load(model)
        known = _mark(backend, model, passed.expanduser())
        if every or (known is not None and not known.exists()):
            _check(model, backend)
            if known is not None:
                _remember(known)
        return backend

    return load_and_check


def _check(model: ModelConfig, backend: Backend) -> None:
    from rich.console import Console

    from checkpoint import CheckpointError
    from tuning.health import health_gate
    from tuning.health.report import print_health

    say(f"checking     {model.served_name} against its own weights in float32 (once; --no-check leaves it out)")
    report = health_gate(backend)
    if not report.passed:
        print_health(report, Console(stderr=True))
        raise CheckpointError(report.summary())
    say(f"checked      {model.served_name}: scores are healthy, {report.seconds:.0f} s")


def _remember(known: Path) -> None:
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        known.touch()
    except OSError as exc:  # a file system that cannot be written to costs time at the next start, no more
        log.warning("that it passed could not be remembered: %s", exc)


def _mark(backend: Backend, model: ModelConfig, directory: Path) -> Path | None:
    """The file that says this model passed; None where it is run as published."""
    from decoder_server.models.cross_encoder.backend import CrossEncoder

    if not isinstance(backend, CrossEncoder) or (model.runtime == "torch" and backend.dtype_name == "float32"):
        return None
    made_of = [backend.fingerprint, model.runtime, backend.dtype_name, backend.device_name, *_versions()]
    return directory / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _versions() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return found
