"""Output for people in a terminal: facts under one another, sizes, a bar while something runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tuning.health.report import HealthReport
    from tuning.report import EvaluationReport


def print_facts(facts: Mapping[str, object]) -> None:
    """One fact per line, values under one another."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))
    Console(soft_wrap=False).print(table)


def print_json(value: object) -> None:
    """For machines."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_report(report: EvaluationReport | HealthReport, json_file: Path | None) -> None:
    """The report as tables, and as JSON into a file; where that is standard output, only there."""
    from preread_edge.outputs import is_stdout, write_output

    if json_file is None or not is_stdout(json_file):
        report.print()
    if json_file is not None:
        write_output(json_file, report.to_json())


def print_some(
    title: str, lines: Iterable[object], max_shown: int = 20, *, num_lines: int = 0, more: str = "", err: bool = False
) -> None:
    """The first lines, each behind the title, and how many more there are; `more` says where those are.

    Args:
        num_lines: where `lines` has no length.
    """
    for line in islice(lines, max_shown):
        click.echo(f"{title}: {line}", err=err)
    num_more = (len(lines) if isinstance(lines, Sized) else num_lines) - max_shown
    if num_more > 0:
        click.echo(f"{title}: {num_more:,} more{more}", err=err)


def human_bytes(size: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


@contextmanager
def counted_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal; call it with how many are done, and of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda num_done, num_all: bar.update(task, completed=num_done, total=num_all)
