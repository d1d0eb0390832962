"""A checkpoint that would give numbers but no scores is refused, with one clear error."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.files import CheckpointError
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from decoder_server.models.cross_encoder.profiles import builtin_profiles

Tiny = Callable[..., Path]
CTXL = "sigridjineth/ctxl-rerank-v2-1b-seq-cls"
QWEN = "Qwen/Qwen3-Reranker-0.6B"


def changed(
    directory: Path,
    target: Path,
    *,
    drop: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """A copy without some tensors or files, or with other configuration."""
    copy = Path(shutil.copytree(directory, target / "copy"))
    for name in without:
        (copy / name).unlink()
    if drop:
        tensors = load_file(copy / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(drop)}
        assert len(kept) < len(tensors)
        save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    if config:
        raw = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(raw | config))
    return copy


@pytest.mark.parametrize(
    ("architecture", "profile", "dropped", "said"),
    [
        ("XLMRobertaForSequenceClassification", "BAAI/bge-reranker-v2-m3", "classifier", "classifier.dense"),
        ("BertForSequenceClassification", "cross-encoder/ms-marco-MiniLM-L6-v2", "classifier", "classifier.bias"),
        ("BertForSequenceClassification", "cross-encoder/ms-marco-MiniLM-L6-v2", "bert.pooler", "pooler.dense"),
        ("DebertaV2ForSequenceClassification", "mixedbread-ai/mxbai-rerank-base-v1", "pooler", "pooler.dense"),
        ("Qwen3ForSequenceClassification", CTXL, "score", "score.weight"),
        ("Qwen3ForSequenceClassification", CTXL, "model.layers.1", "layers.1"),
        ("Qwen3ForCausalLM", QWEN, "lm_head", "lm_head.weight"),
        ("JinaForRanking", "jinaai/jina-reranker-v3", "projector.2", "projector.2.weight"),
    ],
)
def test_weights_that_would_be_random(
    tiny: Tiny, tmp_path: Path, architecture: str, profile: str, dropped: str, said: str
) -> None:
    directory = changed(tiny(architecture), tmp_path, drop=(dropped,))
    with pytest.raises(CheckpointError, match="would be random") as caught:
        open_cross_encoder(directory, profile=profile)
    assert said in str(caught.value)


def test_a_causal_checkpoint_loaded_as_its_conversion(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names the architecture Qwen3ForCausalLM"):
        open_cross_encoder(tiny("Qwen3ForCausalLM"), profile=CTXL)
    # The name changed by hand, nothing converted: transformers would draw a head for two labels.
    renamed = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "SCORE"}}
    directory = changed(tiny("Qwen3ForCausalLM"), tmp_path, config=renamed)
    with pytest.raises(CheckpointError, match=r"score\.weight is not in the checkpoint and would be random; convert"):
        open_cross_encoder(directory, profile=CTXL)


def test_another_architecture(tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match=r"BertForSequenceClassification .* is for XLMRoberta"):
        open_cross_encoder(tiny("BertForSequenceClassification"), profile="BAAI/bge-reranker-base")


def test_a_t5gemma_checkpoint_is_no_cross_encoder(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"T5Gemma2ForConditionalGeneration \(t5gemma2\) cannot be served"):
        open_cross_encoder(tiny_checkpoint)


def test_two_labels_where_one_is_needed_and_the_reverse(tiny: Tiny) -> None:
    two = tiny("BertForSequenceClassification", num_labels=2)
    with pytest.raises(CheckpointError, match=r"has 2 labels; the profile 'cross-encoder/.*' needs 1"):
        open_cross_encoder(two, profile="cross-encoder/ms-marco-MiniLM-L6-v2")
    with pytest.raises(CheckpointError, match=r"has 1 labels; the profile 'amberoad/.*' needs 2"):
        open_cross_encoder(
            tiny("BertForSequenceClassification"), profile="amberoad/bert-multilingual-passage-reranking-msmarco"
        )
    with pytest.raises(CheckpointError, match=r"has 5 labels; a reranker has 1, or 2"):
        open_cross_encoder(tiny("BertForSequenceClassification", num_labels=5))


def test_a_missing_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    files = ("tokenizer.json", "tokenizer_config.json")
    directory = changed(tiny("Qwen3ForCausalLM"), tmp_path, without=files)
    with pytest.raises(CheckpointError, match=r"no tokenizer; expected one of tokenizer\.json"):
        open_cross_encoder(directory, profile=QWEN)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no tokenizer that can be read"):
        open_cross_encoder(directory, profile=QWEN)


def test_a_tokenizer_of_another_model(tiny: Tiny, tmp_path: Path) -> None:
    directory = changed(tiny("Qwen3ForCausalLM"), tmp_path, config={"vocab_size": 300})
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ tokens; the embedding has 300 rows"):
        open_cross_encoder(directory, profile=QWEN)


def test_logits_that_are_scaled_in_a_way_not_known_here(tiny: Tiny, tmp_path: Path) -> None:
    directory = changed(tiny("Qwen3ForCausalLM"), tmp_path, config={"logit_scale": 0.0625})
    with pytest.raises(CheckpointError, match=r"config\.json: logit_scale is 0\.0625"):
        open_cross_encoder(directory, profile=QWEN)


def test_answers_that_the_tokenizer_does_not_know(tiny: Tiny) -> None:
    directory, qwen = tiny("Qwen3ForCausalLM"), builtin_profiles()[QWEN]
    with pytest.raises(CheckpointError, match=r"the yes answer 'yes indeed' is \d+ tokens .*; expected exactly one"):
        open_cross_encoder(directory, profile=dataclasses.replace(qwen, yes="yes indeed"))
    with pytest.raises(CheckpointError, match="yes and no are the same token"):
        open_cross_encoder(directory, profile=dataclasses.replace(qwen, no="yes"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has the shape \(\d+, \d+\); expected row 5000"):
        open_cross_encoder(directory, profile=dataclasses.replace(qwen, yes=5000))


def test_a_decoder_without_a_profile_is_not_guessed(tiny: Tiny) -> None:
    for architecture in ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"):
        with pytest.raises(CheckpointError, match="says neither its prompt nor its readout; give a profile"):
            open_cross_encoder(tiny(architecture))


def test_remote_code_that_does_not_run_here_is_refused_before_anything_is_fetched() -> None:
    for name in ("jinaai/jina-reranker-v1-turbo-en", "jinaai/jina-reranker-v2-base-multilingual"):
        with pytest.raises(CheckpointError, match=f"{name} cannot be served: its remote code .* transformers 5"):
            open_cross_encoder(name, trust_remote_code=True)


def test_remote_code_runs_only_when_it_is_allowed(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="runs Python code that comes with the checkpoint; allow it with"):
        open_cross_encoder("nvidia/llama-nemotron-rerank-1b-v2")
    mapped = {"auto_map": {"AutoModelForSequenceClassification": "modeling.Mine"}}
    directory = changed(tiny("BertForSequenceClassification"), tmp_path, config=mapped)
    with pytest.raises(CheckpointError, match="allow it with"):
        open_cross_encoder(directory)


def test_only_safetensors_are_read(tiny: Tiny, tmp_path: Path) -> None:
    directory = changed(tiny("BertForSequenceClassification"), tmp_path, without=("model.safetensors",))
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin can run code when opened and is not read"):
        open_cross_encoder(directory)


def test_names_that_lead_nowhere() -> None:
    with pytest.raises(CheckpointError, match="no such directory, and not a hub id"):
        open_cross_encoder("/nowhere/at/all")


def test_values_that_are_not_to_be_had(tiny: Tiny) -> None:
    directory = tiny("BertForSequenceClassification")
    with pytest.raises(ValueError, match="runtime is 'tensorrt'; expected torch"):
        open_cross_encoder(directory, runtime="tensorrt")
    with pytest.raises(ValueError, match="dtype is 'float16'; expected auto, float32 or bfloat16"):
        open_cross_encoder(directory, dtype="float16")
    with pytest.raises(CheckpointError, match=r"max_tokens is 513; expected 1\.\.512"):
        open_cross_encoder(directory, max_tokens=513)
