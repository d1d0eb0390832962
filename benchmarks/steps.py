"""The steps of a pass one by one, each next to plain torch: what packing, fusing and two products buy.

    python -m benchmarks.steps [--dtype bfloat16]

Shapes of Nano with ten candidates of 72 prompt tokens and 86 states. Best of many repeats: a step is a
fraction of a millisecond, and a neighbour's time slice is longer than that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.common import report, start
from checkpoint.compute import DTYPES
from checkpoint.layers import GatedLinear, Linear, Pointwise, attend

DIM, INNER, HEADS, HEAD, BATCH, PROMPT, STATES = 640, 2048, 4, 256, 10, 72, 86
EPS = 1e-6


def best_seconds(call: Callable[[], object], repeats: int = 25) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    start()
    dtype = DTYPES[args.dtype]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    rows: list[list[object]] = []

    def compare(name: str, ours: Callable[[], object], plain: Callable[[], object], operations: float = 0.0) -> None:
        times = [best_seconds(call) for call in (ours, plain)]
        rates = [operations / seconds / 1e9 if operations else "" for seconds in times]
        rows.append([name, times[0] * 1e6, times[1] * 1e6, times[1] / times[0], *rates])

    for num_rows, num_in, num_out in ((1, DIM, INNER), (72, DIM, INNER), (720, DIM, INNER), (720, INNER, DIM)):
        x, weight = random(num_rows, num_in), random(num_out, num_in)
        packed = Linear(weight)
        name = f"product, {num_rows} x {num_in} x {num_out}"
        compare(name, lambda: packed(x), lambda: F.linear(x, weight), 2 * num_rows * num_in * num_out)  # noqa: B023
    tokens = BATCH * PROMPT
    x, gate, up = random(tokens, DIM), random(INNER, DIM) / 25, random(INNER, DIM) / 25
    gated = GatedLinear(gate, up)
    compare(
        "both products of the gate and gelu",
        lambda: gated(x),
        lambda: F.gelu(F.linear(x, gate), approximate="tanh") * F.linear(x, up),
        4 * tokens * DIM * INNER,
    )
    fused, plain = Pointwise(EPS, compiled=True), Pointwise(EPS)
    update, norm = random(tokens, DIM), torch.randn(DIM)
    compare(
        "residual and the norms around it",
        lambda: fused.add_norm(x, update, norm, norm),
        lambda: plain.add_norm(x, update, norm, norm),
    )
    heads, weight = random(tokens, HEADS, HEAD), torch.randn(HEAD)
    cos, sin = random(tokens, 1, HEAD), random(tokens, 1, HEAD)
    compare(
        "a head's norm and rotation",
        lambda: fused.norm_rotate(heads, weight, cos, sin),
        lambda: plain.norm_rotate(heads, weight, cos, sin),
    )
    q, keys = random(BATCH, 1, PROMPT * HEADS, HEAD) / 16, random(BATCH, 1, PROMPT + STATES, HEAD)
    mask = torch.zeros(BATCH, 1, PROMPT, PROMPT + STATES, dtype=dtype)
    dense = mask.repeat_interleave(HEADS, dim=2)
    compare(
        "attention, beside torch's kernel",
        lambda: attend(q, keys, keys, mask, fused),
        lambda: F.scaled_dot_product_attention(q, keys, keys, attn_mask=dense, scale=1.0),
        4 * q.numel() * (PROMPT + STATES),
    )
    columns = ["step", "µs", "µs, plain", "speedup", "Gop/s", "Gop/s, plain"]
    report(f"steps_{args.dtype}", columns, rows, batch=BATCH, compiled=fused.compiled)


if __name__ == "__main__":
    main()
