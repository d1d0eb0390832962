"""Int8 products in the decoder, to decide whether to serve them: their rate, and what they do to margins and order.

    python -m benchmarks.int8_products [CHECKPOINT STATES.npz]

Weights in int8 per output channel, activations in uint8 per token, oneDNN's product, the rest as it is.
Without arguments the pass is timed on Nano-shaped random weights. With a checkpoint and states
(`states` (num_tokens, dim) of passages end to end, `lengths`), every passage is scored under one query in
float32, bfloat16 and with int8 products, and margins are compared with float32's.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.common import median_seconds, nano_checkpoint, report, start
from benchmarks.operations import PROMPT_TOKENS
from benchmarks.variants import BATCH
from checkpoint import Checkpoint, TokenizedPrompt
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair

RATIO = 4


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, in) -> uint8 around 128 and the scale of every token, (tokens, 1)."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 127
    return (x.float() / scale).round_().add_(128).to(torch.uint8), scale


fused_quantised = torch.compile(quantised, dynamic=True)


class Int8Linear:
    """x Wᵀ by an int8 product, in the place of checkpoint.layers.Linear."""

    def __init__(self, weight: Tensor) -> None:
        weight = weight.float()
        self.scale = weight.abs().amax(1).clamp(min=1e-12) / 127  # (out,)
        self.zero = torch.zeros(len(weight), dtype=torch.int64)
        rounded = (weight / self.scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, [PROMPT_TOKENS * BATCH, weight.shape[1]])

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(*fused_quantised(x), x.dtype)

    def product(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        linear = torch.ops.onednn.qlinear_pointwise
        out = linear(x, 1.0, 128, self.packed, self.scale, self.zero, None, 1.0, 0, dtype, "none", [], "")
        return out.mul_(scale.to(dtype))


class Int8GatedLinear:
    """gelu(x Gᵀ) · (x Uᵀ), one quantisation for both."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self.gate, self.up = Int8Linear(gate), Int8Linear(up)

    def __call__(self, x: Tensor) -> Tensor:
        small, scale = fused_quantised(x)
        gate, up = (one.product(small, scale, x.dtype) for one in (self.gate, self.up))
        return gelu_times(gate, up)


@torch.compile(dynamic=True)
def gelu_times(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def with_int8_products(backend: FbnlBackend) -> FbnlBackend:
    """The same backend, its layers' weights rounded."""
    layers = backend._decoder.layers
    for i, layer in enumerate(layers):
        plain = [one.weight.to_dense() for one in (layer.q, layer.kv, layer.o, layer.down)]
        q, kv, o, down = map(Int8Linear, plain)
        gated = Int8GatedLinear(layer.gated.gate.weight.to_dense(), layer.gated.up.weight.to_dense())
        # Stand-ins that are called as the layer's own products are, and are no Linear.
        layers[i] = dataclasses.replace(layer, q=q, kv=kv, o=o, down=down, gated=gated)  # type: ignore[arg-type]
    return backend


def in_batches(backend: FbnlBackend, pairs: list[StatePair]) -> np.ndarray:
    return np.concatenate([backend.score(pairs[i : i + BATCH]) for i in range(0, len(pairs), BATCH)])


def speed() -> None:
    checkpoint, rng = Checkpoint.open(nano_checkpoint()), np.random.default_rng(0)
    prompt = TokenizedPrompt(rng.integers(300, 500, PROMPT_TOKENS).tolist(), 19, query_truncated=False)
    pairs = [StatePair(prompt, rng.standard_normal((86, checkpoint.dim), dtype=np.float32)) for _ in range(BATCH)]
    rows = []
    for name in ("bfloat16", "int8 products"):
        backend = FbnlBackend(checkpoint, device="cpu", dtype="bfloat16")
        if name != "bfloat16":
            with_int8_products(backend)
        rows.append([name, median_seconds(lambda: backend.score(pairs), repeats=7) / BATCH * 1e3])  # noqa: B023
    report("int8_speed", ["decoder", "ms per candidate"], rows, batch=BATCH)


def effect(name: str, path: str, num_passages: int) -> None:
    checkpoint = Checkpoint.open(name)
    stored = np.load(path)
    begins = np.cumsum(stored["lengths"]) - stored["lengths"]
    pairs = []
    for begin, length in list(zip(begins, stored["lengths"], strict=True))[:num_passages]:
        states = stored["states"][begin : begin + length]
        pooled = np.stack([states[i : i + RATIO].mean(0) for i in range(0, length, RATIO)])
        pairs.append(pooled)
    rows, exact = [], np.empty(0)
    for kind in ("float32", "bfloat16", "int8 products, float32", "int8 products, bfloat16"):
        backend = FbnlBackend(checkpoint, device="cpu", dtype="bfloat16" if "bfloat16" in kind else "float32")
        if "int8" in kind:
            with_int8_products(backend)
        prompt = backend.prompt("which genes are involved in the immune response")
        margins = in_batches(backend, [StatePair(prompt, states) for states in pairs])
        if kind == "float32":
            exact = margins
        off = np.abs(margins - exact)
        upper = np.triu_indices(len(exact), 1)
        turned = (np.sign(exact[:, None] - exact) != np.sign(margins[:, None] - margins))[upper].mean()
        top = len(set(np.argsort(-exact)[:10]) & set(np.argsort(-margins)[:10]))
        rows.append([kind, float(exact.std()), float(off.mean()), float(off.max()), float(turned), top])
    errors = ["mean absolute error", "max absolute error", "inverted pairs"]
    columns = ["products", "spread of margins", *errors, "of the top 10 kept"]
    report("int8_effect_" + checkpoint.path.name, columns, rows, passages=len(pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("states", nargs="?")
    parser.add_argument("--passages", type=int, default=60)
    args = parser.parse_args()
    start()
    if args.checkpoint is None:
        speed()
    else:
        effect(args.checkpoint, args.states, args.passages)


if __name__ == "__main__":
    main()
