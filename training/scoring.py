"""Margins with gradients: encode once, pool at any ratio, decode (query, passage) pairs.

Pure functions over a T5Gemma2 model; batching and text live elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad as pad_right


def pad(rows: list[list[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask, int64. -> (batch, num_tokens) twice"""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def mean_pool(states: torch.Tensor, mask: torch.Tensor, ratio: int) -> tuple[torch.Tensor, torch.Tensor]:
    """MEP: the mean over the valid tokens of every group of `ratio`, aligned at token 0.

    (batch, num_tokens, dim), (batch, num_tokens) -> (batch, num_states, dim), (batch, num_states);
    a group with no valid token is masked out.
    """
    batch, num_tokens, dim = states.shape
    states, mask = pad_right(states, (0, 0, 0, -num_tokens % ratio)), pad_right(mask, (0, -num_tokens % ratio))
    count = mask.view(batch, -1, ratio).sum(2)  # (batch, num_states)
    total = (states * mask[..., None].to(states.dtype)).view(batch, -1, ratio, dim).sum(2)
    return total / count.clamp(min=1)[..., None].to(states.dtype), (count > 0).long()


def encode(model: Any, rows: list[list[int]], chunk: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Token states after the final norm. -> (num_passages, num_tokens, dim), (num_passages, num_tokens)

    Passages are encoded in chunks of like length, then put back in order.
    """
    encoder = model.model.encoder.text_model
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    width = len(rows[order[-1]])
    states, masks = [], []
    for start in range(0, len(order), chunk):
        ids, mask = pad([rows[i] for i in order[start : start + chunk]], model.device)
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        states.append(pad_right(hidden, (0, 0, 0, width - ids.shape[1])))
        masks.append(pad_right(mask, (0, width - ids.shape[1])))
    back = torch.argsort(torch.tensor(order)).to(model.device)
    return torch.cat(states)[back], torch.cat(masks)[back]


def pair_margins(
    model: Any,
    prompts: list[list[int]],
    states: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    answers: tuple[int, int],
    chunk: int = 56,
) -> torch.Tensor:
    """Margins of pairs (prompts[i], passage rows[i]); states (num_passages, num_states, dim) -> (num_pairs,) float32

    Pairs are scored in chunks of like prompt length: padding every prompt to the longest costs half as much again.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts = []
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        which = rows[torch.tensor(part, device=rows.device)]
        longest = int(mask[which].sum(1).max())
        parts.append(
            margins(model, [prompts[i] for i in part], states[which, :longest], mask[which, :longest], answers)
        )
    back = torch.argsort(torch.tensor(order)).to(rows.device)
    return torch.cat(parts)[back]


def margins(
    model: Any,
    prompts: list[list[int]],
    states: torch.Tensor,
    mask: torch.Tensor,
    answers: tuple[int, int],
) -> torch.Tensor:
    """Yes-logit minus no-logit at the last prompt token; prompts[i] reads states[i].

    (batch, num_states, dim) -> (batch,) float32
    """
    ids, prompt_mask = pad(prompts, model.device)
    hidden = model.model.decoder(
        input_ids=ids,
        attention_mask=prompt_mask,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    last = hidden[torch.arange(len(prompts), device=hidden.device), prompt_mask.sum(1) - 1]  # (batch, dim)
    embedding = model.model.encoder.text_model.embed_tokens.weight
    margin: torch.Tensor = last @ (embedding[answers[0]] - embedding[answers[1]]).to(last.dtype)
    return margin.float()
