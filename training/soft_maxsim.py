"""Initial weights of a small T5Gemma2 that already compute a soft MaxSim with rare words weighted up.

The residual stream is divided. CONTENT holds a piece's static vector; encoder layer 0 attends to like tokens and
copies CONTENT into COPY, which is empty in every prompt token. In decoder layer 0 queries read CONTENT and keys read
COPY: the attention of a prompt token over the passage states is a match, and [CLS], whose COPY holds one reserved
direction that every query carries a little of, is the rival it must beat. Values carry two flags, one seen on passage
states only and one on prompt tokens only, so that the mass won and the mass lost land in two scratch ranges whose
ratio survives the post-norm. In decoder layer 1 the last token averages those ranges over the prompt with a weight
that grows with RARITY. The yes and no rows of the tied embedding read them. Everything else starts almost silent.

Why the layout looks so: T5Gemma2's post-norms add unit-size updates, so silent layers need small post-norm weights;
self and passage share k_proj and v_proj, so a flag must tell them apart; queries are rotated by RoPE and passage keys
are not, so theta is large and strong components sit in the slow half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

HIDDEN, HEAD = 384, 160
CONTENT, COPY = slice(0, 160), slice(160, 320)
PASSAGE_FLAG, PROMPT_FLAG, RARITY = slice(320, 328), slice(328, 332), slice(332, 336)
WON, LOST = slice(336, 360), slice(360, 384)
SINK = HEAD // 2 - 1  # the slowest RoPE pair is (79, 159): 79 is the reserved direction, 159 stays empty
WIDTH = HEAD - 2  # content components in use


@dataclass(frozen=True)
class Shape:
    vocab_size: int
    encoder_layers: int = 2
    decoder_layers: int = 3
    intermediate_size: int = 768


@dataclass(frozen=True)
class Strength:
    """What the start is tuned by."""

    sink: float = 1.2  # how much of every query points at [CLS]
    sharpness: float = 1.0  # added to the query norm weight of decoder layer 0
    rarity: float = -0.6  # query norm weight of decoder layer 1: how strongly rare words win


def empty_model(shape: Shape) -> T5Gemma2ForConditionalGeneration:
    """A T5Gemma2 with a vision tower of a few thousand parameters, which text never touches."""

    def text(num_layers: int) -> dict[str, object]:
        rope = {"rope_type": "default", "rope_theta": 1e8}
        return {
            "vocab_size": shape.vocab_size,
            "hidden_size": HIDDEN,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": HEAD,
            "sliding_window": 1024,
            "max_position_embeddings": 8192,
            "query_pre_attn_scalar": 256,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "bos_token_id": 4,
            "eos_token_id": 5,
            "rope_parameters": {"full_attention": dict(rope), "sliding_attention": dict(rope)},
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
        "text_config": text(shape.encoder_layers),
        "vision_config": vision,
        "boi_token_index": 1,
        "eoi_token_index": 1,
        "image_token_index": 2,
    }
    config = T5Gemma2Config(encoder=encoder, decoder=text(shape.decoder_layers), eoi_token_index=1, image_token_index=2)
    return T5Gemma2ForConditionalGeneration(config)


def rope_order() -> torch.Tensor:
    """Head positions for content components, weakest first, the pair (SINK, SINK + HEAD/2) left out. -> (WIDTH,)"""
    order = torch.empty(HEAD, dtype=torch.long)
    order[0::2], order[1::2] = torch.arange(HEAD // 2), torch.arange(HEAD // 2, HEAD)
    return order[:WIDTH]


@torch.no_grad()
def initialise(
    model: Any,
    vectors: torch.Tensor,  # (vocab, WIDTH), strongest component last
    rarity: torch.Tensor,  # (vocab,)
    special: range,
    cls: int,
    yes: int,
    no: int,
    strength: Strength | None = None,
) -> None:
    """Write the start into `model`, in place."""
    strength = strength or Strength()
    encoder, decoder = model.model.encoder.text_model, model.model.decoder
    embedding, root, eye = encoder.embed_tokens.weight, math.sqrt(HIDDEN), torch.eye(HEAD)
    size = 1.5 * math.sqrt(WIDTH) / root
    embedding.zero_()
    embedding[:, rope_order()] = torch.nn.functional.normalize(vectors, dim=1) * size
    embedding[special.start : special.stop, CONTENT] = 0
    embedding[cls, COPY.start + SINK] = size
    embedding[:, PASSAGE_FLAG] = embedding[:, PROMPT_FLAG] = 1 / root
    embedding[:, RARITY] = ((rarity - 2.0).clamp(min=-1, max=6) / 3 / root)[:, None]
    embedding[special.start : special.stop, RARITY] = -1 / root
    for token, sign in ((yes, 1), (no, -1)):
        embedding[token, WON] = sign * 2 / root
        embedding[token, LOST] = -sign * 2 / root
    for stack in (encoder, decoder):
        for layer in stack.layers:  # 1 + weight = 0.1
            layer.post_self_attn_layernorm.weight.fill_(-0.9)
            layer.post_feedforward_layernorm.weight.fill_(-0.9)
    _copy_layer(encoder.layers[0], eye)
    encoder.norm.weight[PASSAGE_FLAG] = 1.0
    for hidden_from_passages in (PROMPT_FLAG, RARITY, WON, LOST):
        encoder.norm.weight[hidden_from_passages] = -1.0
    for layer in decoder.layers:
        layer.pre_self_attn_layernorm.weight[PASSAGE_FLAG] = -1.0
    _match_layer(decoder.layers[0], eye, strength)
    _gather_layer(decoder.layers[1], strength)


def _copy_layer(layer: Any, eye: torch.Tensor) -> None:
    """Encoder layer 0: attend to like tokens, copy CONTENT into COPY: a lightly contextual copy."""
    attention = layer.self_attn
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        linear.weight.zero_()
    attention.k_proj.weight[:, CONTENT] = attention.v_proj.weight[:, CONTENT] = eye
    for head in (slice(0, HEAD), slice(HEAD, 2 * HEAD)):
        attention.q_proj.weight[head, CONTENT] = eye
        attention.o_proj.weight[COPY, head] = eye / 2
    layer.post_self_attn_layernorm.weight.fill_(0.0)


def _match_layer(layer: Any, eye: torch.Tensor, strength: Strength) -> None:
    """Decoder layer 0: WON <- attention mass on the passage, LOST <- mass on the prompt."""
    attention = layer.self_attn
    attention.q_proj.weight.normal_(std=0.01)
    attention.k_proj.weight.normal_(std=0.001)
    attention.v_proj.weight.normal_(std=0.02)
    attention.o_proj.weight.normal_(std=0.01)
    attention.k_proj.weight[:, COPY] += eye
    attention.v_proj.weight[0:8, PASSAGE_FLAG] += torch.eye(8)
    attention.v_proj.weight[8:16, PROMPT_FLAG] += torch.eye(4).repeat(2, 1)
    attention.q_norm.weight.fill_(strength.sharpness)
    for start in (0, HEAD):
        attention.q_proj.weight[start : start + HEAD, CONTENT] += eye
        attention.q_proj.weight[start + SINK, PROMPT_FLAG] += 2 * strength.sink
        for j in range(24):
            attention.o_proj.weight[WON.start + j, start + j % 8] += 1
            attention.o_proj.weight[LOST.start + j, start + 8 + j % 8] += 2  # passages carry their flag doubled
    layer.post_self_attn_layernorm.weight.fill_(0.0)


def _gather_layer(layer: Any, strength: Strength) -> None:
    """Decoder layer 1: the last token averages WON and LOST over the prompt, rare words first."""
    attention = layer.self_attn
    attention.q_proj.weight.normal_(std=0.002)
    attention.k_proj.weight.normal_(std=0.002)
    attention.v_proj.weight.normal_(std=0.01)
    attention.o_proj.weight.normal_(std=0.01)
    attention.q_norm.weight.fill_(strength.rarity)
    attention.k_proj.weight[SINK, RARITY] += 0.25
    attention.k_proj.weight[SINK + HEAD // 2, PROMPT_FLAG] += 0.25
    attention.v_proj.weight[16:40, WON] += torch.eye(24)
    attention.v_proj.weight[40:64, LOST] += torch.eye(24)
    for start in (0, HEAD):
        attention.q_proj.weight[start + SINK, PROMPT_FLAG] += 0.5
        attention.o_proj.weight[WON, start + 16 : start + 40] += torch.eye(24)
        attention.o_proj.weight[LOST, start + 40 : start + 64] += torch.eye(24)
    layer.post_self_attn_layernorm.weight.fill_(0.5)
