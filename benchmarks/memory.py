"""Peak memory of each half while it loads, on a Nano-shaped random checkpoint.

    python -m benchmarks.memory

Each half is loaded in a fresh process; what imports and the tokenizer took before is subtracted.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.common import nano_checkpoint, report


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel reports no VmHWM")


def measure(half: str, directory: str, dtype: str) -> None:
    """Runs in the child: prints the half's own bytes and the peak above the baseline."""
    import transformers.models.t5gemma2.modeling_t5gemma2 as _  # noqa: F401 - part of the baseline

    from checkpoint import Checkpoint
    from checkpoint.compute import DTYPES
    from checkpoint.shapes import embedding_shapes, stack_shapes

    checkpoint = Checkpoint.open(directory)
    tokenizer = checkpoint.text
    config = checkpoint.encoder_config if half == "encoder" else checkpoint.decoder_config
    shapes = stack_shapes(half, config) | embedding_shapes(half, config)
    own = sum(_product(shape) for shape in shapes.values()) * DTYPES[dtype].itemsize
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark again
    before = peak_bytes()
    if half == "encoder":
        from encoder_worker.encoder import Encoder

        Encoder.load(checkpoint, device="cpu", dtype=dtype).encode([tokenizer.passages(["warm up"])[0].ids], 4)
    else:
        from decoder_server.fbnl import FbnlBackend

        FbnlBackend.load(checkpoint, device="cpu", dtype=dtype).warm_up()
    print(own, peak_bytes() - before)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def main() -> None:
    if len(sys.argv) == 4:
        measure(*sys.argv[1:])
        return
    directory = nano_checkpoint()
    rows = []
    for half in ("encoder", "decoder"):
        for dtype in ("bfloat16", "float32"):
            command = [sys.executable, "-m", "benchmarks.memory", half, str(directory), dtype]
            own, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
            rows.append([half, dtype, round(own / 2**20), round(peak / 2**20), peak / own])
    report("memory", ["half", "dtype", "own MiB", "peak MiB", "peak / own"], rows)


if __name__ == "__main__":
    main()
