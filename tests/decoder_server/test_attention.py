"""The readout token's weights over states equal transformers' eager attention, and spans cover the passage's text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import T5Gemma2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from checkpoint import Checkpoint
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair
from encoder_worker.encoder import Encoder

TEXT = "The pooled states of its tokens are kept, and the decoder attends over them."


def test_weights_are_those_of_transformers_eager_attention(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    backend = FbnlBackend(checkpoint, device="cpu", dtype="float32")
    model = T5Gemma2ForConditionalGeneration.from_pretrained(tiny_checkpoint, attn_implementation="eager").eval()
    for ratio in (1, 4):
        (states,) = Encoder(checkpoint, device="cpu", dtype="float32").encode(
            [checkpoint.text.passages([TEXT])[0].ids], ratio
        )
        prompt = backend.prompt("what does the decoder attend over")
        with torch.inference_mode():
            seen = model(
                decoder_input_ids=torch.tensor([prompt.ids]),
                encoder_outputs=BaseModelOutput(last_hidden_state=torch.from_numpy(states)[None]),
                attention_mask=torch.ones(1, len(states), dtype=torch.long),
                output_attentions=True,
            ).cross_attentions
        expected = torch.stack([layer[0, :, -1].mean(0) for layer in seen]).mean(0).numpy()
        found = backend.attention(StatePair(prompt, states))
        assert found.shape == (len(states),)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_spans_name_every_character_once_and_the_template_none(tiny_checkpoint: Path) -> None:
    text = Checkpoint.open(tiny_checkpoint).text
    spans = text.spans(TEXT)
    assert len(spans) == len(text.passages([TEXT])[0].ids)
    real = [span for span in spans if span[0] < span[1]]
    assert "".join(TEXT[begin:end] for begin, end in real).replace(" ", "") == TEXT.replace(" ", "")
    assert text.spans("a <end_of_turn> b") == []
