"""A T5Gemma2 of a few thousand parameters with a whole-word tokenizer, so that training tests take seconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

from training.model import MINI, TrainableCheckpoint

WORDS = [
    "yes",
    "no",
    "find",
    "not",
    "passages",
    "that",
    "answer",
    "the",
    "query",
    "about",
    "red",
    "green",
    "blue",
    "fish",
    "bird",
    "stone",
    "river",
    "cloud",
    "north",
    "south",
]


@pytest.fixture
def tiny() -> Callable[[int], TrainableCheckpoint]:
    """Build a checkpoint from a seed: hidden 32, one encoder and two decoder layers."""

    def build(seed: int = 0) -> TrainableCheckpoint:
        torch.manual_seed(seed)
        special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]"]
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(special)

        def text(num_layers: int) -> dict[str, object]:
            return {
                "vocab_size": len(special) + len(WORDS),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": num_layers,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "sliding_window": 64,
                "query_pre_attn_scalar": 16,
                "dropout_rate": 0.0,
            }

        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 224,
            "patch_size": 14,
        }
        encoder = {
            "text_config": text(1),
            "vision_config": vision,
            "boi_token_index": 1,
            "eoi_token_index": 1,
            "image_token_index": 2,
        }
        model = T5Gemma2ForConditionalGeneration(
            T5Gemma2Config(encoder=encoder, decoder=text(2), eoi_token_index=1, image_token_index=2)
        )
        with torch.no_grad():  # wide enough that unit-size post-norm updates do not drown token identity
            for name, weight in model.named_parameters():
                if "embed_tokens.weight" in name or name.endswith("_proj.weight"):
                    weight.normal_(std=0.3 if "embed" in name else 0.15)
        model.train(False)
        return TrainableCheckpoint(model, tokenizer, MINI)

    return build
