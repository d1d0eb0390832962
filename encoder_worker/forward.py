"""Forward passes over the passages of one window. Knows neither where they came from nor where they go."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cache.states import PassageStates
from encoder_worker.batching import plan
from encoder_worker.passage_encoder import EncodingFailed, PassageEncoder, States
from encoder_worker.sources import Reason, Refused
from encoder_worker.windows import Todo


class Forward:
    """Cuts a window's token sequences into batches, and gives a passage out when its last sequence is encoded."""

    def __init__(self, todo: Sequence[Todo], encoder: PassageEncoder, ratio: int) -> None:
        self._todo = todo
        self._encoder = encoder
        self._ratio = ratio
        # A sequence is one passage, or one token window of a passage that was split.
        self._sequences = [(i, w) for i, one in enumerate(todo) for w in range(len(one.tokenized.windows))]
        self._encoded: dict[int, dict[int, States | EncodingFailed]] = {}
        self.batches = plan([len(self._tokens(s)) for s in range(len(self._sequences))], encoder.limits)
        # In no order of length, so that speed tells the time left and the first states are a fair
        # sample for a codec that trains; seeded, so that a rerun does the same.
        random.Random(0).shuffle(self.batches)

    def lengths(self, batch: Sequence[int]) -> list[int]:
        """Tokens of each sequence of a batch."""
        return [len(self._tokens(s)) for s in batch]

    def encode(self, batch: Sequence[int]) -> list[tuple[Todo, PassageStates | Refused]]:
        """One forward pass; the passages that it completed."""
        results = self._encoder.encode([self._tokens(s) for s in batch], self._ratio)
        done: list[tuple[Todo, PassageStates | Refused]] = []
        for s, states in zip(batch, results, strict=True):
            i, w = self._sequences[s]
            one, windows = self._todo[i], self._encoded.setdefault(i, {})
            windows[w] = states
            if len(windows) == len(one.tokenized.windows):
                done.append((one, self._join(one, [windows[w] for w in sorted(self._encoded.pop(i))])))
        return done

    def _tokens(self, sequence: int) -> Sequence[int]:
        i, w = self._sequences[sequence]
        return self._todo[i].tokenized.windows[w]

    def _join(self, one: Todo, windows: list[States | EncodingFailed]) -> PassageStates | Refused:
        joined = one.tokenized.join(windows, self._ratio, one.digest)
        if isinstance(joined, EncodingFailed):
            return Refused(one.passage.place, one.passage.passage_id, Reason(joined.reason), str(joined))
        return joined
