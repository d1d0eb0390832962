"""Every stored tensor is used, known to be unused, or named; every field is applied, known not to matter, or named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.reliability import checkpoints as faults
from checkpoint import Checkpoint, CheckpointError
from checkpoint.synthetic import make_checkpoint

EMBEDDING = "model.encoder.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("unused") / "original")


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def add(directory: Path, **tensors: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(path) | named, path, metadata={"format": "pt"})


def configure(directory: Path, place: str, **values: Any) -> None:
    """Sets fields of a part of config.json, by a path with dots."""
    config = json.loads((directory / "config.json").read_text())
    part = config
    for key in filter(None, place.split(".")):
        part = part[key]
    part.update(values)
    (directory / "config.json").write_text(json.dumps(config))


def load(directory: Path) -> None:
    """What `preread serve` reads of either half."""
    checkpoint = Checkpoint.open(directory)
    checkpoint.encoder_tensors(torch.float32)
    checkpoint.decoder_tensors(torch.float32)


@pytest.mark.parametrize(
    "name",
    [
        "model.encoder.layers.3.mlp.up_proj.weight",  # a fourth layer of three
        "model.decoder.layers.0.self_attn.q_proj.bias",
        "model.decoder.layers.0.self_attn.q_proj.weight_scale",
        "model.encoder.layers.0.mlp.up_proj.weight_scale_inv",
        "model.encoder.layers.0.mlp.up_proj.qweight",
        "model.decoder.layers.0.mlp.down_proj.weight.absmax",
        "base_model.model.model.decoder.layers.0.mlp.down_proj.lora_A.weight",
        "model.decoder.layers.0.cross_attn.q_proj.weight",
        "lm_head.out_proj.bias",
        "lm_head.weight",
        "score.out_proj.weight",
        "anything",
    ],
)
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_tensor_that_neither_half_reads_is_named(directory: Path, name: str, half: str) -> None:
    add(directory, **{name.replace(".", "__"): torch.ones(4)})
    checkpoint = Checkpoint.open(directory)
    with pytest.raises(CheckpointError, match="are not used by this model") as caught:
        getattr(checkpoint, f"{half}_tensors")(torch.float32)
    assert name in str(caught.value)
    with pytest.raises(CheckpointError, match="are not used by this model"):
        _ = checkpoint.identity


def test_what_to_do_about_it_is_said(directory: Path) -> None:
    add(directory, model__decoder__layers__0__mlp__up_proj__lora_A__weight=torch.ones(4))
    with pytest.raises(CheckpointError, match="merge the adapter"):
        load(directory)
    shutil.copy(directory / "model.safetensors", directory / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is there and would not be applied"):
        load(directory)


@pytest.mark.parametrize(
    "name",
    [
        "model.encoder.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.encoder.multi_modal_projector.mm_input_projection_weight",
        "model.encoder.rotary_emb.inv_freq",
        "model.decoder.rotary_emb.sliding_attention_inv_freq",
        "model.encoder.text_model.embed_tokens.embed_scale",
    ],
)
def test_the_vision_tower_and_buffers_are_known_to_be_unused(original: Path, directory: Path, name: str) -> None:
    add(directory, **{name.replace(".", "__"): torch.ones(4)})
    np.testing.assert_array_equal(faults.fbnl_margins(directory), faults.fbnl_margins(original))
    assert Checkpoint.open(directory).identity.fingerprint == Checkpoint.open(original).identity.fingerprint


def untied(tensors: Tensors) -> None:
    """A decoder with an embedding and a head that are not the encoder's."""
    tensors["model.decoder.embed_tokens.weight"] = torch.randn(512, 64, generator=torch.Generator().manual_seed(5)) / 8
    tensors["model.decoder.embed_tokens.eoi_embedding"] = torch.ones(64)


def headed(tensors: Tensors) -> None:
    tensors["lm_head.out_proj.weight"] = torch.randn(512, 64, generator=torch.Generator().manual_seed(6)) / 8


def headed_alike(tensors: Tensors) -> None:
    tensors["lm_head.out_proj.weight"] = tensors[EMBEDDING].clone()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("changes", [(headed,), (headed_alike,), (untied,), (untied, headed), (untied, headed_alike)])
def test_embeddings_and_head_are_those_of_transformers(
    original: Path, directory: Path, changes: tuple[Callable[[Tensors], None], ...], tied: bool
) -> None:
    """A stored head stands, tied or not; where none is stored it is the encoder's embedding, never the decoder's."""
    tensors = load_file(directory / "model.safetensors")
    for change in changes:
        change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    configure(directory, "", tie_word_embeddings=tied)
    if not tied and len(changes) < 2:
        with pytest.raises(CheckpointError, match="tie_word_embeddings is false and"):
            load(directory)
        return
    np.testing.assert_allclose(faults.fbnl_margins(directory), faults.oracle_fbnl(directory, original), atol=1e-4)


def test_the_same_tensor_under_two_names_is_refused(directory: Path) -> None:
    add(directory, model__encoder__text_model__norm__weight=torch.ones(64))
    with pytest.raises(CheckpointError, match=r"are the same tensor encoder\.norm\.weight"):
        load(directory)


def test_a_tensor_in_two_shards_is_refused(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    twice = {EMBEDDING: tensors[EMBEDDING] * 2}
    for file, part in (("model-1.safetensors", tensors), ("model-2.safetensors", twice)):
        save_file(part, directory / file, metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model-1.safetensors") | {EMBEDDING: "model-2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"stored in model-1\.safetensors and in model-2\.safetensors"):
        load(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors and model\.safetensors\.index\.json are both there"):
        load(directory)


@pytest.mark.parametrize("place", ["decoder", "encoder.text_config"])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'; expected 'gelu_pytorch_tanh'"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; expected None"),
        ({"attention_bias": True}, "attention_bias is True; expected False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"is_causal": False}, "is_causal is False; expected True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; expected 'absolute'"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4; expected a multiple of num_key_value_heads, 3"),
        ({"head_dim": 15}, "`head_dim`=15"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; expected `float` > 0.0"),
        ({"sliding_window": None}, "sliding_window is None; expected `int`, got `null`"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}}},
            "rope_type is 'dynamic'",
        ),
        ({"rope_theta": "x"}, "rope_theta is 'x'; expected `float`, got `str`"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 0}}}, "factor is 0"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "bent": 2}}}, "unknown key 'bent'"),
    ],
)
def test_a_field_that_is_not_applied_is_named(directory: Path, place: str, values: dict[str, Any], said: str) -> None:
    configure(directory, place, **values)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    assert said in str(caught.value)


@pytest.mark.parametrize("place", ["decoder", "encoder.text_config"])
@pytest.mark.parametrize(
    "values",
    [
        {"rms_norm_eps": 0.05},
        {"query_pre_attn_scalar": 7},
        {"sliding_window": 3},
        {"sliding_window": 64},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}},
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}},
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {"rope_theta": 500.0, "rope_local_base_freq": 300.0},
    ],
)
def test_a_field_that_is_applied_gives_transformers_margins(
    original: Path, directory: Path, place: str, values: dict[str, Any]
) -> None:
    configure(directory, place, **values)
    np.testing.assert_allclose(faults.fbnl_margins(directory), faults.oracle_fbnl(directory, original), atol=1e-4)


def test_the_published_configuration_loads(directory: Path) -> None:
    """Every field of t5gemma-2-270m-270m's config.json as its authors store it; sizes are the tiny ones."""
    old = {"add_cross_attention": False, "architectures": None, "chunk_size_feed_forward": 0, "prefix": None}
    old |= {"cross_attention_hidden_size": None, "decoder_start_token_id": None, "finetuning_task": None}
    old |= {"is_decoder": False, "is_encoder_decoder": False, "output_attentions": False, "output_hidden_states": False}
    old |= {"return_dict": True, "sep_token_id": None, "task_specific_params": None, "tokenizer_class": None}
    stack = {
        "_sliding_window_pattern": 6, "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
        "dropout_rate": 0.0, "dtype": "bfloat16", "final_logit_softcapping": None, "initializer_range": 0.02,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"factor": 8.0, "rope_theta": 1000000, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 10000, "rope_type": "default"},
        },
        "use_bidirectional_attention": False, "use_cache": True,
    }  # fmt: skip
    configure(directory, "decoder", **stack, is_decoder=True)  # as writers of encoder-decoders set it there
    text = old | stack | {"_name_or_path": "", "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    configure(directory, "encoder.text_config", **text, tie_word_embeddings=True, problem_type=None)
    encoder = {"attention_dropout": 0.0, "boi_token_index": 5, "dropout_rate": 0.0, "dtype": "bfloat16"}
    configure(directory, "encoder", **encoder, initializer_range=0.02, mm_tokens_per_image=256, vocab_size=512)
    top = {"attention_dropout": 0.0, "bos_token_id": 2, "classifier_dropout_rate": 0.0, "dropout_rate": 0.0}
    top |= {"dtype": "bfloat16", "eos_token_id": 1, "pad_token_id": 0, "transformers_version": "5.0.0.dev0"}
    configure(directory, "", **top, is_encoder_decoder=True, initializer_range=0.02, vocab_size=512)
    load(directory)


def test_a_fuzz_of_tensors_and_fields_finds_nothing_silent() -> None:
    """The longer one: python -m benchmarks.reliability checkpoints."""
    found: list[tuple[str, faults.Change]] = []
    rows = faults.run(
        60, 7, lambda architecture, made, what: found.append((architecture, made)) if what == "silent" else None
    )
    assert found == []
    assert sum(row["injected"] for row in rows) == 60
