"""States through a real codec and back, as a collection would give them. Does not know margins or queries."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cache.codec_names import DEFAULT_CODEC
from cache.codecs import Codec
from cache.errors import CodecError
from cache.states import PassageStates
from encoder_worker.target import num_training_states
from tuning.errors import EvaluationError
from tuning.sweep.configurations import Configuration
from tuning.sweep.spill import SpilledStates
from tuning.sweep.workdir import WorkDir


@dataclass(frozen=True)
class TrainedCodec:
    """A codec for one stored ratio, and what its training took."""

    codec: Codec
    train_seconds: float
    num_sample: int  # states it was trained on; 0 where it needs none


@dataclass
class Codecs:
    """The codecs of a sweep, trained once each and kept; `left_out` says why one is not there."""

    states: SpilledStates
    work: WorkDir
    few_samples: str
    seed: int
    left_out: dict[tuple[int, str], str] = field(default_factory=dict)  # (stored ratio, codec) -> reason
    few: dict[str, dict[int, int]] = field(default_factory=dict)  # codec -> states it was trained on, by stored ratio
    _made: dict[tuple[int, str], TrainedCodec] = field(default_factory=dict)

    def get(self, ratio: int, factory: str) -> TrainedCodec | None:
        """The codec for states at `ratio`; None where it cannot be trained and may be left out.

        Raises:
            EvaluationError: it cannot be trained, and few_samples is `refuse`.
        """
        key = (ratio, factory)
        if key not in self._made and key not in self.left_out:
            try:
                self._made[key] = self._make(ratio, factory)
            except CodecError as exc:
                self.refuse(ratio, factory, str(exc))
        return self._made.get(key)

    def refuse(self, ratio: int, factory: str, reason: str) -> None:
        """This codec cannot be used at this ratio: it is left out, or the sweep ends.

        Raises:
            EvaluationError: few_samples is `refuse`.
        """
        if self.few_samples == "refuse":
            raise EvaluationError(
                f"codec {factory} at stored ratio {ratio}: {reason}; leave it out, or --few-samples fallback"
            )
        self.left_out[ratio, factory] = reason
        self._made.pop((ratio, factory), None)

    def _make(self, ratio: int, factory: str) -> TrainedCodec:
        codec = Codec(factory, self.states.dim)
        if not codec.needs_training:
            return TrainedCodec(codec, 0.0, 0)
        name = f"codecs/{file_name(ratio, factory)}"
        kept = self.work.load(name)
        if kept is not None:
            table, seconds, num_sample = kept["table"].tobytes(), float(kept["seconds"]), int(kept["num_sample"])
            codec = Codec.from_table(factory, self.states.dim, table)
        else:
            sample = self.states.sample(ratio, num_training_states(codec), self.seed)
            begun = time.perf_counter()
            codec.train(sample)
            seconds, num_sample = time.perf_counter() - begun, len(sample)
            table = codec.table()
            self.work.save(
                name, table=np.frombuffer(table, np.uint8), seconds=np.float64(seconds), num_sample=np.int64(num_sample)
            )
        if num_sample < num_training_states(codec):
            self.few.setdefault(factory, {})[ratio] = num_sample
        return TrainedCodec(codec, seconds, num_sample)


def with_fallback(configurations: Sequence[Configuration], codecs: Codecs) -> list[Configuration]:
    """The same, the default codec standing in for one that cannot be trained; each once.

    Raises:
        EvaluationError: a codec cannot be trained, and few_samples is `refuse`.
    """
    found: dict[Configuration, None] = {}
    for one in configurations:
        usable = codecs.get(one.stored_ratio, one.codec) is not None
        found[one if usable else replace(one, codec=DEFAULT_CODEC)] = None
    return list(found)


def roundtrip(codec: Codec, passages: Mapping[str, PassageStates]) -> dict[str, PassageStates]:
    """Each passage's states as they come back from the codec.

    Raises:
        CodecError: a value that it cannot hold.
    """
    if not passages:
        return {}
    decoded = codec.decode(codec.encode(np.concatenate([one.states for one in passages.values()])))
    result: dict[str, PassageStates] = {}
    end = 0
    for p, one in passages.items():
        start, end = end, end + one.num_states
        result[p] = PassageStates(
            decoded[start:end], one.window_tokens, one.compression_ratio, one.truncated, one.text_digest
        )
    return result


def file_name(ratio: int, factory: str) -> str:
    """`r4-SQ8`; a factory string may hold commas and brackets, which stay apart from one another as code points."""
    return f"r{ratio}-" + "".join(c if c.isalnum() or c in "-_" else f"~{ord(c):x}" for c in factory)
