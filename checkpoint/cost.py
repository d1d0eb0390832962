"""What a checkpoint's shape costs: parameters, floating-point operations, bytes of KV cache; nothing is loaded.

A multiplication and an addition are two operations. Matrix products and attention are counted, as each half of preread
computes them; norms, rotations and the two rows of the output embedding are not.
"""

from math import prod
from typing import Any

from checkpoint.model import tensor_shapes


def num_parameters(half: str, config: Any) -> int:
    """Of one half (`encoder` or `decoder`), its embedding included."""
    return sum(prod(shape) for shape in tensor_shapes(half, config).values())


def kv_bytes(config: Any, num_states: int, number_bytes: int) -> int:
    """Keys and values of a passage's states in every layer of the decoder."""
    return int(config.num_hidden_layers) * num_states * 2 * _kv_width(config) * number_bytes


def encoder_flops(config: Any, num_tokens: int) -> int:
    """One passage, every token of it; a layer that slides sees its window."""
    seen = {"full_attention": num_tokens, "sliding_attention": min(num_tokens, config.sliding_window or num_tokens)}
    weights = len(config.layer_types) * (_kv_weights(config) + _other_weights(config))
    return 2 * num_tokens * weights + sum(4 * num_tokens * seen[kind] * _q_width(config) for kind in config.layer_types)


def decoder_flops(config: Any, num_states: int, num_tokens: int, *, cached: bool = False) -> int:
    """One prompt over one passage; `cached`: keys and values of the passage are there.

    The last layer computes one row: the readout.
    """
    num_layers = int(config.num_hidden_layers)
    rows = num_tokens * (num_layers - 1) + 1
    of_states = 0 if cached else 2 * num_states * num_layers * _kv_weights(config)
    of_prompt = 2 * (num_tokens * num_layers * _kv_weights(config) + rows * _other_weights(config))
    return of_states + of_prompt + 4 * rows * (num_states + num_tokens) * _q_width(config)


def _q_width(config: Any) -> int:
    return int(config.num_attention_heads * config.head_dim)


def _kv_width(config: Any) -> int:
    return int(config.num_key_value_heads * config.head_dim)


def _kv_weights(config: Any) -> int:
    """Of the key and value projections of a layer."""
    return 2 * int(config.hidden_size) * _kv_width(config)


def _other_weights(config: Any) -> int:
    """Of the other matrices of a layer: queries, output, and the three of its MLP."""
    return int(config.hidden_size) * (2 * _q_width(config) + 3 * int(config.intermediate_size))
