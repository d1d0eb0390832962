"""A sweep's outcome as JSON, as a table in the terminal, and as TOML for the other commands."""

import json
from dataclasses import asdict
from textwrap import fill
from typing import Any

from preread_edge.tables import TEXT, WHOLE, Column, Table, print_parts
from tuning.metrics import HEADLINE, Quality
from tuning.report import format_json
from tuning.sweep.margins import AUC, TAU
from tuning.sweep.report import SweepReport, SweepRow
from tuning.sweep.summary import SweepSummary

_FORMAT_VERSION = 1
_COMMENT_WIDTH = 120
_SMALL, _FAST, _CHOSEN = "●", "◆", "▶"


def _quality_json(quality: Quality) -> dict[str, Any]:
    return quality.measures_json(change=quality.change, kept=quality.share)


def _row_json(row: SweepRow) -> dict[str, Any]:
    one = row.configuration
    return {
        "name": one.name,
        "stored_ratio": one.stored_ratio,
        "codec": one.codec,
        "stages": [asdict(stage) for stage in one.reading.stages],
        "quality": _quality_json(row.quality),
        "size": asdict(row.size),
        "timing": asdict(row.timing) if row.timing is not None else None,
        "indexing": asdict(row.indexing),
    }


def sweep_json(summary: SweepSummary) -> str:
    """One JSON document; with the same seed only `hardware`, `summary`'s times, `timing` and `indexing` differ."""
    plain = "collection checkpoint fingerprint dtype device hardware instruction num_queries num_passages"
    plain += " num_candidates mean_tokens reference_ratio taught"
    report, choice = summary.report, summary.choice
    chosen: dict[str, Any] | None = None
    if choice is not None:
        name, broken = choice.row.configuration.name, choice.broken
        chosen = {"name": name, "keeps_all_limits": not broken, "broken": broken}
    return format_json(
        {
            "format_version": _FORMAT_VERSION,
            "summary": summary.to_json(),
            **{name: getattr(report, name) for name in plain.split()},
            "settings": asdict(report.settings),
            "notes": report.notes,
            "query_ids": list(report.qrels),
            "first_stage": {"name": report.first_stage_name, "quality": _quality_json(report.first_stage)},
            "reference": {"quality": _quality_json(report.reference), "size": asdict(report.reference_size)},
            "limits": asdict(summary.limits),
            "choice": chosen,
            "configurations": [
                _row_json(row) | {"on_size_front": small, "on_latency_front": fast}
                for row, small, fast in report.marked
            ],
        }
    )


def print_sweep(summary: SweepSummary, *, show_all: bool = False) -> None:
    """Table with the fronts marked, how to read it, notes about the data and the summary, on standard output."""
    report, settings, finest = summary.report, summary.report.settings, f"r = {summary.report.reference_ratio}"
    chosen = summary.choice.row if summary.choice is not None else None
    shown = [one for one in report.marked if show_all or any(one[1:]) or one[0] is chosen]
    left = len(report.rows) - len(shown)
    print_parts(
        _table(report, shown, chosen),
        f"{_SMALL} {_FAST}: no other is as small ({_SMALL}) or as fast ({_FAST}) and better in {HEADLINE}. "
        f"▲ ▼: the paired difference from {finest} excludes 0 "
        f"(95% bootstrap, {settings.num_resamples:,} resamples, seed {settings.seed}).",
        f"tau, top-{settings.overlap_k}: Kendall's tau and overlap with {finest}. "
        "bytes: of a stored passage, without its text. "
        f"ms: one query's {settings.top_k} candidates, in this process.",
        *([f"{left} configurations are on neither front and not shown (--all shows them)."] if left else []),
        *(f"Note: {note}." for note in report.notes),
        "",
        *summary.sentences,
    )


def config_toml(summary: SweepSummary, row: SweepRow, model: str | None = None, *, control_tokens: bool = False) -> str:
    """A configuration as the file that `preread index --config` and `preread serve --config` take.

    `model`: where it is not preread's own. `control_tokens`: whether the measured encoder read them in texts.
    """
    one, split = row.configuration, summary.report.settings.split
    told = (f"{one.name}: chosen by preread tune.", *summary.sentences)
    head = "\n".join(fill(line, _COMMENT_WIDTH, initial_indent="# ", subsequent_indent="#   ") for line in told)
    index = {"compression-ratio": one.stored_ratio, "codec": one.codec, **({"split": True} if split else {})}
    reading = one.reading
    serve = {"stages": str(reading)} if reading.is_cascade else {"read-ratio": reading.ratios[0]}
    blocks = [head, *([f"model = {json.dumps(model)}"] if model is not None else [])]
    blocks += ["read-control-tokens = true"] if control_tokens else []
    for name, values in (("index", index), ("serve", serve)):
        # JSON's strings, integers and booleans are TOML's.
        blocks.append("\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]))
    return "\n\n".join(blocks) + "\n"


def _table(report: SweepReport, shown: list[tuple[SweepRow, bool, bool]], chosen: SweepRow | None) -> Table:
    overlap, finest = report.settings.overlap_name, str(report.reference_ratio)
    compared = (f"against r = {finest}", "MRR@10", "tau", f"top-{report.settings.overlap_k}", "AUC")
    keys = (Column("", WHOLE), Column("stored"), Column("codec", TEXT), Column("read"))
    numbers = map(Column, (HEADLINE, *compared, "bytes", "p50 ms", "p99 ms"))
    table = Table([*keys, *numbers], num_keys=len(keys))
    table.add("", "", report.first_stage_name, "", *_quality(report.first_stage, overlap), "", "", "")
    table.add("", finest, "none", finest, *_quality(report.reference, overlap), "", "", "")
    for row, small, fast in sorted(shown, key=lambda one: one[0].size.bytes_per_passage):
        one, is_chosen = row.configuration, row is chosen
        marks = "".join(mark if on else " " for on, mark in ((is_chosen, _CHOSEN), (small, _SMALL), (fast, _FAST)))
        times = ["–", "–"]
        if row.timing is not None:
            times = [f"{seconds * 1000:,.1f}" for seconds in (row.timing.p50_seconds, row.timing.p99_seconds)]
        cells = (marks, str(one.stored_ratio), one.codec, str(one.reading), *_quality(row.quality, overlap))
        table.add(*cells, f"{row.size.bytes_per_passage:,.0f}", *times, style="bold" if is_chosen else "")
    return table


def _quality(quality: Quality, overlap: str) -> list[str]:
    mark = quality.change[HEADLINE].mark if quality.change is not None else " "
    others = [quality.measures.get(name) for name in ("MRR@10", TAU, overlap, AUC)]
    return [
        str(quality.measures[HEADLINE]),
        f"{quality.change_words} {mark}" if quality.share is not None else "",
        *(f"{one.mean:.3f}" if one is not None else "–" for one in others),
    ]
