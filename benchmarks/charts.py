"""How every picture here looks. Draws what it is given; reads and measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuning.sweep.page import COLOURS, FAINT, INK

PANEL = (3.5, 3.2)  # inches


@contextmanager
def panels(target: Path, number: int, *, legend_rows: int = 1, share_y: bool = False) -> Iterator[Sequence[Any]]:
    """`number` axes beside one another, written to `target` with one legend under all of them."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
        "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "lines.linewidth": 1.4, "lines.markersize": 4,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(PANEL[0] * number, PANEL[1] + 0.25 * legend_rows), layout="constrained")
        axes = figure.subplots(1, number, squeeze=False, sharey=share_y)[0]
        for one in axes:
            one.grid(color="#e4e7eb", linewidth=0.6)
            one.set_axisbelow(True)
        yield axes
        entries = {label: line for one in axes for line, label in zip(*one.get_legend_handles_labels(), strict=True)}
        columns = -(-len(entries) // legend_rows)
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
        figure.savefig(target, dpi=120)


def line(axes: Any, points: Sequence[tuple[float, float]], label: str, place: int, **style: Any) -> None:
    """One series; `place` is its colour's, the same in every panel."""
    xs, ys = zip(*sorted(points), strict=True)
    axes.plot(xs, ys, marker="o", color=COLOURS[place % len(COLOURS)], label=label, **style)


def ticks(axes: Any, values: Sequence[float]) -> None:
    """These on the x axis and no others, written out; decades beyond thousands with their letter."""
    axes.set_xticks(list(values), [_short(value) if max(values) >= 1e5 else f"{value:,.0f}" for value in values])
    axes.xaxis.minorticks_off()


def _short(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"
