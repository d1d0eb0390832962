"""A chosen configuration as the TOML file that `preread index --config` and `preread serve --config` take."""

from __future__ import annotations

import json
from typing import Any

from tuning.sweep.result import Row, SweepReport


def config_toml(report: SweepReport, row: Row, model: str | None = None, *, control_tokens: bool = False) -> str:
    """Stored ratio and codec for index, how they are read for serve.

    Args:
        model: the checkpoint, where it is not the one that comes with preread.
        control_tokens: whether the measured encoder read control tokens in texts, which its fingerprint says.
    """
    one, quality = row.configuration, row.quality
    low, high = quality.loss_bounds
    lines = [
        f"# {one.name}: chosen by preread tune on {report.num_queries} queries of {report.collection}.",
        f"# nDCG@10 {quality.headline:.4f}, {quality.loss:.2%} below r = {report.reference_ratio} "
        f"[{low:.2%}, {high:.2%}]; {row.size.bytes_per_passage:,.0f} bytes a passage.",
    ]
    if row.timing is not None:
        lines.append(
            f"# A rerank of {report.settings.top_k}: p50 {row.timing.p50_seconds * 1000:.1f} ms, "
            f"p99 {row.timing.p99_seconds * 1000:.1f} ms on {report.hardware['processor']} ({report.dtype})."
        )
    if model is not None:
        lines += ["", _line("model", model)]
    if control_tokens:
        lines += ["", _line("read-control-tokens", True)]
    lines += ["", "[index]", _line("compression-ratio", one.stored_ratio), _line("codec", one.codec)]
    if report.settings.split:
        lines.append(_line("split", True))
    reading = ("stages", one.reading) if one.is_cascade else ("read-ratio", one.stages[0].compression_ratio)
    lines += ["", "[serve]", _line(*reading)]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any) -> str:
    # JSON's strings, integers and booleans are TOML's.
    return f"{key} = {json.dumps(value)}"
