"""P(yes) of a margin. Pure."""

from __future__ import annotations

import numpy as np


def sigmoid(margin: float) -> float:
    """P(yes) of a margin, in float32, without overflow for any finite margin."""
    x = np.float32(margin)
    if x >= 0:
        return float(np.float32(1) / (np.float32(1) + np.exp(-x)))
    return float(np.exp(x) / (np.float32(1) + np.exp(x)))
