"""What an evaluation and a sweep can be told, checked once. The command line makes its options from these fields."""

import re
from dataclasses import dataclass, replace
from typing import Self

from preread.values import Stage, parse_stages
from preread_edge.settings import Config, knob
from tuning import EvaluationError

COARSEST = 32  # the coarsest ratio that published checkpoints are trained for
NUM_RESAMPLES = 10_000
TEACHERS = {"minilm": "MiniLM"}  # name -> how tables call it
_NUMBER = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[a-zA-Z%]*)")
_SIZES = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "kib": 1024, "mib": 1024**2}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1}


def _quantity(text: str, units: dict[str, float], example: str) -> float:
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match["unit"].lower() not in units:
        raise ValueError(f"{text!r}; expected {example}")
    return float(match["number"]) * units[match["unit"].lower()]


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r}; expected integers with commas between them, such as 1,4,16") from None


class _Settings(Config):
    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as exc:
            raise EvaluationError(str(exc)) from None


@dataclass(frozen=True, kw_only=True)
class MeasuringSettings(_Settings):
    """Settings that an evaluation and a sweep share. Raises EvaluationError naming the setting."""

    top_k: int = knob(50, "Candidates per query.", at_least=1)
    split: bool = knob(False, "Read long passages in windows, instead of cutting them; the best window counts.")
    instruction: str | None = knob(
        None, 'Task instruction, instead of the checkpoint\'s own; "" for none.', metavar="TEXT"
    )
    max_queries: int | None = knob(None, "Use a random sample of this many queries.", at_least=1)
    min_grade: int = knob(1, "Grade from which a passage counts as relevant.", at_least=1)
    seed: int = knob(0, "Seed of query draws, training samples and the bootstrap.")
    num_resamples: int = NUM_RESAMPLES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_resamples < 100:
            raise EvaluationError(f"num_resamples is {self.num_resamples}; expected at least 100")
        for name, ratios in vars(self).items():
            if name.endswith("ratios") and ratios is not None:
                if not ratios or min(ratios) < 1:
                    raise EvaluationError(f"{name} is {ratios}; expected integers of at least 1")
                if len(set(ratios)) != len(ratios):
                    raise EvaluationError(f"{name} is {ratios}; expected each once")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(MeasuringSettings):
    """Settings of an evaluation."""

    ratios: tuple[int, ...] | None = knob(
        None,
        "Compression ratios to score passages at. Without it, 1 (or the stored one) to 32.",
        metavar="R,R,...",
        parse=_integers,
    )
    teacher: str | None = knob(
        None,
        "Also rank the same candidates with all-MiniLM-L6-v2 (preread[teacher]).",
        choices=tuple(TEACHERS),
        metavar="minilm",
    )

    def with_ratios(self, stored: int) -> Self:
        """The same, with the ratios that None stands for; EvaluationError where one is no multiple of `stored`."""
        for ratio in self.ratios or ():
            if ratio % stored:
                raise EvaluationError(f"ratio is {ratio}; the states are at {stored}, expected a multiple of it")
        return replace(self, ratios=tuple(sorted(self.ratios or doublings(stored, COARSEST))))


@dataclass(frozen=True, kw_only=True)
class SweepSettings(MeasuringSettings):
    """Settings of a sweep. Of the grid None stands for a default by checkpoint."""

    stored_ratios: tuple[int, ...] | None = knob(
        None, "Tokens per stored state.", metavar="R,R,...", parse=_integers, shown_default="1,2,4,8"
    )
    codecs: tuple[str, ...] | None = knob(
        None,
        "Codecs, separated by spaces.",
        metavar="CODEC ...",
        parse=lambda text: tuple(text.split()),  # a FAISS factory string may hold commas
        shown_default="Flat SQfp16 SQ8 B32,SQ4 and PQ at two sizes",
    )
    read_ratios: tuple[int, ...] | None = knob(
        None, "Ratios to score stored states at.", metavar="R,R,...", parse=_integers, shown_default="1,2,4,8,16,32"
    )
    cascades: tuple[tuple[Stage, ...], ...] | None = knob(
        None,
        "Cascades, separated by spaces: 32:20,4 scores all at 32, and the best 20 at 4; none: no cascades.",
        metavar="STAGES ...",
        parse=lambda text: () if text.split() == ["none"] else tuple(map(parse_stages, text.split())),
        shown_default="four shapes",
    )
    overlap_k: int = knob(10, "How many of the top are compared with r = 1's.", at_least=1)
    few_samples: str = knob(
        "fallback",
        "For a codec with too few states to train on: SQfp16 as the fallback, with a note; or the run ends.",
        choices=("fallback", "refuse"),
    )
    timed_queries: int = knob(20, "Queries to time; 0: time nothing.", at_least=0)
    rounds: int = knob(3, "How often each of them is timed.", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codecs is not None and (not self.codecs or len(set(self.codecs)) != len(self.codecs)):
            raise EvaluationError(f"codecs is {self.codecs}; expected at least one, each once")

    @property
    def overlap_name(self) -> str:
        return f"top-{self.overlap_k} overlap"


@dataclass(frozen=True)
class Limits(_Settings):
    """Limits of what a sweep may choose; None: no such limit."""

    max_loss: float | None = knob(
        None,
        "Most nDCG@10 to lose against r = 1, such as 1%.",
        metavar="PERCENT",
        at_least=0,
        parse=lambda text: _quantity(text, {"%": 0.01}, "a percentage, such as 1%"),
    )
    sure: bool = knob(False, "Hold --max-loss against the worse end of the 95% interval, not the mean.")
    max_bytes: float | None = knob(
        None,
        "Most stored bytes per passage, on average, such as 8KiB.",
        metavar="BYTES",
        at_least=0,
        parse=lambda text: _quantity(text, _SIZES, "a number of bytes, such as 8KiB or 8192"),
    )
    max_latency_seconds: float | None = knob(
        None,
        "Highest p99 of a rerank of --top-k, such as 50ms.",
        flag="--max-latency",
        metavar="TIME",
        at_least=0,
        parse=lambda text: _quantity(text, _TIMES, "a time with its unit, such as 50ms or 0.5s"),
    )
    prefer: str | None = knob(
        None,
        "The criterion among configurations that keep the limits.",
        choices=("bytes", "latency", "quality"),
        shown_default="bytes with --max-loss, else quality",
    )

    @property
    def given(self) -> bool:
        return any(one is not None for one in (self.max_loss, self.max_bytes, self.max_latency_seconds))

    @property
    def decides_by(self) -> str:
        """Orders the configurations that keep every limit."""
        return self.prefer or ("bytes" if self.max_loss is not None else "quality")


def doublings(first: int, last: int) -> tuple[int, ...]:
    """`first`, twice that and so on, to `last` at most; `first` in any case."""
    return tuple(first << i for i in range(max(1, (last // first).bit_length())))
