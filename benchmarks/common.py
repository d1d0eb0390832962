"""What every benchmark here shares: the hardware line, medians, tables and JSON. Times nothing by itself."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from checkpoint.compute import tune_process
from checkpoint.hardware import hardware

RESULTS = Path(__file__).parent / "results"
CACHE = Path(os.environ.get("PREREAD_BENCHMARK_CACHE", Path.home() / ".cache" / "preread-benchmarks"))


def start(num_threads: int | None = None) -> None:
    """The same process settings the server uses."""
    tune_process(num_threads)
    torch.set_flush_denormal(True)
    torch.set_grad_enabled(False)


def nano_checkpoint() -> Path:
    """Random weights in the shape of KaLM-Reranker-V1-Nano's text halves, made once and kept."""
    from checkpoint.synthetic import make_checkpoint

    directory = CACHE / "nano-random"
    if not (directory / "model.safetensors").exists():
        make_checkpoint(directory, "nano", dtype=torch.bfloat16)
    return directory


def median_seconds(call: Callable[[], object], *, repeats: int = 5, warm_up: int = 1) -> float:
    """Median wall time of `call`, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def matmul_peak(dtype: torch.dtype, shape: tuple[int, int, int] = (2048, 2048, 2048)) -> float:
    """The machine's own best floating-point rate on a large square product, operations a second."""
    m, k, n = shape
    left, right = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    return 2 * m * k * n / median_seconds(lambda: F.linear(left, right), repeats=15, warm_up=3)


def report(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], **extra: Any) -> None:
    """Prints hardware and table (GitHub markdown) and writes results/NAME.json."""
    machine = hardware()
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
    shown = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *shown, strict=True)]
    for line in (columns, ["-" * width for width in widths], *shown):
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")
    for key, value in extra.items():
        print(f"{key}: {value}")
    RESULTS.mkdir(exist_ok=True)
    content = {"hardware": machine, "columns": list(columns), "rows": [list(row) for row in rows]} | extra
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
