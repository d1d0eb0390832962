"""Scores do not depend on batch-mates, padding ids, batch size or order; formats stay near float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoder_server.models.backend import sigmoid
from decoder_server.models.cross_encoder.backend import MAX_PADDING, CrossEncoder, batches, pad
from decoder_server.models.cross_encoder.loading import open_cross_encoder

Tiny = Callable[..., Path]
TOLERANCE = 2e-5
TEXTS = [
    ("What is the capital of China?", None, "The capital of China is Beijing."),
    ("gravity", None, "Gravity attracts bodies toward one another. " * 9),
    ("수도는 어디인가?", None, "서울이다."),
    ("a", None, "b"),
    ("What is the capital?", None, "The query and the passage. " * 4),
]
MODELS = [
    ("XLMRobertaForSequenceClassification", "BAAI/bge-reranker-v2-m3"),
    ("BertForSequenceClassification", "cross-encoder/ms-marco-MiniLM-L6-v2"),
    ("ModernBertForSequenceClassification", "ibm-granite/granite-embedding-reranker-english-r2"),
    ("DebertaV2ForSequenceClassification", "mixedbread-ai/mxbai-rerank-base-v1"),
    ("Qwen3ForSequenceClassification", "sigridjineth/ctxl-rerank-v2-1b-seq-cls"),
    ("Qwen3ForCausalLM", "Qwen/Qwen3-Reranker-0.6B"),
    ("GemmaForCausalLM", "BAAI/bge-reranker-v2-gemma"),
    ("MistralForCausalLM", "ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b"),
]


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 2000))
def test_batches_cover_every_item_once_within_their_limits(lengths: list[int], budget: int) -> None:
    found = list(batches(lengths, budget))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        sizes = [lengths[i] for i in batch]
        assert len(batch) == 1 or max(sizes) * len(sizes) <= budget
        assert max(sizes) * len(sizes) <= (1 + MAX_PADDING) * sum(sizes)


def test_padding_by_hand() -> None:
    left = pad([[7, 8, 9], [5]], side="left", pad_id=0)
    assert left["input_ids"].tolist() == [[7, 8, 9], [0, 0, 5]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    right = pad([[7, 8, 9], [5]], [[0, 1, 1], [1]], side="right", pad_id=4)
    assert right["input_ids"].tolist() == [[7, 8, 9], [5, 4, 4]]
    assert right["token_type_ids"].tolist() == [[0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(("architecture", "profile"), MODELS)
def test_one_padded_pass_is_each_pair_alone(tiny: Tiny, architecture: str, profile: str) -> None:
    model = open_cross_encoder(tiny(architecture), profile=profile, dtype="float32")
    pairs = model.read(TEXTS)
    together = model.score(pairs)
    alone = np.concatenate([model.score([pair]) for pair in pairs])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)
    np.testing.assert_allclose(model.score_texts(TEXTS), alone, atol=TOLERANCE)
    np.testing.assert_allclose(model.score_texts(TEXTS[::-1], max_batch_tokens=64)[::-1], alone, atol=TOLERANCE)


def with_pad(directory: Path, target: Path, token: str | None, config: int | None) -> CrossEncoder:
    """ctxl with another padding token in its tokenizer and configuration."""
    copy = Path(shutil.copytree(directory, target))
    for name, values in (
        ("tokenizer_config.json", {"pad_token": token}),
        ("config.json", {"pad_token_id": config}),
    ):
        path = copy / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return open_cross_encoder(copy, profile="sigridjineth/ctxl-rerank-v2-1b-seq-cls", dtype="float32")


def test_no_choice_of_padding_token_changes_ctxl(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny("Qwen3ForSequenceClassification")
    model = open_cross_encoder(directory, profile="sigridjineth/ctxl-rerank-v2-1b-seq-cls", dtype="float32")
    expected = np.concatenate([model.score_texts([text]) for text in TEXTS])
    question_mark = model._reader.tokenizers.exact.encode("?").ids[0]  # what the prompt itself ends in
    choices = [(None, None), ("<|im_end|>", None), ("+", 5), ("<|endoftext|>", question_mark)]
    for number, (token, config) in enumerate(choices):
        other = with_pad(directory, tmp_path / str(number), token, config)
        np.testing.assert_allclose(other.score(other.read(TEXTS)), expected, atol=TOLERANCE)


@pytest.mark.parametrize(("architecture", "profile"), MODELS)
def test_bfloat16_is_near_float32_and_its_head_is_float32(tiny: Tiny, architecture: str, profile: str) -> None:
    directory = tiny(architecture)
    exact = open_cross_encoder(directory, profile=profile, dtype="float32").score_texts(TEXTS)
    half = open_cross_encoder(directory, profile=profile, dtype="bfloat16")
    assert half.dtype_name == "bfloat16"
    margins = half.score_texts(TEXTS)
    np.testing.assert_allclose(margins, exact, atol=0.25)
    # A head in bfloat16 could only give numbers of 8 significant bits.
    as_bits = margins.view(np.uint32)
    assert (as_bits & 0xFFFF).any()


def test_weights_stored_in_half_precision_compute_in_what_is_asked_for(tiny: Tiny) -> None:
    import torch

    directory = tiny("DebertaV2ForSequenceClassification", dtype=torch.float16)
    model = open_cross_encoder(directory, profile="mixedbread-ai/mxbai-rerank-large-v1", dtype="float32")
    runner = model._runner
    assert {p.dtype for p in runner.body.model.parameters()} == {torch.float32}  # type: ignore[attr-defined]
    assert np.isfinite(model.score_texts(TEXTS)).all()


def test_only_the_answers_rows_are_multiplied(tiny: Tiny) -> None:
    for profile, rows in (("Qwen/Qwen3-Reranker-0.6B", 2), ("zeroentropy/zerank-1-small", 1)):
        runner = open_cross_encoder(tiny("Qwen3ForCausalLM"), profile=profile, dtype="float32")._runner
        assert runner._head.rows.shape == (rows, 32)  # type: ignore[attr-defined]
        assert type(runner.body.model).__name__ == "Qwen3Model"  # type: ignore[attr-defined] # no output embedding at all


def test_a_margin_that_is_no_number_is_told_as_such(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(tiny("Qwen3ForSequenceClassification"), tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["score.weight"][:] = float("inf")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    model = open_cross_encoder(copy, profile="sigridjineth/ctxl-rerank-v2-1b-seq-cls")
    assert np.isnan(model.score_texts(TEXTS)).all()
    with pytest.raises(ValueError, match="the first forward pass gave no finite margin"):
        model.warm_up()


def test_the_identity_is_the_weights_and_the_profile(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny("Qwen3ForCausalLM")
    moved = Path(shutil.copytree(directory, tmp_path / "elsewhere"))
    profiles = ("Qwen/Qwen3-Reranker-0.6B", "Qwen/Qwen3-Reranker-0.6B", "zeroentropy/zerank-1-small")
    places = (directory, moved, directory)
    first, second, other = (open_cross_encoder(d, profile=p).fingerprint for d, p in zip(places, profiles, strict=True))
    assert first == second
    assert first != other


def test_sigmoid_does_not_overflow() -> None:
    x = np.array([-1e30, -100, 0, 100, 1e30, np.nan], dtype=np.float32)
    found = sigmoid(x)
    np.testing.assert_allclose(found[:5], [0, 0, 0.5, 1, 1], atol=1e-30)
    assert np.isnan(found[5])
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("architecture", "profile"),
    [*MODELS, ("Qwen3ForCausalLM", "zeroentropy/zerank-1-small"), ("JinaForRanking", "jinaai/jina-reranker-v3")],
)
def test_bounded_scores_keep_the_order_of_margins(tiny: Tiny, architecture: str, profile: str) -> None:
    model = open_cross_encoder(tiny(architecture), profile=profile, dtype="float32")
    margins = np.linspace(-1, 1, 9, dtype=np.float32)
    bounded = model.bounded(margins)
    assert ((bounded >= 0) & (bounded <= 1)).all()
    assert (np.diff(bounded) > 0).all()
    if model.profile.activation == "sigmoid":
        np.testing.assert_array_equal(bounded, model.activation(margins))
