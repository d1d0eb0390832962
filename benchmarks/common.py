"""Shared by all benchmarks: the hardware line, medians, tables and JSON."""

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

from checkpoint.compute import hardware, tune_process

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


def tiny_checkpoint() -> Path:
    """For `--quick`: tries a command, measures nothing."""
    from checkpoint.synthetic import make_checkpoint

    directory = CACHE / "tiny-random"
    if not (directory / "model.safetensors").exists():
        make_checkpoint(directory)
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


def seconds_each(call: Callable[[], object], *, budget_seconds: float, max_repeats: int = 5) -> float:
    """Median wall time of `call`, as often as the budget allows; one that takes all of it runs once, unwarmed."""
    times: list[float] = []
    while len(times) <= max_repeats and (not times or sum(times) + times[-1] < budget_seconds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:] or times)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """GitHub markdown."""
    cells = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = (columns, ["-" * width for width in widths], *cells)
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def pivot(rows: Sequence[dict[str, Any]], index: str, column: str, value: str) -> str:
    """A line for each `index`, a column for each `column`; empty where nothing was measured."""
    columns = sorted({row[column] for row in rows})
    cells = {(row[index], row[column]): row[value] for row in rows}
    lines = [
        [name, *(cells.get((name, one), "") for one in columns)] for name in dict.fromkeys(row[index] for row in rows)
    ]
    return table([index, *map(shown, columns)], lines)


def shown(cell: Any) -> str:
    """Numbers to three digits, or as many as stand before the point."""
    if not isinstance(cell, float):
        return f"{cell:,}" if isinstance(cell, int) else str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"


Tables = Callable[[dict[str, Any]], str]


def rows_table(result: dict[str, Any]) -> str:
    """Every row of a result as it is."""
    return table(result["columns"], [list(row.values()) for row in result["rows"]])


def report(
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    tables: Tables = rows_table,
    *,
    quick: bool = False,
    **extra: Any,
) -> None:
    """Writes results/NAME.json, a quick run's apart from these, and prints it: hardware, tables and the rest."""
    machine = hardware()
    path = result_path(name, quick=quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"hardware": machine, "columns": list(columns), "rows": [list(row) for row in rows]} | extra
    path.write_text(json.dumps(content, indent=2) + "\n")
    print("\n" + hardware_line(machine) + "\n\n" + tables(read_result(name, quick=quick)))
    for key, value in extra.items():
        print(f"{key}: {value}")


def hardware_line(machine: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def result_path(name: str, *, quick: bool = False) -> Path:
    return (CACHE / "quick" if quick else RESULTS) / f"{name}.json"


def read_result(name: str, *, quick: bool = False) -> dict[str, Any]:
    """What `report` wrote; its rows as dictionaries."""
    content: dict[str, Any] = json.loads(result_path(name, quick=quick).read_text())
    return content | {"rows": [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]}
