"""The pipeline, on one screen, in the order of the data.

    read -> compare digests -> tokenize             one thread ahead (windows.py)
    -> batches by length -> encode and pool         here, the model's thread (forward.py)
    -> store -> acknowledge                         one thread behind (sink.py)

Knows neither formats nor terminals.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from encoder_worker.ahead import Ahead
from encoder_worker.forward import Forward
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.progress import Progress, Speedometer
from encoder_worker.report import IndexReport
from encoder_worker.sink import Sink
from encoder_worker.sources import Refused
from encoder_worker.windows import Window

OnProgress = Callable[[Progress], None]


def run(
    windows: Iterable[Window],
    encoder: PassageEncoder,
    ratio: int,
    sink: Sink,
    report: IndexReport,
    stop: threading.Event,
    on_progress: OnProgress,
) -> None:
    """Encodes and stores every window; returns when all of it is acknowledged.

    When `stop` is set it ends after the batch in hand, and what was encoded by then is acknowledged.

    Raises:
        CacheError: the store failed; what it acknowledged before stays.
    """
    meter = Speedometer(report)
    max_passage_tokens = encoder.settings.max_passage_tokens
    with Ahead(windows, stop=stop, name="read and tokenize") as ready, sink:
        for window in ready:
            report.take(window.num_read, window.num_unchanged, window.refused)
            forward = Forward(window.todo, encoder, ratio)
            for batch in forward.batches:
                if stop.is_set():
                    break
                for todo, states in forward.encode(batch):
                    if isinstance(states, Refused):
                        report.refuse(states)
                    else:
                        report.note(todo.passage, len(states.window_tokens), states.truncated, max_passage_tokens)
                        sink.add(todo.passage, states)
                report.batch(forward.lengths(batch))
                on_progress(meter.read(window.fraction, len(window.todo)))
            report.end_window()
            meter.next_window(window.fraction)
            on_progress(meter.read(window.fraction, 0))
            report.stopped_by = window.stopped_by
        report.interrupted = stop.is_set()
        sink.flush(complete=report.complete)
