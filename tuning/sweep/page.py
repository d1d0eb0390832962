"""A sweep as one HTML file that needs no network, with figures, and examples of queries that it wins and loses.

Importing it raises MissingExtra where matplotlib or Jinja2 is not installed.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from preread_edge.outputs import human_bytes, write_output
from tuning import MissingExtra
from tuning.metrics import HEADLINE
from tuning.sweep.margins import AUC, TAU
from tuning.sweep.report import SweepReport, SweepRow
from tuning.sweep.summary import SweepSummary
from tuning.trec import Run

try:
    import jinja2
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator
except ImportError as missing:
    raise MissingExtra("the report", "tune", missing) from missing

# Okabe and Ito's colours, which stay apart for colour-blind readers, and three more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5539", "#6A4C93", "#8A8F98")
INK, FAINT = "#1f2933", "#9aa5b1"
_FRONT, _CHOSEN = "#52606d", "#c81e1e"
_SIZE = (5.6, 4.7)  # inches, legend included
_LEGEND: Any = {"fontsize": 8.5, "loc": "outside lower center", "ncols": 4, "columnspacing": 1.2}  # out of data's way
_SVG = "http://www.w3.org/2000/svg"
_NUM_SHOWN = 5  # examples of each kind
_NUM_MOVED = 3
_NUM_CONFIGURATIONS = 12  # with examples, next to the chosen one
_MAX_TEXT_CHARACTERS = 280


def write_page(folder: Path, summary: SweepSummary) -> None:
    """`report.html` and a PNG for each figure."""
    report, choice = summary.report, summary.choice
    drawings = {
        "quality-bytes": ("Quality and size", _against_bytes),
        "quality-latency": ("Quality and latency", _against_latency),
        "quality-ratio": ("Quality and the ratio read at", _over_ratio),
    }
    if not report.timed:
        del drawings["quality-latency"]
    plots = []
    for name, (title, draw) in drawings.items():
        png, svg = _drawn(name, draw, report, choice.row if choice is not None else None)
        write_output(folder / f"{name}.png", png)
        plots.append({"title": title, "svg": svg})
    loader, undefined = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=undefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"ms": lambda seconds: f"{seconds * 1000:,.1f}", "duration": _duration, "size": human_bytes}
    fronts = sorted((row for row, *on in report.marked if any(on)), key=lambda row: row.size.bytes_per_passage)
    shown = [row for row in fronts if choice is None or row is not choice.row][:_NUM_CONFIGURATIONS]
    if choice is not None:
        shown.insert(0, choice.row)
    page = environment.get_template("report.html.jinja").render(
        report=report,
        summary=summary,
        choice=choice,
        plots=plots,
        rows=report.marked,
        measures=[HEADLINE, "MRR@10", TAU, report.settings.overlap_name, AUC],
        headline=HEADLINE,
        examples=[_examples_of(report, row) for row in shown],
    )
    write_output(folder / "report.html", page)


def _duration(seconds: float | None) -> str:
    """150 -> 2.5 min."""
    if seconds is None:
        return "–"
    fitting = ((unit, own) for unit, own in (("h", 3600.0), ("min", 60.0), ("s", 1.0)) if seconds >= 2 * own)
    return next((f"{seconds / own:,.1f} {unit}" for unit, own in fitting), f"{seconds * 1000:,.0f} ms")


def _examples_of(report: SweepReport, row: SweepRow) -> dict[str, Any]:
    """The queries that changed most, the most changed first: their nDCG@10 with the reference and here."""
    before, after = (one.per_query[HEADLINE].tolist() for one in (report.reference, row.quality))
    values = {q: (a, b) for q, a, b in zip(report.qrels, before, after, strict=True)}
    change = {q: b - a for q, (a, b) in values.items()}
    order = sorted(change, key=lambda q: (change[q], q))
    lost = [q for q in order if change[q] < 0]
    won = [q for q in reversed(order) if change[q] > 0]
    losses, wins = (
        [
            {"query_id": q, "text": report.queries.get(q, ""), "moved": _moved(report, q, row.quality.run)}
            | dict(zip(("before", "after"), values[q], strict=True))
            for q in found[:_NUM_SHOWN]
        ]
        for found in (lost, won)
    )
    counts = {"num_lost": len(lost), "num_won": len(won), "num_same": len(order) - len(lost) - len(won)}
    return {"row": row, "losses": losses, "wins": wins} | counts


def _moved(report: SweepReport, query_id: str, run: Run) -> list[dict[str, Any]]:
    """The relevant candidates that changed places, and the one that ranks first now; places count from 1."""
    runs = (report.reference.run, run)
    old, new = ({p: place for place, (p, _) in enumerate(one.get(query_id, []), 1)} for one in runs)
    grades = report.qrels.get(query_id, {})
    relevant = [p for p in new if grades.get(p, 0) > 0 and old[p] != new[p]]
    shown = sorted(relevant, key=lambda p: -abs(new[p] - old[p]))[:_NUM_MOVED]
    shown += [p for p in list(new)[:1] if p not in shown]
    moved = []
    for p in shown:
        text = " ".join(report.passages.get(p, "").split())
        if len(text) > _MAX_TEXT_CHARACTERS:
            text = text[: _MAX_TEXT_CHARACTERS - 1] + "…"
        moved.append({"passage_id": p, "text": text, "grade": grades.get(p, 0), "before": old[p], "after": new[p]})
    return moved


_Draw = Callable[[Any, SweepReport, SweepRow | None], None]


def _drawn(name: str, draw: _Draw, report: SweepReport, chosen: SweepRow | None) -> tuple[bytes, str]:
    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "axes.edgecolor": FAINT, "text.color": INK,
        "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color="#e4e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
        judges = f", judged by r = {report.reference_ratio}" if report.taught else ""
        axes.set_ylabel(f"{HEADLINE} (0 to 1, higher is better{judges})")
        draw(axes, report, chosen)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return png.getvalue(), _with_titles(svg.getvalue(), name, report)


def _against_bytes(axes: Any, report: SweepReport, chosen: SweepRow | None) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("mean size of a stored passage (bytes, log scale; further left is better)")
    points = [(row.size.bytes_per_passage, small, row.configuration.codec) for row, small, _ in report.marked]
    _scatter(axes, report, points, report.codecs, chosen)
    axes.xaxis.set_major_locator(LogLocator(base=4))
    axes.xaxis.set_major_formatter(lambda value, _: human_bytes(value).replace(".0 ", " "))
    axes.minorticks_off()


def _against_latency(axes: Any, report: SweepReport, chosen: SweepRow | None) -> None:
    axes.set_xlabel(f"p50 latency of a rerank of {report.settings.top_k} candidates (ms; further left is better)")
    ratios = {row.configuration.reading.ratios[-1] for row in report.rows}
    points = [
        (row.timing.p50_seconds * 1000, fast, f"read at {row.configuration.reading.ratios[-1]}")
        for row, _, fast in report.marked
        if row.timing is not None  # all are
    ]
    _scatter(axes, report, points, [f"read at {ratio}" for ratio in sorted(ratios)], chosen)
    axes.set_xlim(left=0)


def _over_ratio(axes: Any, report: SweepReport, chosen: SweepRow | None) -> None:
    """One line for each codec, of the finest stored ratio that has it."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel("ratio read at (tokens per state, log scale)")
    single = [row for row in report.rows if not row.configuration.reading.is_cascade]
    ratios = {id(row): row.configuration.reading.ratios[0] for row in single}
    for place, codec in enumerate(dict.fromkeys(row.configuration.codec for row in single)):
        own = [row for row in single if row.configuration.codec == codec]
        finest = min(row.configuration.stored_ratio for row in own)
        line = sorted((row for row in own if row.configuration.stored_ratio == finest), key=lambda row: ratios[id(row)])
        xs = [ratios[id(row)] for row in line]
        colour = COLOURS[place % len(COLOURS)]
        if place == 0:
            bounds = [row.quality.measures[HEADLINE] for row in line]
            axes.fill_between(xs, [b.low for b in bounds], [b.high for b in bounds], color=colour, alpha=0.10, lw=0)
        label = f"{codec}, stored at {finest}"
        axes.plot(xs, [row.quality.headline for row in line], color=colour, lw=1.6, marker="o", ms=5, label=label)
    axes.axhline(report.first_stage.headline, color=_FRONT, lw=1.2, ls=":", label=report.first_stage_name)
    if chosen is not None:  # a cascade stands at its last stage's ratio
        _name(axes, chosen, chosen.configuration.reading.ratios[-1])
    ticks = sorted(set(ratios.values()))
    axes.set_xticks(ticks, [str(ratio) for ratio in ticks])
    axes.minorticks_off()
    axes.figure.legend(handles=axes.get_legend_handles_labels()[0], **_LEGEND)


def _scatter(
    axes: Any, report: SweepReport, points: list[tuple[float, bool, str]], kinds: list[str], chosen: SweepRow | None
) -> None:
    """A point for each row: x, whether it is on the front, which is joined, and its kind, by which it is coloured."""
    colours = {kind: COLOURS[place % len(COLOURS)] for place, kind in enumerate(kinds)}
    axes.axhline(report.reference.headline, color=INK, lw=1, ls="--", label=f"r = {report.reference_ratio}, no codec")
    if not report.taught:
        axes.axhline(report.first_stage.headline, color=_FRONT, lw=1.2, ls=":", label=report.first_stage_name)
    front = sorted((x, row.quality.headline) for (x, is_on, _), row in zip(points, report.rows, strict=True) if is_on)
    axes.plot([x for x, _ in front], [y for _, y in front], color=_FRONT, lw=1.2, drawstyle="steps-post", zorder=1)
    for place, ((x, is_on, kind), row) in enumerate(zip(points, report.rows, strict=True)):
        y = row.quality.headline
        marker = "D" if row.configuration.reading.is_cascade else "o"
        axes.scatter([x], [y], s=46 if is_on else 26, color=colours[kind], marker=marker, alpha=1.0 if is_on else 0.45,
                     edgecolors=INK if is_on else "none", linewidths=0.9, zorder=3 if is_on else 2,
                     gid=f"row-{place}")  # fmt: skip
        if row is chosen:
            _name(axes, row, x)
    handles = [Line2D([], [], color=colour, marker="o", ls="", label=kind) for kind, colour in colours.items()]
    if any(row.configuration.reading.is_cascade for row in report.rows):
        handles.append(Line2D([], [], color=FAINT, marker="D", ls="", label="cascade"))
    handles.append(Line2D([], [], color=_FRONT, lw=1.2, label="Pareto front"))
    lines, labels = axes.get_legend_handles_labels()
    handles += [line for line, label in zip(lines, labels, strict=True) if not label.startswith("_")]
    axes.figure.legend(handles=handles, **_LEGEND)


def _name(axes: Any, row: SweepRow, x: float) -> None:
    """Rings the point and writes its name next to it, with the interval, which is often larger than the axis."""
    own = row.quality.measures[HEADLINE]
    axes.scatter([x], [own.mean], s=210, facecolors="none", edgecolors=_CHOSEN, linewidths=1.8, zorder=4)
    text = f"{row.configuration.name}\n95%: {own.low:.2f} to {own.high:.2f}"
    # Towards the middle, so that no name is cut.
    across, up = axes.transAxes.inverted().transform(axes.transData.transform((x, own.mean)))
    left, below = across < 0.5, up > 0.5
    axes.annotate(text, (x, own.mean), xytext=(12 if left else -12, -12 if below else 12), textcoords="offset points",
                  ha="left" if left else "right", va="top" if below else "bottom", color=_CHOSEN, fontsize=9,
                  fontweight="bold", zorder=5,
                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5})  # fmt: skip


def _with_titles(svg: bytes, name: str, report: SweepReport) -> str:
    """The SVG element alone, each point with a title that a browser shows on hovering."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for group in root.iter(f"{{{_SVG}}}g"):
        id_ = group.get("id", "")
        if id_.startswith("row-"):
            row = report.rows[int(id_.removeprefix("row-"))]
            own, timing = row.quality.measures[HEADLINE], row.timing
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = (
                f"{row.configuration.name}\n"
                f"{HEADLINE} {own.mean:.4f} [{own.low:.4f}, {own.high:.4f}]\n"
                f"{row.quality.change_words} against r = {report.reference_ratio}\n"
                f"{row.size.bytes_per_passage:,.0f} bytes a passage"
            )
            if timing is not None:
                title.text += f"\np50 {timing.p50_seconds * 1000:.1f} ms, p99 {timing.p99_seconds * 1000:.1f} ms"
            group.insert(0, title)
        if id_:
            group.set("id", f"{name}-{id_}")  # several figures share a page
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    del root.attrib["width"], root.attrib["height"]  # as wide as the page has room
    root.set("role", "img")
    return ElementTree.tostring(root, encoding="unicode")
