"""Output for people: JSON, the first of many lines, and how far a long command is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

import click

from preread_cli.failures import CommandFailed
from preread_edge.tables import human_seconds, print_parts, terminal_width
from tuning.progress import Advance, StageProgress

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

FIRST_LINE_SECONDS, LINE_SECONDS = 10.0, 30.0  # where standard error is no terminal: the first line, and one each ...
_MIN_NAME, _MIN_BAR, _MAX_BAR = 12, 8, 40  # columns of the terminal


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[..., None]]:
    """One stage, shown as `ProgressDisplay` does; call it with how many are done, and of how many: `_Stage.update`."""
    with ProgressDisplay() as progress:
        yield progress.stage(label, unit)


class ProgressDisplay(StageProgress):
    """On a terminal a bar a stage, on standard error; elsewhere a line now and then."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._stages: list[_Stage] = []
        self._next_line = time.monotonic() + FIRST_LINE_SECONDS
        self._stream, self._live = sys.stderr, None
        self._console = Console(file=sys.stderr, width=terminal_width(sys.stderr))
        if sys.stderr.isatty() and not self._console.is_dumb_terminal:
            self._live = Live(self, console=self._console, transient=True, redirect_stdout=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def stage(self, name: str, unit: str, total: float | None = None, kept: float = 0) -> Callable[..., None]:
        """A stage begins; returns its `update`."""
        self._stages.append(stage := _Stage(name, unit, total, kept, kept))

        def update(done: float, total: float | None, **known: Any) -> None:
            stage.update(done, total, **known)
            if self._live is None and time.monotonic() >= self._next_line:
                self._next_line = time.monotonic() + LINE_SECONDS
                click.echo(stage.line, err=True)

        return update

    def begin(self, stage: str, total: int, unit: str, *, kept: int = 0) -> Advance:
        done, update = kept, self.stage(stage, unit, total, kept)

        def advance(amount: int) -> None:
            nonlocal done
            done = min(total, done + amount)
            update(done, total)

        return advance

    def tell(self, sentence: Callable[[], str]) -> None:
        print_parts(sentence(), err=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if (width := terminal_width(self._stream)) is not None:
            console.width = width  # from the next time on, where the window has another size now
        longest = max((len(stage.name) for stage in self._stages), default=0)
        for stage in self._stages:
            yield stage.bar(longest, options.max_width, ascii_only=options.ascii_only)


@dataclass(eq=False)
class _Stage:
    name: str
    unit: str  # of what is counted: passages
    total: float | None  # None: not known
    kept: float  # done before this run: no part of its rate
    done: float
    begun: float = field(default_factory=time.monotonic)
    _seconds: float | None = None  # it took, once it is done
    _known: dict[str, float | None] = field(default_factory=dict)

    def update(self, done: float, total: float | None, **known: float | None) -> None:
        """`known`: share, rate and seconds_left, where they are not those of `done` and the time so far."""
        self.done, self.total, self._known = done, total, known
        if total is not None and done >= total and self._seconds is None:
            self._seconds = time.monotonic() - self.begun

    @property
    def share(self) -> float | None:
        return self._known.get("share", self.done / self.total if self.total else None)

    @property
    def rate(self) -> float:
        """A second, since the stage began: stages that alternate stand still for minutes."""
        seconds = max(1e-3, time.monotonic() - self.begun if self._seconds is None else self._seconds)
        return self._known.get("rate") or (self.done - self.kept) / seconds

    @property
    def seconds_left(self) -> float | None:
        if "seconds_left" in self._known or self.total is None or self.done <= self.kept:
            return self._known.get("seconds_left")
        return (self.total - self.done) / self.rate

    @property
    def _texts(self) -> dict[str, str]:
        """By name, in the order they are shown."""
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        share, rate, left = self.share, self.rate, self.seconds_left
        time_told = f"{human_seconds(left)} left" if left is not None and share != 1.0 else ""
        if self.total is not None and self.done >= self.total:
            time_told = "by an earlier run" if self.kept >= self.total else f"in {human_seconds(self._seconds or 0.0)}"
        return {
            "count": f"{count} {self.unit}",
            "share": f"{share:.0%}" if share is not None else "",
            "rate": (f"{rate:,.1f}/s" if rate >= 1 else f"{rate:.2g}/s") if rate else "",
            "time": time_told,
        }

    @property
    def line(self) -> str:
        return f"{self.name}: {', '.join(filter(None, self._texts.values()))}"

    def bar(self, name_width: int, width: int, *, ascii_only: bool) -> Text:
        """As much as fits, the time left in any case: the rate goes first, then the bar, the name's end, the count."""
        from rich.text import Text

        texts, share = {name: text for name, text in self._texts.items() if text}, self.share
        for num_dropped in range(4):
            dropped = ("rate", "bar", "count")[:num_dropped]
            shown = [text for name, text in texts.items() if name not in dropped]
            room = width - sum(2 + len(text) for text in shown)
            has_bar = share is not None and "bar" not in dropped
            name = name_width if num_dropped < 2 else min(name_width, _MIN_NAME)
            if room >= name + (2 + _MIN_BAR) * has_bar:
                break
        name_width = max(0, min(name_width, room))
        line = Text(f"{self.name:<{name_width}}")
        line.truncate(name_width, overflow="ellipsis")
        if has_bar and share is not None:
            size = min(_MAX_BAR, room - name_width - 2)
            full, (done, rest) = round(min(1.0, share) * size), "#-" if ascii_only else "━─"
            line.append("  ").append(done * full, "green").append(rest * (size - full), "bright_black")
        line.append("".join(f"  {text}" for text in shown))
        line.truncate(width)
        return line


def confirm(question: str, *, yes: bool) -> None:
    """Asks on standard error unless `yes`, the command's --yes. CommandFailed: without a terminal; Abort: no."""
    if not yes:
        if not sys.stdin.isatty():
            raise CommandFailed(f"{question} --yes is needed without a terminal")
        click.confirm(question, abort=True, err=True)  # noqa: TID251 - here it is asked


def print_json(value: object) -> None:
    """For machines."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_result(values: Mapping[str, Any] | Sequence[Mapping[str, Any]], line: str, *, as_json: bool) -> None:
    """What a command did: for machines, or in a line for people."""
    if as_json:
        print_json(values)
    else:
        print_parts(line)


def print_some(
    title: str, lines: Iterable[object], max_shown: int = 20, *, num_lines: int = 0, more: str = "", err: bool = False
) -> None:
    """The first lines, each behind the title, and how many more there are; `more` says where those are.

    `num_lines` counts them where `lines` has no length.
    """
    for line in islice(lines, max_shown):
        print_parts(f"{title}: {line}", err=err)
    num_more = (len(lines) if isinstance(lines, Sized) else num_lines) - max_shown
    if num_more > 0:
        print_parts(f"{title}: {num_more:,} more{more}", err=err)
