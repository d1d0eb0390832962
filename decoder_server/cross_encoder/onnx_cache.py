"""ONNX graphs on disk: made once per weights, profile and versions, found again until one of them changes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

from checkpoint.errors import CheckpointError
from decoder_server.cross_encoder.onnx_export import EXPORT_VERSION, export, quantize
from decoder_server.cross_encoder.onnx_runner import OnnxRunner
from decoder_server.cross_encoder.source import Source
from decoder_server.cross_encoder.torch_loading import row_head
from decoder_server.cross_encoder.transformer import one_line

log = logging.getLogger(__name__)
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Without one of these, x86 adds pairs of 8-bit products in 16 bits, which overflows.
EXACT_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8")
DEFAULT_CACHE = Path("~/.cache/preread/onnx")


def load_onnx(source: Source, *, quantized: bool, cache_dir: Path | None) -> OnnxRunner:
    """A runner over the graph of these weights, exported first where there is none yet.

    Args:
        cache_dir: where graphs are kept; None: ~/.cache/preread/onnx.

    Raises:
        CheckpointError: an architecture that cannot be exported, or a place that cannot be written.
        ValueError: the packages are not installed, or the model is listwise.
    """
    if source.profile.listwise:
        raise ValueError(f"{source.directory}: a listwise model runs in the torch runtime only")
    made_of = ingredients(source, quantized=quantized)
    directory = (cache_dir or DEFAULT_CACHE).expanduser() / key(made_of)
    if (directory / "model.onnx").exists():
        try:
            return open_graph(source, directory, quantized=quantized)
        except CheckpointError as exc:
            log.warning("%s; made anew", exc)
            shutil.rmtree(directory, ignore_errors=True)
    _build(source, directory, made_of)
    return open_graph(source, directory, quantized=quantized)


def ingredients(source: Source, *, quantized: bool) -> dict[str, object]:
    """All that a graph depends on.

    Raises:
        ValueError: the packages are not installed.
    """
    features = torch.cpu.get_capabilities()
    saturates = features.get("architecture") == "x86_64" and not any(features.get(name) for name in EXACT_INT8)
    return {
        "identity": source.fingerprint(),
        "quantized": quantized,
        "reduce_range": quantized and saturates,
        "export_version": EXPORT_VERSION,
        **_versions(),
    }


def key(made_of: dict[str, object]) -> str:
    """The directory's name."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def open_graph(source: Source, directory: Path, *, quantized: bool) -> OnnxRunner:
    """
    Raises:
        CheckpointError: a damaged graph.
    """
    head = row_head(source)
    try:
        return OnnxRunner(
            directory / "model.onnx",
            head,
            side=source.profile.padding,
            pad_id=source.pad_id,
            quantized=quantized,
            num_threads=torch.get_num_threads(),
        )
    except Exception as exc:  # onnxruntime's own types
        raise CheckpointError(f"{directory}: onnxruntime cannot load the graph ({one_line(exc)})") from exc


def _build(source: Source, directory: Path, made_of: dict[str, object]) -> None:
    """Writes aside, then renames: a graph is there whole or not at all."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".making-", dir=directory.parent))
    except OSError as exc:
        raise CheckpointError(f"{directory.parent}: graphs cannot be kept there ({exc})") from exc
    log.info("%s: exporting to ONNX, once for these weights", source.directory)
    try:
        (aside / "float").mkdir()
        export(source, aside / "float" / "model.onnx")
        if made_of["quantized"]:
            reduce_range = bool(made_of["reduce_range"])
            kept = quantize(aside / "float" / "model.onnx", aside / "model.onnx", reduce_range=reduce_range)
            shutil.rmtree(aside / "float")
            made_of = made_of | {"products_in_float": kept}
        else:
            for file in (aside / "float").iterdir():
                file.rename(aside / file.name)
            (aside / "float").rmdir()
        made_of = made_of | {"model": str(source.directory)}
        (aside / "made-of.json").write_text(json.dumps(made_of, indent=2), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was first; its graph is the same
            os.replace(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _versions() -> dict[str, str]:
    found, missing = {}, []
    for package in (*PACKAGES, "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise ValueError(f"the onnx runtimes need {', '.join(missing)}: pip install 'preread[onnx]'")
    return found
