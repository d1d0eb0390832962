"""The report as one HTML file that needs no network. Fills a template; computes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from preread.outputs import write_output
from tuning.metrics import HEADLINE
from tuning.sweep.choice import Choice, Limits
from tuning.sweep.examples import examples_of, shown_rows
from tuning.sweep.plots import Plot, plots
from tuning.sweep.quality import AUC, TAU, overlap_name
from tuning.sweep.result import SweepReport
from tuning.sweep.table import describe_broken

if TYPE_CHECKING:
    from jinja2 import Environment

_FOLDER = Path(__file__).parent
_TEMPLATE = "report.html.jinja"


def write_page(folder: Path, report: SweepReport, limits: Limits, choice: Choice | None) -> list[Path]:
    """`report.html` and a PNG for each figure.

    Raises:
        MissingExtra: matplotlib or Jinja2 is not installed.
    """
    drawn = plots(report, choice.row if choice is not None else None)
    paths = []
    for plot in drawn:
        paths.append(folder / f"{plot.name}.png")
        write_output(paths[-1], plot.png)
    paths.append(folder / "report.html")
    write_output(paths[-1], page(report, limits, choice, drawn))
    return paths


def page(report: SweepReport, limits: Limits, choice: Choice | None, drawn: list[Plot]) -> str:
    """The whole file."""
    small, fast = report.on_size_front(), report.on_latency_front()
    chosen = choice.row if choice is not None else None
    return (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            report=report,
            limits=limits,
            choice=choice,
            broken=describe_broken(choice, limits) if choice is not None and choice.broken else "",
            plots=drawn,
            rows=list(zip(report.rows, small, fast, strict=True)),
            measures=[HEADLINE, "MRR@10", TAU, overlap_name(report.settings.overlap_k), AUC],
            headline=HEADLINE,
            examples=[examples_of(report, row) for row in shown_rows(report, chosen)],
        )
    )


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["ms"] = lambda seconds: f"{seconds * 1000:,.1f}"
    environment.filters["duration"] = duration
    environment.filters["size"] = size
    return environment


def size(num_bytes: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def duration(seconds: float | None) -> str:
    """90 -> 1.5 min."""
    if seconds is None:
        return "–"
    for unit, length in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds * 1000:,.0f} ms"
