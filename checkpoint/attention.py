"""One softmax over given keys, under an additive mask. Knows no weights and no lengths."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from checkpoint.pointwise import Pointwise

# Logits at a time on a CPU, about: more leave its caches before the softmax reads them.
BLOCK_LOGITS = 1 << 20


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, pointwise: Pointwise) -> Tensor:
    """softmax(q keysᵀ + mask) values; q is scaled already.

    On a CPU two batched products around one softmax: with heads of 256 that is more than twice the rate
    of torch's blocked kernel. Who has long queries cuts them, so that whole rows of logits fit.

    Args:
        q: (batch, num_kv, queries * group, head), queries that share a kv head beside one another.
        keys, values: (batch, num_kv, keys, head).
        mask: additive, (batch, num_kv, queries, keys); None: every query sees every key.

    Returns:
        As q.
    """
    if q.device.type != "cpu":
        seen = None if mask is None else mask.repeat_interleave(q.shape[2] // mask.shape[2], dim=2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=1.0)
    num_rows, num_keys = q.shape[2], keys.shape[2]
    flat_q, flat_keys, flat_values = q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
    seen = None if mask is None else mask.flatten(0, 1)
    out = torch.empty_like(flat_q)
    step = max(1, BLOCK_LOGITS // (num_rows * num_keys))
    for first in range(0, len(flat_q), step):
        at = slice(first, first + step)
        logits = torch.bmm(flat_q[at], flat_keys[at])
        if seen is None:
            weights = torch.softmax(logits, dim=-1)
        else:
            grouped = logits.view(logits.shape[0] * seen.shape[1], -1, num_keys)  # queries of one position together
            weights = pointwise.masked_softmax(grouped, seen[at].reshape(-1, 1, num_keys)).view(logits.shape)
        torch.bmm(weights, flat_values[at], out=out[at])
    return out.view(q.shape)
