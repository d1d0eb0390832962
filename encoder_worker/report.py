"""Outcome of an index run, its progress and the time it has left: counts in memory, single items spooled.

Does not know terminals.
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

from encoder_worker.reading import ReadBatch
from encoder_worker.scheduler import ForwardPass
from encoder_worker.sources import Place, Refused
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

    def add(self, batch: ReadBatch, max_passage_tokens: int) -> None:
        """What became of a batch, in the order of the source; a passage that was stopped halfway counts as read."""
        self.num_read += len(batch.upserts)
        self.stopped_by = self.stopped_by or batch.stopped_by
        for one in batch.upserts:
            if one.num_states and one.tokenized is not None:
                self.num_encoded += 1
                self.num_split += len(one.tokenized.windows) > 1
                if one.tokenized.truncated:
                    self.num_truncated += 1
                    message = f"cut at {max_passage_tokens} tokens"
                    self.truncated.add(one.passage.place, one.passage.passage_id, "truncated", message)
            if one.refused is not None:
                self.refuse(one.refused)
            elif one.stored:
                self.num_stored += 1
                self.num_states += one.num_states
                self.num_clipped += one.num_clipped
                self.num_clipped_passages += one.num_clipped > 0
            elif one.finished:
                self.num_unchanged += 1

    def count_pass(self, one: ForwardPass) -> None:
        self.num_batches += 1
        self.num_tokens += one.num_tokens
        self.num_padding_tokens += one.num_padding_tokens

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

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._marks: deque[tuple[float, int, float | None]] = deque([(0.0, 0, 0.0)])

    def read(self, num_done: int, num_encoded: int, fraction: float | None) -> Progress:
        """Now."""
        now = time.monotonic() - self._start
        self._marks.append((now, num_encoded, fraction))
        while len(self._marks) > 2 and now - self._marks[0][0] > _MEMORY_SECONDS:
            self._marks.popleft()
        then, encoded_then, fraction_then = self._marks[0]
        seconds = now - then
        eta = None
        if fraction is not None and fraction_then is not None and fraction > fraction_then and seconds:
            eta = (1 - fraction) / (fraction - fraction_then) * seconds
        rate = (num_encoded - encoded_then) / seconds if seconds else 0.0
        return Progress(num_done, num_encoded, fraction, now, rate, eta)
