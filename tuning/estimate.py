"""About how long an evaluation or a sweep will take on this machine, measured on a few of its passages and pairs."""

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

from cache.states import PassageStates
from decoder_server.models.backend import Backend, Prompt
from preread_edge.tables import human_seconds
from tuning.rerank import EncodedStates, Pairs, StateSource, score_passages

_SAMPLE, _MAX_SECONDS = 16, 2.0  # passages, and pairs at each of two ratios; fewer where they would take longer

T = TypeVar("T")


@dataclass(frozen=True)
class Pace:
    """Seconds of each half, as measured."""

    source: StateSource
    source_seconds: float  # per byte of text, or per stored passage
    pair_seconds: tuple[tuple[int, float], ...]  # ratio -> per pair, the finest and the coarsest

    @classmethod
    def measure(
        cls, source: StateSource, backend: Backend, prompts: Mapping[str, Prompt], pairs: Pairs, ratios: Iterable[int]
    ) -> Self | None:
        """None where none of the passages that are drawn has states."""
        ids = [p for p in pairs.places if not isinstance(source, EncodedStates) or source.texts.get(p)]
        drawn = random.Random(0).sample(ids, min(_SAMPLE, len(ids)))
        states: dict[str, PassageStates] = {}

        def read(some: list[str]) -> None:
            for chunk in source.chunks(some):
                states.update(chunk)

        read_ids, seconds = _timed(drawn, read)
        pace = cls(source, seconds / max(1, sum(map(_size(source), read_ids))), ())
        rows = pairs.rows(states)
        rows = random.Random(0).sample(rows, min(_SAMPLE, len(rows)))
        if not rows:
            return None
        times = []
        for ratio in sorted({min(ratios := list(ratios)), max(ratios)}):
            pooled = [(prompts[q], states[p].at_ratio(ratio)) for p, q, _ in rows]
            scored, seconds = _timed(pooled, lambda some: score_passages(backend, some))
            times.append((ratio, seconds / len(scored)))
        return cls(source, pace.source_seconds, tuple(times))

    def reading(self, passage_ids: Iterable[str]) -> float:
        """Seconds of encoding these passages, or of reading their states."""
        return self.source_seconds * sum(map(_size(self.source), passage_ids))

    def scoring(self, ratio: int, num_pairs: float = 1) -> float:
        """Seconds of the decoder; a pair's are linear in its states, whose number is that of tokens over the ratio."""
        (finest, slow), (coarsest, fast) = self.pair_seconds[0], self.pair_seconds[-1]
        share = (1 / ratio - 1 / coarsest) / (1 / finest - 1 / coarsest) if finest < coarsest else 1.0
        return num_pairs * max(0.0, fast + share * (slow - fast))


def estimated(**seconds: float) -> str:
    """`about 12 min 5 s on this machine: 2 min 0 s to encode, 10 min 5 s to score`."""
    parts = ", ".join(f"{human_seconds(own)} to {what}" for what, own in seconds.items() if own >= 0.05)
    return f"about {human_seconds(sum(seconds.values()))} on this machine" + (f": {parts}" if parts else "")


def _size(source: StateSource) -> Callable[[str], int]:
    if isinstance(source, EncodedStates):
        return lambda passage_id: len(source.texts.get(passage_id, "").encode())
    return lambda passage_id: 1


def _timed(items: list[T], run: Callable[[list[T]], object]) -> tuple[list[T], float]:
    """Runs the first item, which warms up, and then as many as take a short time: those, and their seconds."""
    if not items:
        return [], 0.0
    begun = time.perf_counter()
    run(items[:1])
    one = time.perf_counter() - begun
    some = items[1 : 1 + max(1, int(_MAX_SECONDS / max(one, 1e-9)))]
    if not some:
        return items, one
    begun = time.perf_counter()
    run(some)
    return some, time.perf_counter() - begun
