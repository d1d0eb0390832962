"""Every architecture's margin is the published readout, computed by hand with transformers in float32, pair by pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from decoder_server.cross_encoder import open_cross_encoder

QUERY = "What is the capital of China?"
INSTRUCTION = "Prefer short answers."
PASSAGES = [
    "The capital of China is Beijing.",
    "Gravity attracts bodies toward one another. " * 6,
    "수도는 서울이다.",
    "no",
]
TOLERANCE = 2e-5  # float32, another order of additions


def classifier(directory: Path, passages: list[str]) -> NDArray[np.float32]:
    """logits of one pair at a time, right as transformers gives them."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = [model(**tokenizer(QUERY, p, return_tensors="pt")).logits[0] for p in passages]
    return torch.stack(rows).numpy()  # (passages, labels)


def causal(directory: Path, prompts: list[str], *, add_special_tokens: bool = False) -> NDArray[np.float32]:
    """Logits over the whole vocabulary at the last token, one prompt at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            ids = tokenizer(prompt, add_special_tokens=add_special_tokens, return_tensors="pt").input_ids
            rows.append(model(input_ids=ids).logits[0, -1])
    return torch.stack(rows).numpy()  # (prompts, vocabulary)


def sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("architecture", "profile"),
    [
        ("XLMRobertaForSequenceClassification", "BAAI/bge-reranker-v2-m3"),
        ("BertForSequenceClassification", "cross-encoder/ms-marco-MiniLM-L6-v2"),
        ("ModernBertForSequenceClassification", "ibm-granite/granite-embedding-reranker-english-r2"),
        ("DebertaV2ForSequenceClassification", "mixedbread-ai/mxbai-rerank-base-v1"),
    ],
)
def test_an_encoder_with_one_label(tiny: Callable[..., Path], architecture: str, profile: str) -> None:
    directory = tiny(architecture)
    model = open_cross_encoder(directory, profile=profile, dtype="float32")
    margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
    expected = classifier(directory, PASSAGES)[:, 0]
    np.testing.assert_allclose(margins, expected, atol=TOLERANCE)
    published = expected if model.profile.activation == "identity" else sigmoid(expected)
    np.testing.assert_allclose(model.activation(margins), published, atol=TOLERANCE)


def test_an_encoder_with_two_labels_is_the_softmax_of_the_second(tiny: Callable[..., Path]) -> None:
    directory = tiny("BertForSequenceClassification", num_labels=2)
    profile = "amberoad/bert-multilingual-passage-reranking-msmarco"
    model = open_cross_encoder(directory, profile=profile, dtype="float32")
    margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
    logits = classifier(directory, PASSAGES)
    np.testing.assert_allclose(margins, logits[:, 1] - logits[:, 0], atol=TOLERANCE)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(model.activation(margins), softmax[:, 1], atol=TOLERANCE)
