"""Quantized checkpoints score as their dequantized weights do, in every layout, or are refused with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from checkpoint import Checkpoint, CheckpointError
from checkpoint.synthetic import make_checkpoint
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair
from encoder_worker.encoder import Encoder
from preread_cli.main import cli

Tiny = Callable[..., Path]
CTXL = "ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b"
PAIRS = [("What is the capital of China?", None, "Beijing."), ("gravity", None, "Bodies attract one another. " * 9)]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELOPT = {"producer": {"name": "modelopt", "version": "0.33"}}


def fp8(weight: torch.Tensor, *, per_row: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Stored tensors by suffix, and the plain weight, row by row."""
    largest = weight.abs().amax(dim=1, keepdim=True) if per_row else weight.abs().max()
    scale = largest / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    plain = torch.stack([row * (scale[i, 0] if per_row else scale) for i, row in enumerate(stored.float())])
    return {"weight": stored, "weight_scale": scale}, plain


def nvfp4(weight: torch.Tensor, *, packed: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same for 4-bit floats with a scale per 16 numbers and one overall."""
    overall = weight.abs().max() / (6 * 448)
    blocks = weight.unflatten(1, (-1, 16))
    scales = (blocks.abs().amax(2) / 6 / overall).to(torch.float8_e4m3fn)
    step = (scales.float() * overall).repeat_interleave(16, dim=1)
    levels = step[..., None] * torch.tensor(E2M1)  # (out, in, 8)
    nearest = (levels - weight.abs()[..., None]).abs().argmin(2)
    plain = levels.gather(2, nearest[..., None])[..., 0] * weight.sign()
    codes = (nearest + 8 * (weight < 0)).to(torch.uint8)
    both = codes[:, 0::2] + 16 * codes[:, 1::2]  # the earlier number in the low half
    if packed:
        return {"weight_packed": both, "weight_scale": scales, "weight_global_scale": (1 / overall).reshape(1)}, plain
    return {"weight": both, "weight_scale": scales, "weight_scale_2": overall}, plain


def compressed(form: str, strategy: str, bits: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": bits, "dynamic": True}}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


# name: how a weight is stored, config.json's part, and hf_quant_config.json
LAYOUTS: dict[str, tuple[Callable[[torch.Tensor], Any], dict[str, Any], dict[str, Any] | None]] = {
    "modelopt FP8, said in config.json": (
        lambda w: fp8(w, per_row=False),
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, None,
    ),
    "modelopt FP8, said in hf_quant_config.json alone": (
        lambda w: fp8(w, per_row=False), {},
        MODELOPT | {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
    ),
    "compressed-tensors FP8 by channel": (
        lambda w: fp8(w, per_row=True), {"quantization_config": compressed("float-quantized", "channel", 8)}, None,
    ),
    "modelopt NVFP4": (
        lambda w: nvfp4(w, packed=False), {},
        MODELOPT | {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}},
    ),
    "compressed-tensors NVFP4": (
        lambda w: nvfp4(w, packed=True),
        {"quantization_config": compressed("nvfp4-pack-quantized", "tensor_group", 4)}, None,
    ),
}  # fmt: skip


def quantized(source: Path, target: Path, layout: str, projections: tuple[str, ...] = PROJECTIONS) -> tuple[Path, Path]:
    """Two copies: every projection quantized with scales of activations beside it, and its plain values."""
    store, config, beside = LAYOUTS[layout]
    folders = [Path(shutil.copytree(source, target / name)) for name in ("quantized", "plain")]
    stored, plain = load_file(source / "model.safetensors"), load_file(source / "model.safetensors")
    for name in list(plain):
        module = name.removesuffix(".weight")
        if module.endswith(projections) and "vision" not in name:
            tensors, plain[name] = store(stored.pop(name).float())
            stored |= {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}
            stored[f"{module}.input_scale"] = torch.tensor(0.01)
            if module.endswith(("k_proj", "v_proj")):
                stored[f"{module}.{module[-6]}_scale"] = torch.tensor(0.02)
    for folder, tensors in zip(folders, (stored, plain), strict=True):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folders[0] / "config.json", **config)
    if beside is not None:
        (folders[0] / "hf_quant_config.json").write_text(json.dumps(beside))
    return folders[0], folders[1]


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "XLMRobertaForSequenceClassification"])
def test_a_quantized_cross_encoder_scores_as_its_plain_weights(
    tiny: Tiny, tmp_path: Path, architecture: str, layout: str
) -> None:
    source = tiny(architecture)
    projections = ("query", "key", "value", "dense") if architecture.startswith("XLM") else PROJECTIONS
    small, plain = quantized(source, tmp_path, layout, projections)
    profile = CTXL if architecture.startswith("Qwen") else "generic"
    margins = [open_cross_encoder(d, profile=profile, dtype="float32").score_texts(PAIRS) for d in (small, plain)]
    np.testing.assert_allclose(margins[0], margins[1], atol=1e-5)
    untouched = open_cross_encoder(source, profile=profile, dtype="float32").score_texts(PAIRS)
    assert np.abs(margins[0] - untouched).max() > 1e-4  # quantization does change scores


def test_onnx_computes_with_the_plain_weights(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    small, plain = quantized(tiny("Qwen3ForCausalLM"), tmp_path, "compressed-tensors NVFP4")
    model = open_cross_encoder(small, profile=CTXL, runtime="onnx", cache_dir=tmp_path / "graphs")
    expected = open_cross_encoder(plain, profile=CTXL, dtype="float32").score_texts(PAIRS)
    np.testing.assert_allclose(model.score_texts(PAIRS), expected, atol=1e-4)


def fbnl_margins(directory: Path) -> NDArray[np.float32]:
    checkpoint = Checkpoint.open(directory)
    encoder = Encoder(checkpoint, device="cpu", dtype="float32")
    backend = FbnlBackend(checkpoint, device="cpu", dtype="float32")
    states = encoder.encode([p.ids for p in checkpoint.text.passages([pair[2] for pair in PAIRS])], 4)
    return backend.score([StatePair(backend.prompt("What is it?"), each) for each in states])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantized_fbnl_checkpoint_scores_as_its_plain_weights(tmp_path: Path, layout: str) -> None:
    small, plain = quantized(make_checkpoint(tmp_path / "source"), tmp_path, layout)
    np.testing.assert_allclose(fbnl_margins(small), fbnl_margins(plain), atol=1e-5)
    before = Checkpoint.open(small).identity.fingerprint
    assert before != Checkpoint.open(plain).identity.fingerprint
    tensors = load_file(small / "model.safetensors")
    name = next(n for n in tensors if "encoder" in n and n.endswith("mlp.up_proj.weight_scale"))
    tensors[name] = tensors[name].float().mul(2).to(tensors[name].dtype)
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint.open(small).identity.fingerprint != before  # a scale is part of what was encoded


@pytest.mark.parametrize("layout", ["modelopt FP8, said in hf_quant_config.json alone", "compressed-tensors NVFP4"])
def test_check_and_conversion_read_them_too(tiny: Tiny, tmp_path: Path, layout: str) -> None:
    small, plain = quantized(tiny("Qwen3ForCausalLM"), tmp_path, layout)
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"query": query, "passage": f"{passage} {i}"} for i in range(12) for query, _, passage in PAIRS]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = CliRunner().invoke
    converted = tmp_path / "converted"
    result = run(cli, ["convert-ctxl", str(small), str(converted), "--pairs", str(pairs)])
    assert result.exit_code == 0, result.output
    kept = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in kept
    margins = open_cross_encoder(converted, dtype="float32").score_texts(PAIRS)
    np.testing.assert_allclose(
        margins, open_cross_encoder(plain, profile=CTXL, dtype="float32").score_texts(PAIRS), atol=1e-5
    )
    checked = ["check", str(small), "--profile", CTXL, "--dtype", "float32", "--pairs", str(pairs)]
    result = run(cli, [*checked, "--against", "fp32"])
    assert "against plain float32" in result.output


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, None, r"quantized \(gptq\); serve"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, None, r"quantized \(awq\)"),
    "fine-grained fp8": ({"quantization_config": {"quant_method": "fp8"}}, None, r"quantized \(fp8\)"),
    "bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, None, r"quantized \(unknown\)"),
    "modelopt W4A8": ({}, MODELOPT | {"quantization": {"quant_algo": "W4A8_AWQ"}}, "quant_algo is 'W4A8_AWQ'"),
    "modelopt block FP8": ({}, MODELOPT | {"quantization": {"quant_algo": "FP8_PB_WO"}}, "quant_algo is 'FP8_PB_WO'"),
    "int4": ({"quantization_config": compressed("pack-quantized", "group", 4)}, None, "format is 'pack-quantized'"),
    "frozen": (
        {"quantization_config": compressed("float-quantized", "channel", 8) | {"quantization_status": "frozen"}}, None,
        "quantization_status is 'frozen'",
    ),
    "rotated": (
        {"quantization_config": compressed("float-quantized", "channel", 8) | {"transform_config": {"r1": {}}}}, None,
        "transform_config, which is not applied",
    ),
    "sparse": (
        {"quantization_config": compressed("float-quantized", "channel", 8)
         | {"sparsity_config": {"format": "sparse-24-bitmask"}}}, None, "sparsity_config",
    ),
}  # fmt: skip


@pytest.mark.parametrize("scheme", REFUSED)
def test_every_other_scheme_is_refused_with_what_to_do(tiny: Tiny, tmp_path: Path, scheme: str) -> None:
    config, beside, said = REFUSED[scheme]
    for number, source in enumerate((tiny("Qwen3ForCausalLM"), make_checkpoint(tmp_path / "fbnl"))):
        directory = Path(shutil.copytree(source, tmp_path / f"copy{number}"))
        edit(directory / "config.json", **config)
        if beside is not None:
            (directory / "hf_quant_config.json").write_text(json.dumps(beside))
        with pytest.raises(CheckpointError, match=said) as caught:
            fbnl_margins(directory) if number else open_cross_encoder(directory, profile=CTXL)
        assert "serve the unquantized checkpoint" in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t, m: t.pop(f"{m}.weight_scale"), "its weight_scale has none"),
        (lambda t, m: t.update({f"{m}.weight_scale": torch.ones(3)}), r"its weight_scale has shape \(3,\)"),
        (lambda t, m: t.update({f"{m}.weight_scale": torch.ones(1, dtype=torch.uint8)}), "stored as U8"),
        (lambda t, m: t.update({f"{m}.pre_quant_scale": torch.ones(3)}), "pre_quant_scale"),
        (lambda t, m: t.update({f"{m}.weight_zero_point": torch.zeros(1)}), "weight_zero_point"),
        (lambda t, m: t.update({"other.input_scale": torch.ones(1)}), r"other\.input_scale"),
        (lambda t, m: t.update({f"{m}.weight": t[f"{m}.weight"].float().to(torch.float8_e5m2)}), "stored as F8_E5M2"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    tiny: Tiny, tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor], str], None], said: str
) -> None:
    small, _ = quantized(tiny("Qwen3ForCausalLM"), tmp_path, "modelopt FP8, said in config.json")
    tensors = load_file(small / "model.safetensors")
    spoil(tensors, "model.layers.1.mlp.up_proj")
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        open_cross_encoder(small, profile=CTXL)


def test_quantized_weights_that_nothing_declares_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    small, _ = quantized(tiny("Qwen3ForCausalLM"), tmp_path, "modelopt FP8, said in config.json")
    config = json.loads((small / "config.json").read_text())
    del config["quantization_config"]
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="stored as F8_E4M3"):
        open_cross_encoder(small, profile=CTXL)
