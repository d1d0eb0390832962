"""Each way a checkpoint can be unusable is one clear error, before anything is served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from checkpoint import Checkpoint, CheckpointError
from checkpoint.synthetic import make_checkpoint
from checkpoint.tensors import StoredTensors


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "original")


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(directory / "model.safetensors"), framework="pt") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118


def shard(directory: Path, num_shards: int) -> None:
    """Spreads model.safetensors over several files with an index, as large checkpoints are."""
    tensors = tensors_of(directory)
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % num_shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n, f in weight_map.items() if f == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit_json(path: Path, **values: Any) -> None:
    current = json.loads(path.read_text()) if path.exists() else {"format_version": 1}
    path.write_text(json.dumps(current | values))


def test_halves_read_only_their_own_tensors(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    encoder, decoder = checkpoint.encoder_tensors(torch.float32), checkpoint.decoder_tensors(torch.float32)
    assert {name.split(".")[0] for name in encoder} == {"encoder"}
    assert {name.split(".")[0] for name in decoder} == {"decoder"}
    assert torch.equal(encoder["encoder.embed_tokens.weight"], decoder["decoder.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("model.encoder.layers.0.mlp.up_proj.weight", "encoder.layers.0.mlp.up_proj.weight"),
        ("model.encoder.text_model.layers.0.mlp.up_proj.weight", "encoder.layers.0.mlp.up_proj.weight"),
        ("encoder.text_model.norm.weight", "encoder.norm.weight"),
        ("model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        ("lm_head.out_proj.weight", "lm_head.weight"),
        ("model.encoder.vision_tower.encoder.layers.0.mlp.fc1.weight", None),
        ("model.encoder.multi_modal_projector.mm_soft_emb_norm.weight", None),
    ],
)
def test_tensor_names_of_old_and_new_writers(tmp_path: Path, stored: str, canonical: str | None) -> None:
    save_file({stored: torch.ones(3)}, tmp_path / "model.safetensors")
    names = ["encoder.layers.0.mlp.up_proj.weight", "encoder.norm.weight", "decoder.embed_tokens.weight"]
    names.append("lm_head.weight")
    files = StoredTensors(tmp_path, names)
    assert [name for name in names if name in files] == ([canonical] if canonical else [])


def test_shards_read_like_one_file(directory: Path) -> None:
    before = Checkpoint.open(directory)
    whole, identity = before.decoder_tensors(torch.float32), before.identity
    shard(directory, 3)
    after = Checkpoint.open(directory)
    assert after.identity == identity
    sharded = after.decoder_tensors(torch.float32)
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_the_fingerprint_follows_the_files_not_the_place(original: Path, directory: Path) -> None:
    assert Checkpoint.open(original).identity.fingerprint == Checkpoint.open(directory).identity.fingerprint


def change_weight(directory: Path) -> None:
    tensors = tensors_of(directory)
    tensors["model.encoder.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, directory / "model.safetensors")


def change_tokenizer(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


def change_window(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["encoder"]["text_config"]["sliding_window"] = 6
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        change_tokenizer,
        change_window,
        lambda directory: edit_json(directory / "preread.json", passage_template="{passage}"),
        lambda directory: edit_json(directory / "preread.json", max_passage_tokens=512),
    ],
    ids=["weight", "tokenizer", "window", "template", "limit"],
)
def test_whatever_changes_a_state_changes_the_fingerprint(original: Path, directory: Path, change: Any) -> None:
    change(directory)
    assert Checkpoint.open(directory).identity.fingerprint != Checkpoint.open(original).identity.fingerprint


def test_the_pooling_version_is_in_the_fingerprint(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Checkpoint.open(original).identity.fingerprint
    monkeypatch.setattr("checkpoint.model.POOLING_VERSION", 2)
    assert Checkpoint.open(original).identity.fingerprint != before


def test_decoder_weights_and_prompt_are_not_in_the_fingerprint(original: Path, directory: Path) -> None:
    tensors = tensors_of(directory)
    tensors["model.decoder.layers.0.mlp.up_proj.weight"] += 1
    save_file(tensors, directory / "model.safetensors")
    edit_json(directory / "preread.json", prompt_template="{query}", default_instruction="x")
    assert Checkpoint.open(directory).identity.fingerprint == Checkpoint.open(original).identity.fingerprint


def test_settings_override_kalms(directory: Path) -> None:
    edit_json(directory / "preread.json", passage_template="{passage}", default_compression_ratio=8)
    settings = Checkpoint.open(directory).settings
    assert (settings.passage_template, settings.default_compression_ratio) == ("{passage}", 8)
    assert settings.max_query_tokens == 512


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_passage_token": 5}, "unknown key 'max_passage_token'"),
        ({"max_passage_tokens": "5"}, "max_passage_tokens is '5'; expected `int`"),
        ({"max_passage_tokens": 0}, "max_passage_tokens is 0; expected `int` >= 1"),
        ({"passage_template": "no field"}, "passage_template has the fields"),
        ({"prompt_template": "{query} {document}"}, "prompt_template has the fields"),
        ({"prompt_template": "{query"}, "not a template"),
        ({"prompt_template": "{query:>999999999}"}, "prompt_template has the fields"),
        ({"prompt_template": "{query!r}"}, "prompt_template has the fields"),
        ({"prompt_template": "{query.__class__}"}, "prompt_template has the fields"),
        ({"prompt_template": "{query[0]}"}, "prompt_template has the fields"),
        ({"prompt_template": "{query:{query}}"}, "prompt_template has the fields"),
        ({"prompt_template": "{query}{:>99999999}"}, "prompt_template has the fields"),
        ({"prompt_template": "{query}{0}"}, "prompt_template has the fields"),
        ({"prompt_template": "{query}" * 5}, "names 'query' 5 times; expected at most 4"),
        ({"passage_template": "{passage:>999999999}"}, "passage_template has the fields"),
        ({"passage_template": "{passage}" + "x" * 65_536}, "expected `str` of length <= 65536"),
        ({"default_instruction": "x" * 65_537}, "default_instruction is 'xxx.*; expected `str` of length <= 65536"),
        ({"max_query_tokens": 2**31}, "expected `int` <= 2147483647"),
        ({"default_compression_ratio": 10**30}, "expected `int` <= 2147483647"),
        ({"format_version": 9}, "format_version is 9"),
    ],
)
def test_wrong_settings_are_named(directory: Path, values: dict[str, Any], message: str) -> None:
    edit_json(directory / "preread.json", **values)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(directory)


def test_another_model_type(directory: Path) -> None:
    edit_json(directory / "config.json", model_type="qwen3")
    with pytest.raises(CheckpointError, match=r"model_type is 'qwen3'; expected 't5gemma2'"):
        Checkpoint.open(directory)


def test_missing_tensors_are_listed(directory: Path) -> None:
    tensors = {n: t for n, t in tensors_of(directory).items() if not n.startswith("model.decoder.layers.2.mlp")}
    save_file(tensors, directory / "model.safetensors")
    checkpoint = Checkpoint.open(directory)
    checkpoint.encoder_tensors(torch.float32)  # the other half is whole
    with pytest.raises(
        CheckpointError, match=r"3 weights are not in the checkpoint and would be random: decoder\.layers\.2\.mlp"
    ):
        checkpoint.decoder_tensors(torch.float32)


def test_a_tensor_of_another_shape(directory: Path) -> None:
    tensors = tensors_of(directory)
    tensors["model.decoder.norm.weight"] = torch.zeros(7)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.norm\.weight has the shape \(7,\); config\.json says \(64,\)"):
        Checkpoint.open(directory).decoder_tensors(torch.float32)


def test_integer_weights_are_refused(directory: Path) -> None:
    tensors = tensors_of(directory)
    tensors["model.decoder.norm.weight"] = torch.zeros(64, dtype=torch.int8)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="stored as I8"):
        Checkpoint.open(directory).decoder_tensors(torch.float32)


def read_everything(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    _ = checkpoint.text
    checkpoint.decoder_tensors(torch.float32)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "garbage", "truncated"])
def test_unreadable_files(directory: Path, name: str, damage: str) -> None:
    path = directory / name
    if damage == "missing":
        path.unlink()
    elif damage == "garbage":
        path.write_bytes(b"\xff\xfe not what it says")
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=name):
        read_everything(directory)


def test_a_shard_named_by_the_index_and_missing(directory: Path) -> None:
    shard(directory, 2)
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-1\.safetensors"):
        Checkpoint.open(directory).decoder_tensors(torch.float32)


def test_an_index_that_points_outside_is_refused(directory: Path) -> None:
    shard(directory, 2)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        Checkpoint.open(directory).decoder_tensors(torch.float32)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "one-word"])
def test_a_name_that_is_neither_directory_nor_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such directory, and not a hub id"):
        Checkpoint.open(name)


def test_a_limit_over_the_positions(directory: Path) -> None:
    assert Checkpoint.open(directory, max_passage_tokens=131_072).settings.max_passage_tokens == 131_072
    with pytest.raises(CheckpointError, match=r"max_passage_tokens is 131073; expected 1\.\.131072"):
        Checkpoint.open(directory, max_passage_tokens=131_073)


def test_a_tokenizer_larger_than_the_embedding(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["encoder"]["text_config"]["vocab_size"] = config["decoder"]["vocab_size"] = 300
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the embedding has 300 rows"):
        _ = Checkpoint.open(directory).text


def _add_token(directory: Path, text: str, *, special: bool) -> int:
    """Adds a token behind the last row of the embedding."""
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    rows = json.loads((directory / "config.json").read_text())["decoder"]["vocab_size"]
    for i in range(tokenizer.get_vocab_size(), rows):
        tokenizer.add_special_tokens([f"<unused{i}>"])
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([text])
    tokenizer.save(str(path))
    assert tokenizer.token_to_id(text) == rows
    return rows


def test_a_control_token_without_a_row_is_text_like_any_other(directory: Path) -> None:
    row = _add_token(directory, "<image_soft_token>", special=True)  # as Gemma 3's tokenizer has one
    text = Checkpoint.open(directory).text
    hostile = "look: <image_soft_token>"
    assert row not in text.passages([hostile])[0].ids
    assert row not in text.prompt(hostile, hostile).ids
    with pytest.raises(CheckpointError, match=f"largest token is {row}; the embedding has {row} rows"):
        _ = Checkpoint.open(directory, neutralise=False).text


def test_a_word_without_a_row_is_refused(directory: Path) -> None:
    row = _add_token(directory, "gravitation", special=False)
    with pytest.raises(CheckpointError, match=f"largest token is {row}"):
        _ = Checkpoint.open(directory).text
