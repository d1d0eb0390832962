"""States of a whole batch, end to end as a pass reads them, out of whatever they are kept in.

What a codec keeps as numbers (Flat, SQfp16, SQbf16) is one copy of bytes and one conversion by torch, or none; other
codecs decode all passages of the batch in one call. Does not know prompts, stores or the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.codecs import Codec
from cache.states import Codes
from checkpoint import TokenizedPrompt

_FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class StatePair:
    """A prompt and one window of a passage, at the ratio it is scored at.

    States that need no pooling stay encoded until their batch is assembled.
    """

    prompt: TokenizedPrompt
    states: NDArray[np.float32] | Codes  # (num_states, dim)
    truncated: bool = False
    key: bytes = b""  # names the states; empty: nothing computed of them is kept

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.ids)

    @property
    def num_states(self) -> int:
        return len(self.states)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.ids) + len(self.states)


@dataclass
class _Kind:
    """Pairs whose states become numbers in one step."""

    dim: int
    dtype: torch.dtype  # the numbers' format before the model's
    codec: Codec | None  # decodes them; None: they are numbers
    parts: list[NDArray[np.uint8]] = field(default_factory=list)  # bytes, a row per state
    places: list[int] = field(default_factory=list)  # in the batch


def batch_states(pairs: Sequence[StatePair], device: torch.device, dtype: torch.dtype) -> Tensor:
    """States of all pairs in their order, (sum of num_states, dim) of `dtype` on `device`.

    Passages of several codecs, and numbers beside codes, may share a batch. Every row is what decoding it alone to
    float32 and converting that gives.
    """
    kinds = _kinds(pairs)
    if not kinds:
        return torch.empty((0, 0), device=device, dtype=dtype)
    filled = [_converted(_numbers(kind, device.type == "cuda"), device, dtype) for kind in kinds]
    if len(filled) == 1:
        return filled[0]
    # Rows of a kind lie together: each is sent to where its pair is.
    ends = np.cumsum([pair.num_states for pair in pairs])
    batch = torch.empty((int(ends[-1]), kinds[0].dim), device=device, dtype=dtype)
    for kind, rows in zip(kinds, filled, strict=True):
        spans = [np.arange(ends[i] - pairs[i].num_states, ends[i]) for i in kind.places]
        batch[torch.from_numpy(np.concatenate(spans)).to(device)] = rows
    return batch


def _kinds(pairs: Sequence[StatePair]) -> list[_Kind]:
    kinds: dict[str | Codec, _Kind] = {}
    for i, pair in enumerate(pairs):
        states = pair.states
        if isinstance(states, Codes):
            number_format, rows = states.codec.number_format, states.rows
            codec = None if number_format else states.codec
            name: str | Codec = number_format or states.codec
            kind = kinds.get(name) or _Kind(states.codec.dim, _FORMATS.get(number_format, torch.float32), codec)
        else:
            name, rows = "float32", np.ascontiguousarray(states, dtype=np.float32).view(np.uint8)
            kind = kinds.get(name) or _Kind(states.shape[1], torch.float32, None)
        kind.parts.append(rows)
        kind.places.append(i)
        kinds[name] = kind
    return list(kinds.values())


def _converted(numbers: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type == "cpu" and (numbers.dtype, dtype) == (torch.float16, torch.bfloat16):
        numbers = numbers.float()  # in one step it takes five times as long: torch has no vector code for it
    # To the device first: a GPU is sent the narrow numbers, and converts them itself.
    return numbers.to(device).to(dtype)


def _numbers(kind: _Kind, pinned: bool) -> Tensor:
    """The kind's states in its own format, one pair after another, in memory of their own.

    pinned: in memory that a GPU reads by itself.
    """
    num_states = sum(map(len, kind.parts))
    numbers = torch.empty((num_states, kind.dim), dtype=kind.dtype, pin_memory=pinned)
    if kind.codec is not None:
        kind.codec.decode_many(kind.parts, out=numbers.numpy())
    else:
        np.concatenate(kind.parts, out=numbers.view(torch.uint8).numpy())
    return numbers
