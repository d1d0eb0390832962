"""A checkpoint in ONNX Runtime on the CPU: exported to a graph in float32 or dynamic int8, kept on disk, and run.
A decoder's graph ends in the last token's hidden state, an encoder's in its logits; the head stays in float32, outside
or inside. A graph is made once per weights, profile and versions.
"""

import ast
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from checkpoint.files import CheckpointError, one_line
from decoder_server.models.cross_encoder.backend import pad
from decoder_server.models.cross_encoder.files import CheckpointFiles
from decoder_server.models.cross_encoder.templates import TextPair
from decoder_server.models.cross_encoder.torch_runtime import Body, read_head

log = logging.getLogger(__name__)
DEFAULT_CACHE = Path("~/.cache/preread/onnx")
PACKAGES = ("onnx", "onnxruntime", "onnxscript", "torch", "transformers")
# Without one of these, x86 adds pairs of 8-bit products in 16 bits, which overflows.
EXACT_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8")
# Raised whenever the same weights would give another graph.
EXPORT_VERSION = 1
# Second layers of feed-forward blocks, by the end of their module's name: their input has outliers, and one scale for
# all of it would drown the rest. Their activations, not their weights, are what int8 loses.
FLOAT_MODULES = (".down_proj", ".mlp.Wo", ".output.dense")
BUT_NOT = (".attention.output.dense",)
_LAYER = re.compile(r"\.layers?\.\d+\.")


def load_onnx(source: CheckpointFiles, *, quantized: bool, cache_dir: Path | None) -> "_OnnxRunner":
    """A runner over the graph of these weights, exported first where there is none yet.
    Raises CheckpointError where it cannot be exported or kept, ValueError without its packages or for a listwise model.
    """
    if source.profile.listwise:
        raise ValueError(f"{source.directory}: a listwise model runs in the torch runtime only")
    features = torch.cpu.get_capabilities()
    saturates = features.get("architecture") == "x86_64" and not any(features.get(name) for name in EXACT_INT8)
    try:
        made_of: dict[str, object] = {package: importlib.metadata.version(package) for package in PACKAGES}
    except importlib.metadata.PackageNotFoundError as exc:
        raise ValueError(f"the onnx runtimes need {exc.name}: pip install 'preread[onnx]'") from exc
    made_of |= {"identity": source.fingerprint(), "quantized": quantized, "export_version": EXPORT_VERSION}
    made_of["reduce_range"] = quantized and saturates
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
    graph = (cache_dir or DEFAULT_CACHE).expanduser() / key / "model.onnx"
    if graph.exists():
        try:
            return _OnnxRunner(graph, source, quantized=quantized)
        except CheckpointError as exc:
            log.warning("%s; made once more", exc)
            shutil.rmtree(graph.parent, ignore_errors=True)
    _build(source, graph.parent, made_of)
    return _OnnxRunner(graph, source, quantized=quantized)


class _OnnxRunner:
    """A session, and the head that stands outside of a decoder's graph."""

    device_name = "cpu"

    def __init__(self, path: Path, source: CheckpointFiles, *, quantized: bool) -> None:
        self.dtype_name, self._quantized = "int8" if quantized else "float32", quantized
        self._head, self._side, self._pad_id = read_head(source), source.profile.padding, source.pad_id
        try:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.enable_mem_pattern = False  # plans memory for one shape, and every batch has its own
            options.log_severity_level = 3
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime's own types
            raise CheckpointError(f"{path.parent}: onnxruntime cannot load the graph ({one_line(exc)})") from exc
        self._inputs = {each.name for each in self._session.get_inputs()}  # the exporter drops what is not read

    def margins(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        # Dynamic int8 takes one scale over all activations of a pass: pairs of one pass would change each other's
        # scores, and padding would too. So each is alone; on a CPU that costs little.
        margins: list[NDArray[np.float32]] = []
        for group in [[pair] for pair in pairs] if self._quantized else [pairs]:
            batch = pad([p.ids for p in group], [p.type_ids for p in group], side=self._side, pad_id=self._pad_id)
            (output,) = self._session.run(None, {name: batch[name] for name in self._inputs})  # logits or states
            margins.append(self._head(torch.from_numpy(output)).numpy())
        return np.concatenate(margins)


def _build(source: CheckpointFiles, directory: Path, made_of: dict[str, object]) -> None:
    """Writes aside, then renames: a graph is there whole or not at all."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".making-", dir=directory.parent))
    except OSError as exc:
        raise CheckpointError(f"{directory.parent}: graphs cannot be kept there ({exc})") from exc
    log.info("%s: exporting to ONNX, once for these weights", source.directory)
    try:
        made_of = made_of | {"model": str(source.directory)}
        if made_of["quantized"]:
            plain, reduce_range = aside / "float", bool(made_of["reduce_range"])
            plain.mkdir()
            _export(source, plain / "model.onnx")
            made_of["products_in_float"] = _quantize(plain / "model.onnx", aside / "model.onnx", reduce_range)
            shutil.rmtree(plain)
        else:
            _export(source, aside / "model.onnx")
        (aside / "made-of.json").write_text(json.dumps(made_of, indent=2), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was first; its graph is the same
            os.replace(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _export(source: CheckpointFiles, path: Path) -> None:
    body = Body(source, torch.device("cpu"), torch.float32).eval()
    batch = pad([[source.pad_id] * 8, [source.pad_id] * 12], side=source.profile.padding, pad_id=source.pad_id)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad(), _quiet():
            torch.onnx.export(
                body,
                tuple(torch.from_numpy(batch[name]) for name in body.names),
                str(path),
                input_names=body.names,
                output_names=["output"],
                dynamic_shapes=(tuple(free for _ in body.names),),
                dynamo=True,
                external_data=True,  # one file may hold 2 GB
                verbose=False,
            )
    except Exception as exc:  # the exporter raises its own types and those of everything below it
        raise CheckpointError(
            f"{source.directory}: {source.profile.architectures[0]} cannot be exported to ONNX with torch "
            f"{torch.__version__} ({one_line(exc)}); use the torch runtime"
        ) from exc


def _quantize(source: Path, target: Path, reduce_range: bool) -> int:
    """Weights of matrix products to int8, activations at run time; the number of products that stayed in float.
    `reduce_range` is 7 bits, for processors whose 8-bit products saturate (no VNNI).
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(source))
    # Recorded shapes of weights that the quantizer transposes (Gemm to MatMul) would contradict its own inference.
    del model.graph.value_info[:]
    kept = [node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and _stays_float(node)]
    with _quiet():
        quantize_dynamic(
            model,
            str(target),
            op_types_to_quantize=["MatMul"],  # not the embedding
            nodes_to_exclude=kept + [f"{name}_MatMul" for name in kept],  # the name of a Gemm once it is replaced
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    return len(kept)


def _stays_float(node: Any) -> bool:
    """A second layer of a feed-forward block, or anything outside of the base model's layers: poolers and heads."""
    recorded = (entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes")
    scopes = ast.literal_eval(next(recorded, "[]"))
    module = str(scopes[-2]) if len(scopes) > 1 else ""  # the torch module that it came from
    second = module.endswith(FLOAT_MODULES) and not module.endswith(BUT_NOT)
    return second or (module != "" and not _LAYER.search(module))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's and the quantizer's warnings are advice to their own developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
