"""A checkpoint to an ONNX graph in float32 or dynamic int8. Does not know where graphs are kept or how they run.

A decoder's graph ends in the last token's hidden state, so its head stays in float32 outside; an encoder's ends in
its logits, with the head's nodes left in float32.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoint.errors import CheckpointError
from decoder_server.cross_encoder.source import Source
from decoder_server.cross_encoder.torch_loading import load_model
from decoder_server.cross_encoder.transformer import one_line

# Raised whenever the same weights would give another graph.
EXPORT_VERSION = 1
# Second layers of feed-forward blocks, by the end of their module's name: what goes in has outliers, and one scale
# for all of it would drown the rest. Their activations, not their weights, are what int8 loses.
FLOAT_MODULES = (".down_proj", ".mlp.Wo", ".output.dense")
BUT_NOT = (".attention.output.dense",)


_LAYER = re.compile(r"\.layers?\.\d+\.")


class _Graph(torch.nn.Module):
    """What is exported: token ids to logits, or to the last token's hidden state."""

    def __init__(self, model: Any, names: list[str], *, last: bool) -> None:
        super().__init__()
        self.model, self._names, self._last = model, names, last

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        fields = dict(zip(self._names, inputs, strict=True))
        if self._last:
            hidden: torch.Tensor = self.model(**fields, use_cache=False).last_hidden_state[:, -1]
            return hidden
        logits: torch.Tensor = self.model(**fields).logits
        return logits


def input_names(source: Source) -> list[str]:
    """What the graph reads, in order."""
    if source.profile.head in ("score", "vocabulary"):
        return ["input_ids", "attention_mask", "position_ids"]
    return ["input_ids", "attention_mask", *(["token_type_ids"] if source.typed else [])]


def export(source: Source, path: Path) -> None:
    """Writes the float32 graph, weights beside it.

    Raises:
        CheckpointError: this architecture cannot be exported on the installed versions, with the exporter's words.
    """
    last = source.profile.head in ("score", "vocabulary")
    model = load_model(source, torch.float32, torch.device("cpu"))
    names = input_names(source)
    ids = torch.full((2, 12), source.pad_id)
    mask, positions = torch.ones_like(ids), torch.arange(12).repeat(2, 1)
    if source.profile.padding == "left":
        mask[0, :4] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    else:
        mask[0, -4:] = 0
    values = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "token_type_ids": 0 * ids}
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad(), _quiet():
            torch.onnx.export(
                _Graph(model, names, last=last).eval(),
                tuple(values[name] for name in names),
                str(path),
                input_names=names,
                output_names=["output"],
                dynamic_shapes=(tuple(free for _ in names),),
                dynamo=True,
                external_data=True,  # one file may hold 2 GB
                verbose=False,
            )
    except Exception as exc:  # the exporter raises its own types and those of everything below it
        raise CheckpointError(
            f"{source.directory}: {source.profile.architectures[0]} cannot be exported to ONNX with torch "
            f"{torch.__version__} ({one_line(exc)}); use the torch runtime"
        ) from exc


def quantize(source: Path, target: Path, *, reduce_range: bool) -> int:
    """Weights of matrix products to int8, activations at run time; the feed-forward's second layers stay in float.

    Args:
        reduce_range: 7 bits, for processors whose 8-bit products saturate (no VNNI).

    Returns:
        How many products stayed in float.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(source))
    # Recorded shapes of weights that the quantizer transposes (Gemm to MatMul) would contradict its own inference.
    del model.graph.value_info[:]
    kept = [
        node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and _stays_float(_module(node))
    ]
    with _quiet():
        quantize_dynamic(
            model,
            str(target),
            op_types_to_quantize=["MatMul"],  # not the embedding
            nodes_to_exclude=kept + [f"{name}_MatMul" for name in kept],  # what a Gemm is called once it is replaced
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    return len(kept)


def _module(node: Any) -> str:
    """The torch module that a node came from, as the exporter recorded it."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = ast.literal_eval(entry.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def _stays_float(module: str) -> bool:
    """A second layer of a feed-forward block, or anything outside of the base model's layers: poolers and heads."""
    second = module.endswith(FLOAT_MODULES) and not module.endswith(BUT_NOT)
    return second or (module != "" and not _LAYER.search(module))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's and the quantizer's warnings are advice to their own developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
