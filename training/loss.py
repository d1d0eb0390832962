"""The loss on one ratio's margins."""

from __future__ import annotations

import torch
from torch.nn import functional


def group_loss(
    margins: torch.Tensor, valid: torch.Tensor, teacher: torch.Tensor, distil: float, temperature: float, binary: float
) -> torch.Tensor:
    """Softmax over each query's candidates + distil * KL from the teacher + binary * yes/no cross-entropy.

    margins, valid, teacher: (num_queries, K), candidate 0 relevant. The KL compares the candidates the teacher scored,
    its softmax taken at `temperature`. The binary term ties margins to P(yes) across queries.
    """
    scores = margins.masked_fill(~valid, -1e4)
    target = torch.zeros_like(margins)
    target[:, 0] = 1
    loss = functional.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))
    if binary:
        loss = loss + binary * functional.binary_cross_entropy_with_logits(margins[valid], target[valid])
    known = valid & ~teacher.isnan()
    rows = known.sum(1) > 1
    if distil and bool(rows.any()):
        student = margins.masked_fill(~known, -1e4)[rows].log_softmax(1)
        wanted = (teacher.nan_to_num() / temperature).masked_fill(~known, -1e4)[rows].log_softmax(1)
        loss = (
            loss
            + distil
            * functional.kl_div(student, wanted, log_target=True, reduction="none")
            .masked_fill(~known[rows], 0)
            .sum(1)
            .mean()
        )
    return loss
