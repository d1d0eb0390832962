"""What an index run would cost: counted to the last token, timed on a few real forward passes. Writes nothing."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from cache.record import HEADER_BYTES
from encoder_worker.batching import plan
from encoder_worker.forward import Forward
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.report import IndexReport
from encoder_worker.target import Target
from encoder_worker.windows import Todo, Window

SAMPLE_PASSAGES = 256
MAX_SAMPLE_SECONDS = 10.0


@dataclass(frozen=True)
class Estimate:
    """Costs of the passages that an index run would encode now."""

    num_passages: int
    num_tokens: int
    num_padding_tokens: int
    num_states: int
    size_bytes: int  # of their records in the store: states in the codec, headers, texts where they are kept
    tokens_per_second: float  # measured, padding not counted
    seconds: float
    num_sample_tokens: int  # that the speed was measured on


def estimate(
    windows: Iterable[Window],
    encoder: PassageEncoder,
    target: Target,
    report: IndexReport,
    stop: threading.Event | None = None,
) -> Estimate:
    """Reads and tokenizes everything, encodes a uniform sample for at most some ten seconds.

    Args:
        report: filled with what was read, refused, unchanged, cut and split.
        stop: set it to end with what was read so far.
    """
    sample: list[Todo] = []
    chance = random.Random(0)
    num_passages = num_tokens = num_states = num_padded = size_bytes = 0
    for window in windows:
        report.take(window.num_read, window.num_unchanged, window.refused)
        report.stopped_by = window.stopped_by
        for one in window.todo:
            num_passages += 1
            tokens = one.tokenized
            num_tokens += tokens.num_tokens
            num_states += tokens.num_states(target.compression_ratio)
            size_bytes += HEADER_BYTES + 4 * len(tokens.windows)
            size_bytes += len(one.passage.text.encode()) if target.stores_text else 0
            report.note(one.passage, len(tokens.windows), tokens.truncated, encoder.settings.max_passage_tokens)
            if len(sample) < SAMPLE_PASSAGES:
                sample.append(one)
            elif (at := chance.randrange(num_passages)) < SAMPLE_PASSAGES:
                sample[at] = one
        report.end_window()
        lengths = [length for one in window.todo for length in one.tokenized.window_tokens]
        num_padded += sum(lengths[batch[0]] * len(batch) for batch in plan(lengths, encoder.limits))
        if stop is not None and stop.is_set():
            report.interrupted = True
            break
    num_sample_tokens, seconds = _measure(sample, encoder, target.compression_ratio)
    rate = num_sample_tokens / seconds if seconds else 0.0
    return Estimate(
        num_passages=num_passages,
        num_tokens=num_tokens,
        num_padding_tokens=num_padded - num_tokens,
        num_states=num_states,
        size_bytes=size_bytes + num_states * target.codec.code_size_bytes,
        tokens_per_second=rate,
        seconds=num_tokens / rate if rate else 0.0,
        num_sample_tokens=num_sample_tokens,
    )


def _measure(sample: list[Todo], encoder: PassageEncoder, ratio: int) -> tuple[int, float]:
    """Tokens encoded and seconds they took, the first pass (which warms up) left out where there are more."""
    forward = Forward(sample, encoder, ratio)
    if not forward.batches:
        return 0, 0.0
    forward.encode(forward.batches[0])
    num_tokens, begun = 0, time.monotonic()
    for batch in forward.batches[1:] or forward.batches:
        forward.encode(batch)
        num_tokens += sum(forward.lengths(batch))
        if time.monotonic() - begun > MAX_SAMPLE_SECONDS:
            break
    return num_tokens, time.monotonic() - begun
