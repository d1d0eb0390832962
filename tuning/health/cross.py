"""A cross-encoder as the checks see it. Knows decoder_server.cross_encoder; does not know what is right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from decoder_server.cross_encoder import CrossEncoder
from tuning.health.compare import Margins
from tuning.health.pairs import TextTriple
from tuning.health.scorer import Advance, unheard

CHUNK_PAIRS = 16  # between two signs of progress; pairs of like length still share passes within it
_FILLER = "the water of the sea rises and falls twice a day "
MAX_FILLED_TOKENS = 8192  # attention over more takes minutes on a CPU


class CrossScorer:
    """A loaded model, as it is served."""

    def __init__(self, model: CrossEncoder) -> None:
        self.model = model
        self.listwise = model.profile.listwise
        self.number_format = model.runtime if "int8" in model.runtime else model.dtype_name

    def margins(self, pairs: Sequence[TextTriple], advance: Advance = unheard) -> Margins:
        if self.listwise:  # lists must stay whole
            return self.model.score_texts([pair.fields() for pair in pairs])
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].passage))
        margins = np.empty(len(pairs), dtype=np.float32)
        for first in range(0, len(order), CHUNK_PAIRS):
            chunk = order[first : first + CHUNK_PAIRS]
            margins[chunk] = self.model.score_texts([pairs[i].fields() for i in chunk])
            advance(len(chunk))
        return margins

    def together(self, pairs: Sequence[TextTriple]) -> Margins:
        return self.model.score_pairs(self.model.pairs([pair.fields() for pair in pairs]))

    def scores(self, margins: Margins) -> Margins:
        return self.model.activation(margins)

    def overlong(self) -> str | None:
        limit = self.model.profile.max_passage_tokens or self.model.profile.max_tokens
        return _FILLER * (limit // 2 + 1) if limit <= MAX_FILLED_TOKENS else None
