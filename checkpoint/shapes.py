"""Which tensors each half reads, and their shapes, as config.json implies them.

Source of names: transformers' T5Gemma2ForConditionalGeneration. The vision tower is in neither half.
"""

from __future__ import annotations

from typing import Protocol


class StackConfig(Protocol):
    """What the encoder's text config and the decoder config have in common."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


HEAD = "lm_head.weight"  # the output embedding, where it is stored

Shapes = dict[str, tuple[int, ...]]


def stack_shapes(half: str, config: StackConfig) -> Shapes:
    """Layers and final norm of one half (`encoder` or `decoder`)."""
    dim, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    num_q, num_kv = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: Shapes = {f"{half}.norm.weight": (dim,)}
    for i in range(config.num_hidden_layers):
        layer = f"{half}.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (num_q, dim),
            f"{layer}.self_attn.k_proj.weight": (num_kv, dim),
            f"{layer}.self_attn.v_proj.weight": (num_kv, dim),
            f"{layer}.self_attn.o_proj.weight": (dim, num_q),
            f"{layer}.self_attn.q_norm.weight": (head,),
            f"{layer}.self_attn.k_norm.weight": (head,),
            f"{layer}.mlp.gate_proj.weight": (inner, dim),
            f"{layer}.mlp.up_proj.weight": (inner, dim),
            f"{layer}.mlp.down_proj.weight": (dim, inner),
            f"{layer}.pre_self_attn_layernorm.weight": (dim,),
            f"{layer}.post_self_attn_layernorm.weight": (dim,),
            f"{layer}.pre_feedforward_layernorm.weight": (dim,),
            f"{layer}.post_feedforward_layernorm.weight": (dim,),
        }
    return shapes


def embedding_shapes(half: str, config: StackConfig) -> Shapes:
    """The embedding as stored under one half, with the extra end-of-image row."""
    return {
        f"{half}.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        f"{half}.embed_tokens.eoi_embedding": (config.hidden_size,),
    }
