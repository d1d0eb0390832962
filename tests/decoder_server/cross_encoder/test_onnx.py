"""ONNX graphs score like torch, int8 stays near, and a graph is made once for its weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.files import CheckpointError
from decoder_server.models.cross_encoder import onnx_runtime
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from decoder_server.models.cross_encoder.profiles import builtin_profiles

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

Tiny = Callable[..., Path]
QWEN, BGE = "Qwen/Qwen3-Reranker-0.6B", "BAAI/bge-reranker-v2-m3"
TEXTS = [
    ("What is the capital of China?", None, "The capital of China is Beijing."),
    ("gravity", None, "Gravity attracts bodies toward one another. " * 9),
    ("수도는 어디인가?", None, "서울이다."),
]


@pytest.mark.slow
def test_a_graph_scores_like_torch_and_is_made_once(tiny: Tiny, tmp_path: Path) -> None:
    directory, profile = tiny("Qwen3ForCausalLM"), QWEN
    expected = open_cross_encoder(directory, profile=profile, dtype="float32").score_texts(TEXTS)
    model = open_cross_encoder(directory, profile=profile, runtime="onnx", cache_dir=tmp_path)
    assert (model.runtime, model.dtype_name, model.device_name) == ("onnx", "float32", "cpu")
    np.testing.assert_allclose(model.score(model.read(TEXTS)), expected, atol=3e-5)
    (made,) = tmp_path.iterdir()
    before = (made / "model.onnx").stat()
    again = open_cross_encoder(directory, profile=profile, runtime="onnx", cache_dir=tmp_path)
    np.testing.assert_array_equal(again.score_texts(TEXTS), model.score_texts(TEXTS))
    assert (made / "model.onnx").stat().st_ino == before.st_ino
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


def with_outliers(directory: Path, target: Path) -> Path:
    """A copy where two channels between the feed-forward layers are a hundred times the others, as trained ones are."""
    copy = Path(shutil.copytree(directory, target))
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("intermediate.dense.weight"):
            tensor[:2] *= 100
        elif name.endswith(".output.dense.weight") and "attention" not in name:
            tensor[:, :2] /= 100
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.slow
def test_int8_leaves_head_and_second_layers_in_float(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = with_outliers(tiny("XLMRobertaForSequenceClassification"), tmp_path / "model")
    exact = open_cross_encoder(directory, profile=BGE, dtype="float32").score_texts(TEXTS)
    open_cross_encoder(directory, profile=BGE, runtime="onnx", cache_dir=tmp_path / "float")
    (exported,) = (tmp_path / "float").iterdir()
    # Exporting takes seconds: the cache gets this graph again.
    copy = lambda _, inputs, path, **how: shutil.copytree(exported, Path(path).parent, dirs_exist_ok=True)  # noqa: E731
    monkeypatch.setattr(torch.onnx, "export", copy)
    model = open_cross_encoder(directory, profile=BGE, runtime="onnx-int8", cache_dir=tmp_path / "graphs")
    assert model.dtype_name == "int8"
    margins = model.score_texts(TEXTS)
    np.testing.assert_allclose(margins, exact, atol=0.1)
    assert not np.array_equal(margins, exact)
    # Batch-mates change nothing at all.
    np.testing.assert_array_equal(model.score(model.read(TEXTS)), margins)
    np.testing.assert_array_equal(np.concatenate([model.score_texts([text]) for text in TEXTS]), margins)
    (made,) = (tmp_path / "graphs").iterdir()
    counts: dict[str, int] = {}
    for node in onnx.load(str(made / "model.onnx"), load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    # Per layer: query, key, value, attention output and the first feed-forward layer in int8; the second in float,
    # as are attention's two own products and the head's two.
    assert counts["MatMulInteger"] == 5 * 2
    assert counts["MatMul"] == (1 + 2) * 2 + 2
    assert json.loads((made / "made-of.json").read_text())["products_in_float"] == 2 + 2
    # With the second layers in int8 too, two loud channels drown the rest.
    monkeypatch.setattr(onnx_runtime, "FLOAT_MODULES", ("none",))
    all_int8 = open_cross_encoder(directory, profile=BGE, runtime="onnx-int8", cache_dir=tmp_path / "all")
    drowned = all_int8.score_texts(TEXTS)
    assert np.abs(drowned - exact).max() > 3 * np.abs(margins - exact).max()


def save_echo(model: object, inputs: object, path: str, **how: object) -> None:
    """In the place of torch's exporter: a graph that can be quantized and loaded, whose output no head fits."""
    ids, output = (
        onnx.helper.make_tensor_value_info(name, kind, ["rows", "length"])
        for name, kind in (("input_ids", onnx.TensorProto.INT64), ("output", onnx.TensorProto.FLOAT))
    )
    cast = onnx.helper.make_node("Cast", ["input_ids"], ["output"], to=onnx.TensorProto.FLOAT)
    graph = onnx.helper.make_graph([cast], "echo", [ids], [output])
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), path)


def test_other_weights_or_another_profile_are_another_graph(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", save_echo)
    graphs = tmp_path / "graphs"
    directory = tiny("Qwen3ForCausalLM")
    moved = Path(shutil.copytree(directory, tmp_path / "moved"))
    retrained = tiny("Qwen3ForCausalLM", seed=1)
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(directory / name, retrained)
    counts = []
    for place, profile, runtime in (
        (directory, QWEN, "onnx"),
        (moved, QWEN, "onnx"),
        (retrained, QWEN, "onnx"),
        (directory, "zeroentropy/zerank-1-small", "onnx"),
        (directory, QWEN, "onnx-int8"),
    ):
        with pytest.raises(CheckpointError, match="the first forward pass failed"):
            open_cross_encoder(place, profile=profile, runtime=runtime, cache_dir=graphs)
        counts.append(len(list(graphs.iterdir())))
    assert counts == [1, 1, 2, 3, 4]
    made_of = [json.loads((made / "made-of.json").read_text()) for made in graphs.iterdir()]
    assert all({"torch", "transformers", "onnx", "onnxruntime"} <= each.keys() for each in made_of)


def test_a_damaged_graph_is_made_once_more_or_told(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny("Qwen3ForCausalLM")
    monkeypatch.setattr(torch.onnx, "export", lambda _, inputs, path, **how: Path(path).write_bytes(b"not a graph"))
    for is_damaged in (False, True):
        with pytest.raises(CheckpointError, match="onnxruntime cannot load the graph"):
            open_cross_encoder(directory, profile=QWEN, runtime="onnx", cache_dir=tmp_path)
        assert ("made once more" in caplog.text) == is_damaged


def test_what_the_onnx_runtimes_do_not_do_is_said(tiny: Tiny) -> None:
    directory = tiny("Qwen3ForCausalLM")
    with pytest.raises(ValueError, match="device is 'cuda'; the runtime 'onnx' computes on the CPU"):
        open_cross_encoder(directory, profile=QWEN, runtime="onnx", device="cuda")
    with pytest.raises(ValueError, match="dtype is 'bfloat16'; the runtime 'onnx-int8' computes in float32"):
        open_cross_encoder(directory, profile=QWEN, runtime="onnx-int8", dtype="bfloat16")
    profile = dataclasses.replace(builtin_profiles()["jinaai/jina-reranker-v3"], max_passage_tokens=64)
    with pytest.raises(ValueError, match="a listwise model runs in the torch runtime only"):
        open_cross_encoder(tiny("JinaForRanking"), profile=profile, runtime="onnx")


def test_a_place_that_cannot_be_written_is_named(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="graphs cannot be kept there"):
        open_cross_encoder(tiny("Qwen3ForCausalLM"), profile=QWEN, runtime="onnx", cache_dir=tmp_path / "file" / "x")
