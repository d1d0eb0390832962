"""Where sentence-transformers' CrossEncoder is right, it and this code agree; our own loading needs none of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from decoder_server.models.cross_encoder.loading import open_cross_encoder

sentence_transformers = pytest.importorskip("sentence_transformers", reason="a second opinion; not needed to serve")
QUERY = "What is the capital of China?"
PASSAGES = [
    "The capital of China is Beijing.",
    "Gravity attracts bodies toward one another. " * 40,  # cut at the end of the passage
    "수도는 서울이다.",
    "no",
]


@pytest.mark.parametrize(
    "architecture",
    [
        "XLMRobertaForSequenceClassification",
        "BertForSequenceClassification",
        "ModernBertForSequenceClassification",
        "DebertaV2ForSequenceClassification",
    ],
)
def test_an_encoders_scores_are_crossencoders(tiny: Callable[..., Path], architecture: str) -> None:
    directory = tiny(architecture)
    model = open_cross_encoder(directory, profile="generic", dtype="float32", max_tokens=256)
    other = sentence_transformers.CrossEncoder(
        str(directory), max_length=256, device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    )
    pairs = [(QUERY, passage) for passage in PASSAGES]
    margins = model.score_texts([(query, None, passage) for query, passage in pairs])
    raw = other.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    np.testing.assert_allclose(margins, raw, atol=2e-5)
    # Without a word in its configuration, CrossEncoder takes a sigmoid of one label; so does the generic profile.
    np.testing.assert_allclose(model.activation(margins), other.predict(pairs, show_progress_bar=False), atol=2e-5)
