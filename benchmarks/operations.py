"""Operations of every variant to score a candidate, counted from the shapes: a multiplication and an addition are two.

What a variant executes is counted, not what it would need: transformers multiplies keys that a sliding
window then hides, and every position by the whole vocabulary. Norms, softmax and pooling are left out.
tests/benchmarks/test_operations.py holds the sums to the products torch sees while each variant runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from checkpoint.cost import decoder_flops
from encoder_worker.encoder import BLOCK_TOKENS

PROMPT_TOKENS = 72  # KaLM's template around a query of 19 tokens
PREFIX_TOKENS = 53  # of them before the query: template and instruction


@dataclass(frozen=True)
class Operations:
    """Of one candidate: `passage` tokens, read at `ratio` under a prompt of PROMPT_TOKENS."""

    encoder: Any  # transformers' configurations of the two text halves
    decoder: Any
    passage: int
    ratio: int

    def transformers(self) -> int:
        """Encode and decode per call."""
        return self.plain_encoding() + self.cached_full_vocabulary()

    def plain_encoding(self) -> int:
        """transformers' encoder."""
        return _stack(self.encoder, self.passage, self.passage)

    def joint(self) -> int:
        """One stack over prompt and passage."""
        tokens = PROMPT_TOKENS + self.passage
        return _stack(self.encoder, tokens, tokens)

    def cached_full_vocabulary(self) -> int:
        """transformers' decoder over cached states."""
        vocabulary = 2 * PROMPT_TOKENS * self.decoder.hidden_size * self.decoder.vocab_size
        return int(_stack(self.decoder, PROMPT_TOKENS, self._keys) + self._passage_keys() + vocabulary)

    def texts(self) -> int:
        """Our encoder, then our decoder."""
        return self.encoding() + self.states()

    def encoding(self) -> int:
        """Our encoder."""
        shape, length = self.encoder, self.passage
        sliding = sum(kind == "sliding_attention" for kind in shape.layer_types)
        cells = sliding * _windowed_cells(length, shape.sliding_window)
        cells += (shape.num_hidden_layers - sliding) * length * length
        return int(shape.num_hidden_layers * length * _token(shape) + cells * _cell(shape))

    def states(self) -> int:
        """Our decoder over pooled states."""
        return self._passage_keys() + self.keys()

    def keys(self) -> int:
        """Our decoder over kept passage keys and values."""
        return self._readout(PROMPT_TOKENS)

    def prefix(self) -> int:
        """Our decoder over these and the kept beginning of the prompt."""
        return self._readout(PROMPT_TOKENS - PREFIX_TOKENS)

    def prefix_cold(self) -> int:
        """The same, and what it keeps: keys and values of the passage, and of the beginning of the prompt over it."""
        tokens, keys = PREFIX_TOKENS, PREFIX_TOKENS + self._num_states
        left_out = _token(self.decoder) - _keys_values(self.decoder) + keys * _cell(self.decoder)
        return self._passage_keys() + _stack(self.decoder, tokens, keys) - tokens * left_out + self.prefix()

    @property
    def _num_states(self) -> int:
        return -(-self.passage // self.ratio)

    @property
    def _keys(self) -> int:
        return PROMPT_TOKENS + self._num_states

    def _passage_keys(self) -> int:
        """Keys and values of every layer, from states."""
        return int(self.decoder.num_hidden_layers * self._num_states * _keys_values(self.decoder))

    def _readout(self, tokens: int) -> int:
        """The prompt's last `tokens`; of the last layer all their keys and values, and one row of the rest."""
        two_rows = 2 * 2 * int(self.decoder.hidden_size)
        return decoder_flops(self.decoder, self._keys - tokens, tokens, cached=True) + two_rows


def _stack(shape: Any, tokens: int, keys: int) -> int:
    """Every layer over `tokens` that attend to `keys`."""
    return int(shape.num_hidden_layers * tokens * (_token(shape) + keys * _cell(shape)))


def _token(shape: Any) -> int:
    """Dense products of one token in one layer."""
    query_or_output = 2 * shape.hidden_size * shape.num_attention_heads * shape.head_dim
    return int(_keys_values(shape) + 2 * query_or_output + 3 * 2 * shape.hidden_size * shape.intermediate_size)


def _keys_values(shape: Any) -> int:
    return int(2 * 2 * shape.hidden_size * shape.num_key_value_heads * shape.head_dim)


def _cell(shape: Any) -> int:
    """One query and one key, all heads: the logit, and the value weighted by it."""
    return int(2 * 2 * shape.num_attention_heads * shape.head_dim)


def _windowed_cells(length: int, window: int) -> int:
    """Queries times keys of a sliding layer of ours, which takes queries in blocks."""
    if length <= (window + 1) // 2:
        return length * length
    left, right = (window + 1) // 2 - 1, window // 2
    cells = 0
    for first in range(0, length, BLOCK_TOKENS):
        last = min(first + BLOCK_TOKENS, length)
        cells += (last - first) * (min(length, last + right) - max(0, first - left))
    return cells
