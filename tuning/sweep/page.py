"""The three figures of a sweep, as PNG and as SVG for the page. Draws; computes nothing but where things go.

Which queries a configuration wins and loses against the reference, and which passages moved. Computes no measure.

The report as one HTML file that needs no network. Fills a template; computes nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from preread_edge.outputs import write_output
from tuning import MissingExtra
from tuning.metrics import HEADLINE
from tuning.sweep.quality import AUC, TAU, overlap_name
from tuning.sweep.report import Choice, Limits, SweepReport, SweepRow, describe_broken
from tuning.trec import Run

if TYPE_CHECKING:
    from jinja2 import Environment


# Okabe and Ito's colours, which stay apart for colour-blind readers, and three more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5539", "#6A4C93", "#8A8F98")
INK, FAINT, FRONT = "#1f2933", "#9aa5b1", "#52606d"
SIZE = (6.4, 4.9)  # inches, legend included
_SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Plot:
    """One figure: a name for its file, what it shows, and both forms of it."""

    name: str
    title: str
    png: bytes
    svg: str


def check_available() -> None:
    """
    Raises:
        MissingExtra: matplotlib or Jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise MissingExtra("the report", "tune", exc) from exc


def plots(report: SweepReport, chosen: SweepRow | None) -> list[Plot]:
    """Quality against bytes, against latency where it was timed, and over the ratio read at."""
    figures: list[tuple[str, str, Callable[[Any], None]]] = [
        ("quality-bytes", "Quality against bytes", lambda axes: _against_bytes(axes, report, chosen))
    ]
    if report.timed:
        figures.append(("quality-latency", "Quality against latency", lambda ax: _against_latency(ax, report, chosen)))
    figures.append(("quality-ratio", "Quality over the ratio read at", lambda axes: _over_ratio(axes, report)))
    return [_plot(name, title, draw, report) for name, title, draw in figures]


def _plot(name: str, title: str, draw: Callable[[Any], None], report: SweepReport) -> Plot:
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "axes.edgecolor": FAINT, "text.color": INK,
        "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color="#e4e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_ylabel(f"{HEADLINE}{' against r = 1' if report.taught else ''}")
        draw(axes)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(name, title, png.getvalue(), _with_titles(svg.getvalue(), name, report))


def _against_bytes(axes: Any, report: SweepReport, chosen: SweepRow | None) -> None:
    from matplotlib.ticker import LogLocator

    colours = {codec: COLOURS[place % len(COLOURS)] for place, codec in enumerate(report.codecs)}
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes of a stored passage, in the mean")
    points = [row.size.bytes_per_passage for row in report.rows]
    _reference(axes, report)
    _scatter(
        axes, report, points, report.on_size_front(), [colours[r.configuration.codec] for r in report.rows], chosen
    )
    _legend(axes, [(codec, colour, "o") for codec, colour in colours.items()], report)
    axes.xaxis.set_major_locator(LogLocator(base=4))
    axes.xaxis.set_major_formatter(lambda value, _: _short_bytes(value))
    axes.minorticks_off()


def _against_latency(axes: Any, report: SweepReport, chosen: SweepRow | None) -> None:
    ratios = sorted({row.configuration.stages[-1].compression_ratio for row in report.rows})
    colours = {ratio: COLOURS[place % len(COLOURS)] for place, ratio in enumerate(ratios)}
    axes.set_xlabel(f"p50 of a rerank of {report.settings.top_k}, ms  ({report.machine})")
    points = [row.timing.p50_seconds * 1000 if row.timing is not None else 0.0 for row in report.rows]
    _reference(axes, report)
    own = [colours[row.configuration.stages[-1].compression_ratio] for row in report.rows]
    _scatter(axes, report, points, report.on_latency_front(), own, chosen)
    _legend(axes, [(f"read at {ratio}", colours[ratio], "o") for ratio in ratios], report)
    axes.set_xlim(left=0)


def _over_ratio(axes: Any, report: SweepReport) -> None:
    """One line for each codec, of the finest stored ratio that has it."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel("ratio read at (tokens per state)")
    single = [row for row in report.rows if not row.configuration.is_cascade]
    ratios = sorted({row.configuration.stages[0].compression_ratio for row in single})
    for place, codec in enumerate(dict.fromkeys(row.configuration.codec for row in single)):
        own = [row for row in single if row.configuration.codec == codec]
        finest = min(row.configuration.stored_ratio for row in own)
        line = sorted(
            (row for row in own if row.configuration.stored_ratio == finest),
            key=lambda row: row.configuration.stages[0].compression_ratio,
        )
        xs = [row.configuration.stages[0].compression_ratio for row in line]
        colour = COLOURS[place % len(COLOURS)]
        if place == 0:
            bounds = [row.quality.measures[HEADLINE] for row in line]
            axes.fill_between(xs, [b.low for b in bounds], [b.high for b in bounds], color=colour, alpha=0.10, lw=0)
        axes.plot(xs, [row.quality.headline for row in line], color=colour, lw=1.6, marker="o", ms=5,
                  label=f"{codec}, stored at {finest}")  # fmt: skip
    axes.axhline(report.first_stage.headline, color=FAINT, lw=1, ls=":", label=report.first_stage_name)
    axes.set_xticks(ratios, [str(ratio) for ratio in ratios])
    axes.minorticks_off()
    _below(axes, axes.get_legend_handles_labels()[0])


def _reference(axes: Any, report: SweepReport) -> None:
    finest = report.reference.measures[HEADLINE]
    axes.axhline(finest.mean, color=INK, lw=1, ls="--", label=f"r = {report.reference_ratio}, no codec")
    if not report.taught:
        axes.axhline(report.first_stage.headline, color=FAINT, lw=1, ls=":", label=report.first_stage_name)


def _scatter(
    axes: Any, report: SweepReport, xs: list[float], front: list[bool], colours: list[str], chosen: SweepRow | None
) -> None:
    on = sorted((x, row.quality.headline) for x, row, is_on in zip(xs, report.rows, front, strict=True) if is_on)
    axes.plot([x for x, _ in on], [y for _, y in on], color=FRONT, lw=1.2, drawstyle="steps-post", zorder=1)
    for place, (x, row, is_on, colour) in enumerate(zip(xs, report.rows, front, colours, strict=True)):
        y = row.quality.headline
        marker = "D" if row.configuration.is_cascade else "o"
        axes.scatter([x], [y], s=46 if is_on else 26, color=colour, marker=marker, alpha=1.0 if is_on else 0.45,
                     edgecolors=INK if is_on else "none", linewidths=0.9, zorder=3 if is_on else 2,
                     gid=f"row-{place}")  # fmt: skip
        if row is chosen:
            axes.scatter([x], [y], s=210, facecolors="none", edgecolors="#c81e1e", linewidths=1.8, zorder=4)
            axes.annotate(row.configuration.name, (x, y), xytext=(10, -14), textcoords="offset points",
                          color="#c81e1e", fontsize=9, fontweight="bold", zorder=5,
                          bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5})  # fmt: skip


def _legend(axes: Any, kinds: list[tuple[str, str, str]], report: SweepReport) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker=marker, ls="", label=name) for name, colour, marker in kinds]
    if any(row.configuration.is_cascade for row in report.rows):
        handles.append(Line2D([], [], color=FAINT, marker="D", ls="", label="cascade"))
    handles.append(Line2D([], [], color=FRONT, lw=1.2, label="Pareto front"))
    lines, labels = axes.get_legend_handles_labels()
    handles += [line for line, label in zip(lines, labels, strict=True) if not label.startswith("_")]
    _below(axes, handles)


def _below(axes: Any, handles: list[Any]) -> None:
    """The legend, out of the data's way."""
    axes.figure.legend(handles=handles, fontsize=8.5, loc="outside lower center", ncols=4, columnspacing=1.4)


def _with_titles(svg: bytes, name: str, report: SweepReport) -> str:
    """The SVG element alone, each point with a title a browser shows on hovering."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for group in root.iter(f"{{{_SVG}}}g"):
        id_ = group.get("id", "")
        if id_.startswith("row-"):
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = _tip(report.rows[int(id_.removeprefix("row-"))])
            group.insert(0, title)
        if id_:
            group.set("id", f"{name}-{id_}")  # several figures share a page
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    del root.attrib["width"], root.attrib["height"]  # as wide as the page has room
    root.set("role", "img")
    return ElementTree.tostring(root, encoding="unicode")


def _tip(row: SweepRow) -> str:
    own = row.quality.measures[HEADLINE]
    lines = [
        row.configuration.name,
        f"{HEADLINE} {own.mean:.4f} [{own.low:.4f}, {own.high:.4f}], {row.quality.gain:+.2%}",
        f"{row.size.bytes_per_passage:,.0f} bytes a passage",
    ]
    if row.timing is not None:
        lines.append(f"p50 {row.timing.p50_seconds * 1000:.1f} ms, p99 {row.timing.p99_seconds * 1000:.1f} ms")
    return "\n".join(lines)


def _short_bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.0f} GiB"


NUM_SHOWN = 5
NUM_MOVED = 3
MAX_TEXT_CHARACTERS = 280


@dataclass(frozen=True)
class Moved:
    """A passage and its places, from 1, in the reference's order and in this one."""

    passage_id: str
    text: str
    grade: int
    before: int
    after: int


@dataclass(frozen=True)
class Example:
    """One query, its nDCG@10 with the reference and here, and what moved."""

    query_id: str
    text: str
    before: float
    after: float
    moved: list[Moved]


@dataclass(frozen=True)
class Examples:
    """The queries that changed most, the most changed first."""

    row: SweepRow
    losses: list[Example]
    wins: list[Example]
    num_lost: int
    num_won: int
    num_same: int


def examples_of(report: SweepReport, row: SweepRow) -> Examples:
    """Of one configuration."""
    before = report.reference.per_query[HEADLINE]
    after = row.quality.per_query[HEADLINE]
    change = {q: float(b - a) for q, a, b in zip(report.query_ids, before, after, strict=True)}
    values = {q: (float(a), float(b)) for q, a, b in zip(report.query_ids, before, after, strict=True)}
    order = sorted(change, key=lambda q: (change[q], q))
    lost = [q for q in order if change[q] < 0]
    won = [q for q in reversed(order) if change[q] > 0]

    def example(query_id: str) -> Example:
        moved = _moved(report, query_id, report.reference.run, row.quality.run)
        return Example(query_id, report.queries.get(query_id, ""), *values[query_id], moved)

    return Examples(
        row,
        [example(q) for q in lost[:NUM_SHOWN]],
        [example(q) for q in won[:NUM_SHOWN]],
        len(lost),
        len(won),
        len(order) - len(lost) - len(won),
    )


def shown_rows(report: SweepReport, chosen: SweepRow | None, most: int = 12) -> list[SweepRow]:
    """The chosen one first, then both fronts from small to large."""
    on = zip(report.rows, report.on_size_front(), report.on_latency_front(), strict=True)
    fronts = sorted((row for row, small, fast in on if small or fast), key=lambda row: row.size.bytes_per_passage)
    rows = [row for row in fronts if row is not chosen]
    return ([chosen] if chosen is not None else []) + rows[:most]


def _moved(report: SweepReport, query_id: str, before: Run, after: Run) -> list[Moved]:
    """The relevant candidates that changed places, and who stands first now."""
    places = [{p: place for place, (p, _) in enumerate(run.get(query_id, []), 1)} for run in (before, after)]
    grades = report.qrels.get(query_id, {})

    def entry(p: str) -> Moved:
        text = " ".join(report.passages.get(p, "").split())
        short = text if len(text) <= MAX_TEXT_CHARACTERS else text[: MAX_TEXT_CHARACTERS - 1] + "…"
        return Moved(p, short, grades.get(p, 0), places[0][p], places[1][p])

    relevant = [entry(p) for p in places[1] if grades.get(p, 0) > 0]
    changed = sorted((one for one in relevant if one.before != one.after), key=lambda one: -abs(one.after - one.before))
    changed = changed[:NUM_MOVED]
    first = next(iter(places[1]), None)
    if first is not None and all(one.passage_id != first for one in changed):
        changed.append(entry(first))
    return changed


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
