"""Output for people in a terminal: sizes, the first of many lines, a bar while something runs."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import click

from preread_cli.failures import CommandFailed

LINE_SECONDS = 10.0


@contextmanager
def progress_bar(label: str, *, shows_time_left: bool = True) -> Iterator[Callable[..., None]]:
    """A bar on standard error; call it with how much is done, of how much, and maybe a text to show in their place.

    Where standard error is no terminal there is no bar, and the text, if any, is printed now and then.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console, last = Console(stderr=True), time.monotonic()
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")]
    columns += [TimeRemainingColumn()] if shows_time_left else []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=None, text="")

        def update(num_done: float, num_all: float | None, text: str = "") -> None:
            nonlocal last
            bar.update(task, completed=num_done, total=num_all, text=text or f"{num_done:,}/{num_all:,}")
            if text and not console.is_terminal and time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                click.echo(text, err=True)

        yield update


def confirm(question: str, *, yes: bool) -> None:
    """Asks on standard error unless `yes`, the command's --yes. CommandFailed: without a terminal; Abort: no."""
    if not yes:
        if not sys.stdin.isatty():
            raise CommandFailed(f"{question} --yes is needed without a terminal")
        click.confirm(question, abort=True, err=True)  # noqa: TID251 - here it is asked


def print_json(value: object) -> None:
    """For machines."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_result(values: Mapping[str, Any], line: str, *, as_json: bool) -> None:
    """What a command did: for machines, or in a line for people."""
    if as_json:
        print_json(values)
    else:
        click.echo(line)


def print_some(
    title: str, lines: Iterable[object], max_shown: int = 20, *, num_lines: int = 0, more: str = "", err: bool = False
) -> None:
    """The first lines, each behind the title, and how many more there are; `more` says where those are.

    `num_lines` counts them where `lines` has no length.
    """
    for line in islice(lines, max_shown):
        click.echo(f"{title}: {line}", err=err)
    num_more = (len(lines) if isinstance(lines, Sized) else num_lines) - max_shown
    if num_more > 0:
        click.echo(f"{title}: {num_more:,} more{more}", err=err)
