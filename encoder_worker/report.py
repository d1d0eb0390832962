"""What became of every item of an index run: counts in memory, single items spooled. Knows no progress bars.

How far an index run is, how fast, and how long it will take. Knows no terminals.
"""

from __future__ import annotations

import json
import tempfile
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoder_worker.sources import Passage, Place, Refused
from preread_edge.outputs import open_output

_SPOOL_BYTES = 4 << 20


class IssueLog:
    """Items worth a line in the report, in the order they came; on disk beyond a few megabytes."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_SPOOL_BYTES, mode="w+", encoding="utf-8")  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # it lives as long as the log

    def add(self, place: Place, passage_id: str | None, reason: str, message: str) -> None:
        entry = {"source": place.source, "line": place.line, "passage_id": passage_id}
        self._file.write(json.dumps(entry | {"reason": reason, "message": message}) + "\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)
        self._file.seek(0, 2)


@dataclass
class IndexReport:
    """Counts of one run. Every item read is stored, unchanged or refused, or the run was stopped before it."""

    collection: str
    num_read: int = 0
    num_encoded: int = 0
    num_stored: int = 0  # of those encoded: acknowledged by the store
    num_unchanged: int = 0  # stored before, with the same text
    num_refused: int = 0
    num_truncated: int = 0
    num_split: int = 0
    num_tokens: int = 0  # encoded
    num_padding_tokens: int = 0
    num_states: int = 0
    num_values: int = 0  # numbers in the stored states
    num_clipped: int = 0  # of them: outside what the codec was trained for
    num_clipped_passages: int = 0  # that have any
    num_training_states: int = 0  # that this run trained the codec on
    num_batches: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    stopped_by: str | None = None  # the refused item that ended a strict run
    alias: str | None = None  # moved to the collection at the end
    reasons: Counter[str] = field(default_factory=Counter)
    refused: IssueLog = field(default_factory=IssueLog)
    truncated: IssueLog = field(default_factory=IssueLog)
    _cut: list[tuple[Passage, int]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """The source was read to its end."""
        return not self.interrupted and self.stopped_by is None

    @property
    def clipped_share(self) -> float:
        """Share of the stored numbers that lie outside what the codec was trained for."""
        return self.num_clipped / max(1, self.num_values)

    @property
    def padding_share(self) -> float:
        """Share of the tokens computed that were padding."""
        return self.num_padding_tokens / max(1, self.num_tokens + self.num_padding_tokens)

    @property
    def passages_per_second(self) -> float:
        return self.num_stored / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def refuse(self, item: Refused) -> None:
        self.num_refused += 1
        self.reasons[item.reason.value] += 1
        self.refused.add(item.place, item.passage_id, item.reason.value, item.message)

    def take(self, num_read: int, num_unchanged: int, refused: list[Refused]) -> None:
        """Items as they came out of the source."""
        self.num_read += num_read
        self.num_unchanged += num_unchanged
        for item in refused:
            self.refuse(item)

    def note(self, passage: Passage, num_windows: int, truncated: bool, max_passage_tokens: int) -> None:
        """One passage that is on its way to the store, or would be."""
        self.num_encoded += 1
        self.num_split += num_windows > 1
        if truncated:
            self.num_truncated += 1
            self._cut.append((passage, max_passage_tokens))

    def end_window(self) -> None:
        """Lists what was cut since the last time, in the order it stood in the source."""
        for passage, max_tokens in sorted(self._cut, key=lambda cut: (cut[0].place.source, cut[0].place.line)):
            self.truncated.add(passage.place, passage.passage_id, "truncated", f"cut at {max_tokens} tokens")
        self._cut.clear()

    def batch(self, lengths: list[int]) -> None:
        """One forward pass over sequences of these lengths."""
        self.num_batches += 1
        self.num_tokens += sum(lengths)
        self.num_padding_tokens += max(lengths) * len(lengths) - sum(lengths)

    def summary(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "collection": self.collection,
            "alias": self.alias,
            "num_read": self.num_read,
            "num_encoded": self.num_encoded,
            "num_stored": self.num_stored,
            "num_unchanged": self.num_unchanged,
            "num_refused": self.num_refused,
            "refused_by_reason": dict(sorted(self.reasons.items())),
            "num_truncated": self.num_truncated,
            "num_split": self.num_split,
            "num_tokens": self.num_tokens,
            "num_padding_tokens": self.num_padding_tokens,
            "padding_share": round(self.padding_share, 6),
            "num_states": self.num_states,
            "num_clipped": self.num_clipped,
            "clipped_share": round(self.clipped_share, 6),
            "num_clipped_passages": self.num_clipped_passages,
            "num_training_states": self.num_training_states,
            "num_batches": self.num_batches,
            "seconds": round(self.seconds, 3),
            "passages_per_second": round(self.passages_per_second, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "interrupted": self.interrupted,
            "stopped_by": self.stopped_by,
        }

    def write(self, path: Path) -> None:
        """The counts and every refused and truncated item as one JSON document; items are streamed."""
        with open_output(path) as out:
            out.write(json.dumps(self.summary(), indent=1).removesuffix("\n}"))
            for name, log in (("refused", self.refused), ("truncated", self.truncated)):
                out.write(f',\n "{name}": [')
                for number, entry in enumerate(log):
                    out.write((",\n  " if number else "\n  ") + json.dumps(entry))
                out.write("]")
            out.write("\n}\n")


_MEMORY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Progress:
    """One moment of a run."""

    num_done: int  # encoded, unchanged or refused
    num_encoded: int
    fraction: float | None  # of the source, 0 to 1; None where its size is not known
    seconds: float
    passages_per_second: float  # encoded, over the last minute
    eta_seconds: float | None


class Speedometer:
    """Rates over the last minute, so that a resumed run's skipped beginning does not promise too much."""

    def __init__(self, report: IndexReport) -> None:
        self._report = report
        self._start = time.monotonic()
        self._marks: deque[tuple[float, int, float | None]] = deque([(0.0, 0, 0.0)])
        self._fraction: float | None = 0.0  # of the source, up to the present window
        self._encoded = 0  # up to the present window

    def next_window(self, fraction: float | None) -> None:
        """The present window, which ended at `fraction` of the source, is done."""
        self._fraction = fraction
        self._encoded = self._report.num_encoded

    def read(self, fraction: float | None, num_todo: int) -> Progress:
        """Now, within a window that ends at `fraction` of the source and has `num_todo` passages to encode."""
        now = time.monotonic() - self._start
        encoded = self._report.num_encoded
        left = max(0, num_todo - (encoded - self._encoded))
        if fraction is not None and self._fraction is not None and num_todo:
            fraction = self._fraction + (fraction - self._fraction) * (1 - left / num_todo)
        self._marks.append((now, encoded, fraction))
        while len(self._marks) > 2 and now - self._marks[0][0] > _MEMORY_SECONDS:
            self._marks.popleft()
        then, encoded_then, fraction_then = self._marks[0]
        seconds = now - then
        eta = None
        if fraction is not None and fraction_then is not None and fraction > fraction_then and seconds:
            eta = (1 - fraction) / (fraction - fraction_then) * seconds
        rate = (encoded - encoded_then) / seconds if seconds else 0.0
        return Progress(self._report.num_read - left, encoded, fraction, now, rate, eta)
