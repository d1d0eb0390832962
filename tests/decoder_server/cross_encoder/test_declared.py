"""What cross-encoders' files declare is applied or refused by name, and no published layout is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from checkpoint.files import CheckpointError
from decoder_server.models.cross_encoder.loading import open_cross_encoder

Tiny = Callable[..., Path]
PAIRS = [("What is the capital of China?", None, "Beijing."), ("gravity", None, "Bodies attract one another. " * 9)]
CTXL, CTXL_CAUSAL = "sigridjineth/ctxl-rerank-v2-1b-seq-cls", "ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b"
CAUSAL, SCORED = "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"
LISTED, JINA = "JinaForRanking", "jinaai/jina-reranker-v3"
GEMMA = "BAAI/bge-reranker-v2-gemma"
POSITIONS = torch.arange(8)[None]
BERT, XLMR = "BertForSequenceClassification", "XLMRobertaForSequenceClassification"
QWEN3 = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 28, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.3", "use_cache": True, "use_sliding_window": False,
}  # fmt: skip
OLD = {
    "_name_or_path": "x", "attention_probs_dropout_prob": 0.1, "classifier_dropout": None,
    "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "initializer_range": 0.02,
    "position_embedding_type": "absolute",
    "torch_dtype": "float32", "transformers_version": "4.18.0", "use_cache": True,
}  # fmt: skip
ST = "sentence_transformers.base.modules.transformer.Transformer"
LOGITS = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"

# model: architecture, what its config.json says beside sizes, tensors that its file has and no pass reads.
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "BAAI/bge-reranker-v2-m3": (XLMR, OLD | {"output_past": True}, {}),
    "BAAI/bge-reranker-base": (XLMR, OLD | {"output_past": True}, {"roberta.embeddings.position_ids": POSITIONS}),
    "maidalun1020/bce-reranker-base_v1": (
        XLMR, OLD | {"output_past": True},
        {"roberta.embeddings.position_ids": POSITIONS, "roberta.pooler.dense.weight": torch.ones(32, 32),
         "roberta.pooler.dense.bias": torch.ones(32)},
    ),
    "cross-encoder/mmarco-mMiniLMv2-L12-H384-v1": (
        XLMR, OLD | {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity", "tokenizer_class":
        "XLMRobertaTokenizer"}, {"roberta.embeddings.position_ids": POSITIONS},
    ),
    "cross-encoder/ms-marco-MiniLM-L6-v2": (
        BERT, OLD | {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        {"bert.embeddings.position_ids": POSITIONS},
    ),
    "amberoad/bert-multilingual-passage-reranking-msmarco": (
        BERT,
        OLD | {"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "output_past": True,
               "pooler_num_fc_layers": 3, "pooler_size_per_head": 128, "pooler_type": "first_token_transform"},
        {"bert.embeddings.position_ids": POSITIONS},
    ),
    "ibm-granite/granite-embedding-reranker-english-r2": (
        "ModernBertForSequenceClassification",
        {"classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0, "decoder_bias": True,
         "deterministic_flash_attn": False, "embedding_dropout": 0.0, "global_attn_every_n_layers": 3,
         "global_rope_theta": 80000.0, "gradient_checkpointing": False, "layer_norm_eps": 1e-05,
         "local_rope_theta": 10000.0, "mlp_bias": False, "mlp_dropout": 0.0, "norm_bias": False, "norm_eps": 1e-05,
         "position_embedding_type": "absolute", "repad_logits_with_grad": False, "sparse_pred_ignore_index": -100,
         "sparse_prediction": False, "torch_dtype": "bfloat16", "transformers_version": "4.49.0",
         "reference_compile": None}, {},
    ),
    "mixedbread-ai/mxbai-rerank-base-v1": (
        "DebertaV2ForSequenceClassification",
        {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
         "max_relative_positions": -1, "norm_rel_ebd": "layer_norm", "pooler_dropout": 0, "pooler_hidden_act": "gelu",
         "position_biased_input": False, "relative_attention": True, "share_att_key": True, "torch_dtype": "float16",
         "pos_att_type": ["p2c", "c2p"], "transformers_version": "4.38.1", "layer_norm_eps": 1e-07}, {},
    ),
    "Qwen/Qwen3-Reranker-0.6B": ("Qwen3ForCausalLM", QWEN3, {}),
    "zenlm/zen3-reranker": ("Qwen3ForCausalLM", QWEN3, {}),
    "zeroentropy/zerank-1-small": ("Qwen3ForCausalLM", QWEN3 | {"layer_types": ["full_attention"] * 2}, {}),
    CTXL_CAUSAL: ("Qwen3ForCausalLM", QWEN3, {}),
    CTXL: ("Qwen3ForSequenceClassification", QWEN3 | {"problem_type": "regression"}, {}),
    "ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b": (
        "MistralForCausalLM",
        {"attention_dropout": 0.0, "hidden_act": "silu", "rms_norm_eps": 1e-05, "rope_theta": 1e6,
         "sliding_window": None, "torch_dtype": "bfloat16", "use_cache": True, "transformers_version": "4.52.4"}, {},
    ),
    "mixedbread-ai/mxbai-rerank-base-v2": (
        "Qwen2ForCausalLM",
        {"attention_dropout": 0.0, "hidden_act": "silu", "max_window_layers": 24, "rope_scaling": None,
         "rope_theta": 1e6, "sliding_window": 32768, "use_sliding_window": False, "torch_dtype": "float16"}, {},
    ),
    "BAAI/bge-reranker-v2-gemma": (
        "GemmaForCausalLM",
        {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_activation": None,
         "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "float32"}, {},
    ),
    "jinaai/jina-reranker-v3": ("JinaForRanking", QWEN3, {"lm_head.weight": torch.ones(700, 32)}),
}  # fmt: skip


def copy_of(directory: Path, target: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    copy = Path(shutil.copytree(directory, target / "copy"))
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | config))
    if tensors:
        path = copy / "model.safetensors"
        save_file(load_file(path) | tensors, path, metadata={"format": "pt"})
    return copy


def margins(directory: Path, profile: str = "generic") -> NDArray[np.float32]:
    return open_cross_encoder(directory, profile=profile, dtype="float32").score_texts(PAIRS)


@pytest.mark.parametrize("model", PUBLISHED)
def test_no_published_layout_is_refused(tiny: Tiny, tmp_path: Path, model: str) -> None:
    architecture, config, tensors = PUBLISHED[model]
    source = tiny(architecture, **({"num_labels": 2} if model.startswith("amberoad") else {}))
    found = margins(copy_of(source, tmp_path, config, tensors), model)
    # The published numbers of heads and rotations are not the tiny ones', so only that it loads and answers is said.
    assert np.isfinite(found).all()
    if architecture in (BERT, XLMR):  # whose published fields are all without effect
        np.testing.assert_allclose(found, margins(source, model), atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "profile", "config", "tensors", "said"),
    [
        (BERT, "generic", {"position_embedding_type": "relative_key"}, {}, "position_embedding_type is 'relative_key'"),
        (XLMR, "generic", {"position_embedding_type": "relative_key_query"}, {}, "expected 'absolute'"),
        (BERT, "generic", {"embedding_multiplier": 3.0}, {}, "embedding_multiplier is 3.0"),
        (BERT, "generic", {"pooler_type": "mean"}, {}, "pooler_type is 'mean'"),
        ("Qwen3ForCausalLM", CTXL_CAUSAL, {"logits_scaling": 8.0}, {}, "logits_scaling is 8.0"),
        ("Qwen3ForCausalLM", CTXL_CAUSAL, {"is_causal": False}, {}, "is_causal is False"),
        (BERT, "generic", {"num_hidden_layers": 1}, {}, "bert.encoder.layer.1."),
        (CAUSAL, CTXL_CAUSAL, {"num_hidden_layers": 1}, {}, "`num_hidden_layers` (1) must be equal"),
        (CAUSAL, CTXL_CAUSAL, {"num_hidden_layers": 1, "layer_types": ["full_attention"]}, {}, "layers.1."),
        (CAUSAL, CTXL_CAUSAL, {}, {"lm_head.bias": torch.ones(700)}, "lm_head.bias"),
        ("Qwen3ForSequenceClassification", CTXL, {}, {"score.bias": torch.ones(1)}, "score.bias"),
        (SCORED, CTXL, {}, {"score.weight": torch.ones(2, 32)}, "(2, 32); config.json says (1, 32)"),
        ("Qwen3ForCausalLM", CTXL_CAUSAL, {}, {"lm_head.weight": torch.ones(700, 32).to(torch.int8)}, "stored as I8"),
        ("Qwen3ForCausalLM", CTXL_CAUSAL, {}, {"model.norm.weight": torch.ones(31)}, "config.json says (32,)"),
        ("Qwen3ForCausalLM", CTXL_CAUSAL, {}, {"lm_head.weight": torch.ones(700, 16)}, "config.json says (700, 32)"),
        (BERT, "generic", {}, {"bert.pooler.dense.weight_scale": torch.ones(1)}, "bert.pooler.dense.weight_scale"),
        (BERT, "generic", {}, {"classifier.lora_A.weight": torch.ones(2)}, "merge the adapter"),
        (XLMR, "generic", {"hidden_act": "swiglu9"}, {}, "names 'swiglu9'"),
        (LISTED, JINA, {}, {"projector.0.bias": torch.ones(16)}, "projector.0.bias"),
        (LISTED, JINA, {}, {"projector.0.weight": torch.ones(16, 8)}, "projector.0.weight"),
        ("GemmaForCausalLM", GEMMA, {"use_bidirectional_attention": True}, {}, "use_bidirectional_attention is True"),
    ],
)  # fmt: skip
def test_what_is_not_applied_is_named(
    tiny: Tiny, tmp_path: Path, architecture: str, profile: str, config: dict[str, Any], tensors: Any, said: str
) -> None:
    directory = copy_of(tiny(architecture), tmp_path, config, tensors)
    with pytest.raises(CheckpointError) as caught:
        margins(directory, profile)
    assert said in str(caught.value)


def test_heads_that_the_readout_does_not_use_are_known(tiny: Tiny, tmp_path: Path) -> None:
    heads = {
        "cls.predictions.transform.dense.weight": torch.ones(32, 32), "cls.predictions.bias": torch.ones(700),
        "cls.predictions.transform.LayerNorm.gamma": torch.ones(32), "cls.seq_relationship.weight": torch.ones(2, 32),
    }  # fmt: skip
    np.testing.assert_array_equal(margins(copy_of(tiny(BERT), tmp_path, {}, heads)), margins(tiny(BERT)))


def test_a_stored_head_stands_where_config_ties_it(tiny: Tiny, tmp_path: Path) -> None:
    """transformers keeps a stored output embedding that differs from the tied one, and so is it here."""
    import transformers

    head = torch.randn(700, 32, generator=torch.Generator().manual_seed(3))
    directory = copy_of(tiny("GemmaForCausalLM"), tmp_path, {"tie_word_embeddings": True}, {"lm_head.weight": head})
    model = open_cross_encoder(directory, profile=GEMMA, dtype="float32")
    yes = model._reader.tokenizers.exact.token_to_id("Yes")
    plain: Any = transformers.AutoModelForCausalLM
    whole = plain.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = [float(whole(torch.tensor([model.read([texts])[0].ids])).logits[0, -1, yes]) for texts in PAIRS]
    np.testing.assert_allclose(model.score_texts(PAIRS), expected, atol=1e-4)


def test_the_tokenizers_limit_counts_where_no_other_is_given(tiny: Tiny, tmp_path: Path) -> None:
    directory = copy_of(tiny(BERT), tmp_path, {}, {})
    given = json.loads((directory / "tokenizer_config.json").read_text())
    write(directory, "tokenizer_config.json", given | {"model_max_length": 40})
    assert open_cross_encoder(directory, dtype="float32").profile.max_tokens == 40


def write(directory: Path, name: str, value: Any) -> None:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def test_the_files_of_sentence_transformers_are_applied(tiny: Tiny, tmp_path: Path) -> None:
    directory = copy_of(tiny(BERT), tmp_path, {}, {})
    write(directory, "modules.json", [{"idx": 0, "name": "0", "path": "", "type": ST}])
    write(directory, "config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.linear.Identity"})
    write(directory, "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False})
    profile = open_cross_encoder(directory, dtype="float32").profile
    assert (profile.activation, profile.max_tokens) == ("identity", 24)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"modules.json": [{"type": ST, "path": ""}, {"type": "sentence_transformers.base.modules.dense.Dense",
             "path": "1_Dense"}]}, r"lists the module sentence_transformers\.base\.modules\.dense\.Dense \(1_Dense\)",
        ),
        ({"modules.json": [{"type": "custom.Head", "path": ""}]}, r"lists the module custom\.Head"),
        ({"modules.json": {"type": ST}}, "expected `array`, got `object`"),
        ({"config_sentence_transformers.json": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, "Tanh"),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, "do_lower_case is true"),
        (
            {"config_sentence_transformers.json": {"default_prompt_name": "query", "prompts": {"query": "query: "}}},
            "default_prompt_name is 'query'",
        ),
    ],
)  # fmt: skip
def test_what_sentence_transformers_would_do_and_no_profile_says_is_refused(
    tiny: Tiny, tmp_path: Path, files: dict[str, Any], said: str
) -> None:
    directory = copy_of(tiny(BERT), tmp_path, {}, {})
    for name, value in files.items():
        write(directory, name, value)
    with pytest.raises(CheckpointError, match=said):
        open_cross_encoder(directory)


def test_the_answer_tokens_of_a_logit_score_are_the_profiles(tiny: Tiny, tmp_path: Path) -> None:
    directory = copy_of(tiny("Qwen3ForCausalLM"), tmp_path, {}, {})
    write(directory, "modules.json", [{"type": ST, "path": ""}, {"type": LOGITS, "path": "1_LogitScore"}])
    write(directory, "1_LogitScore/config.json", {"true_token_id": 0, "false_token_id": None})
    assert np.isfinite(margins(directory, CTXL_CAUSAL)).all()
    write(directory, "1_LogitScore/config.json", {"true_token_id": 5, "false_token_id": None})
    with pytest.raises(CheckpointError, match=r"true_token_id is 5; the profile .* reads token 0"):
        margins(directory, CTXL_CAUSAL)
    write(directory, "1_LogitScore/config.json", {"true_token_id": 0, "false_token_id": 7})
    with pytest.raises(CheckpointError, match="false_token_id is 7"):
        margins(directory, CTXL_CAUSAL)


def test_a_configuration_that_loads_and_cannot_compute_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    directory = copy_of(tiny("DebertaV2ForSequenceClassification"), tmp_path, {"pooler_hidden_act": "none"}, {})
    with pytest.raises(CheckpointError, match=r"the first forward pass failed \(KeyError: 'none'\)"):
        margins(directory)
