"""What `preread index` shows: progress while it runs, then what became of every line. Decides nothing."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encoder_worker.sources import Reason
from preread_cli.tables import human_bytes

if TYPE_CHECKING:
    from encoder_worker.indexing import IndexEstimate
    from encoder_worker.report import IndexReport, IssueLog, Progress

MAX_SHOWN = 20
LINE_SECONDS = 10.0
WARN_CLIPPED_SHARE = 0.01
FEW_TRAINING_STATES = 1000


@contextmanager
def shown_progress(label: str) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, a line now and then elsewhere; both on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}"))
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None, numbers="")

        def update(now: Progress) -> None:
            done = None if now.fraction is None else now.fraction
            bar.update(task, completed=done or 0.0, total=None if done is None else 1.0, numbers=_numbers(now))

        yield update


@contextmanager
def counted_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over so many of so many, on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda num_done, num_all: bar.update(task, completed=num_done, total=num_all)


def _lines() -> Callable[[Progress], None]:
    last = time.monotonic()

    def update(now: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            click.echo(_numbers(now), err=True)

    return update


def _numbers(now: Progress) -> str:
    parts = [f"{now.num_done:,} passages"]
    if now.fraction is not None:
        parts[0] += f" ({now.fraction:.0%})"
    parts.append(f"{now.passages_per_second:,.1f} passages/s")
    if now.eta_seconds is not None:
        parts.append(f"{duration(now.eta_seconds)} left")
    return ", ".join(parts)


def show_json(report: IndexReport, estimate: IndexEstimate | None) -> None:
    """Counts, and with --dry-run the estimate, as one document on standard output."""
    estimated = {} if estimate is None else {"estimate": dataclasses.asdict(estimate)}
    click.echo(json.dumps(report.summary() | estimated, indent=2))


def show_report(report: IndexReport, estimate: IndexEstimate | None, *, report_file: Path | None) -> None:
    """What became of every line, on standard output."""
    _show_refused(report.refused, report.num_refused, report_file)
    if estimate is not None:
        _show_estimate(estimate, report)
    else:
        click.echo(
            f"{report.collection}: {report.num_read:,} read, {report.num_stored:,} stored, "
            f"{report.num_unchanged:,} unchanged, {report.num_refused:,} refused"
        )
        if report.num_stored:
            click.echo(
                f"{report.num_tokens:,} tokens in {duration(report.seconds)}: "
                f"{report.passages_per_second:,.1f} passages/s, {report.tokens_per_second:,.0f} tokens/s, "
                f"{report.padding_share:.2%} padding"
            )
    _show_clipped(report)
    if report.num_truncated:
        _show_cut(report.truncated, report.num_truncated, report_file)
    if report.num_split:
        click.echo(f"{report.num_split:,} passages are over the token limit and are split into windows")
    if report.alias:
        click.echo(f"alias {report.alias} -> {report.collection}")
    if report.stopped_by is not None:
        click.echo(f"preread: error: stopped at {report.stopped_by}", err=True)
    if report.interrupted:
        click.echo("preread: interrupted; run again to go on from here", err=True)


def _show_clipped(report: IndexReport) -> None:
    """Numbers that a trained codec cuts off; the stored states do not show them."""
    if report.num_clipped:
        grave = "warning: " if report.clipped_share > WARN_CLIPPED_SHARE else ""
        click.echo(
            f"{grave}{report.num_clipped:,} numbers ({report.clipped_share:.2%}) of {report.num_clipped_passages:,} "
            "passages lie outside what the codec was trained for, and are cut to it"
        )
    if report.reasons[Reason.OUT_OF_RANGE]:
        click.echo(
            f"warning: {report.reasons[Reason.OUT_OF_RANGE]:,} passages were refused because the codec was trained on "
            f"others: store them with --allow-clipped, and train it on all with `preread collection reencode "
            f"{report.collection}`; or index into a new collection with --codec B32,SQ8, which needs no training"
        )
    if 0 < report.num_training_states < FEW_TRAINING_STATES:
        click.echo(
            f"warning: the codec was trained on {report.num_training_states:,} states only; passages unlike these will "
            "be clipped or refused. B32,SQ8 needs no training"
        )


def _show_estimate(estimate: IndexEstimate, report: IndexReport) -> None:
    click.echo(f"would encode     {estimate.num_passages:,} passages; {report.num_unchanged:,} are stored already")
    click.echo(f"tokens           {estimate.num_tokens:,} and {estimate.num_padding_tokens:,} of padding")
    click.echo(f"in the store     {human_bytes(estimate.size_bytes)} for {estimate.num_states:,} states")
    if estimate.num_sample_tokens:
        click.echo(
            f"time             {duration(estimate.seconds)} at {estimate.tokens_per_second:,.0f} tokens/s, "
            f"measured on {estimate.num_sample_tokens:,} tokens"
        )


def _place(item: dict[str, Any]) -> str:
    passage = f" (id {item['passage_id']})" if item["passage_id"] is not None else ""
    return f"{item['source']}:{item['line']}{passage}: {item['message']}"


def _show_refused(items: IssueLog, num_items: int, report_file: Path | None) -> None:
    for item in islice(items, MAX_SHOWN):
        click.echo(f"refused: {_place(item)}")
    if num_items > MAX_SHOWN:
        where = f"all of them in {report_file}" if report_file else "--report FILE lists them all"
        click.echo(f"refused: {num_items - MAX_SHOWN:,} more; {where}")


def _show_cut(items: IssueLog, num_items: int, report_file: Path | None) -> None:
    """One line with an example: a limit below the usual length would fill the screen."""
    example = "".join(f" ({_place(item)})" for item in islice(items, 1))
    where = f"all of them in {report_file}" if report_file else "--report FILE lists them"
    click.echo(f"warning: {num_items:,} passages are over the token limit and are cut{example}")
    click.echo(f"         --split reads them whole, in windows; {where}")


def duration(seconds: float) -> str:
    """75 -> 1 min 15 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
