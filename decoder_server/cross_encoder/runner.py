"""The seam between what a model reads and how it is computed: padded token ids in, margins out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from decoder_server.cross_encoder.texts import TextPair


class Runner(Protocol):
    """Loaded weights. Called from one thread only."""

    dtype_name: str
    device_name: str

    def margins(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        """Margins (len(pairs),) of one padded pass, as the arithmetic gives them."""
        ...
