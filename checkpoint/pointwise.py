"""The steps between matrix products: norms, rotation, softmax. Pure functions; knows no layer.

`Pointwise` holds them as torch.compile fuses them, or as they stand here. Compiled ones are built for
any number of rows: another batch size never compiles anything anew, and `num_compilations` tells.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from checkpoint.compute import separate_compiled_code

Rotation = tuple[Tensor, Tensor]  # cos and sin, (tokens, 1, head_dim) each

log = logging.getLogger(__name__)

# How often torch may compile these functions before it runs them unfused. It counts over all stacks of a process, and
# each has a few shapes: its width, its heads, its kv heads.
MAX_COMPILATIONS = 256


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis, in float32, back in x's format."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def add_norm(hidden: Tensor, update: Tensor, post: Tensor, following: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A residual block's end and the next one's begin: the sum, and the sum normed.

    Args:
        hidden, update: (tokens, dim).
        post: norm weight of `update`.
        following: norm weight of whatever comes next.
    """
    hidden = hidden + rms_norm(update, post, eps)
    return hidden, rms_norm(hidden, following, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on (tokens, heads, head_dim)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """A head's norm and its rotary position embedding on (tokens, heads, head_dim)."""
    return rotate(rms_norm(x, weight, eps), cos, sin)


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis in float32, back in the logits' format.

    Args:
        logits: (rows, group, keys).
        mask: additive, (rows, 1, keys).
    """
    return torch.softmax(logits.float() + mask, dim=-1).to(logits.dtype)


class Pointwise:
    """The functions above for one stack, compiled or not."""

    def __init__(self, eps: float, *, compiled: bool = False) -> None:
        """
        Args:
            compiled: fuse with torch.compile; on a CPU that needs a C++ compiler.
        """
        self.eps = eps
        self.num_compilations = 0
        self.compiled = compiled
        self.rms_norm = self._for_any_rows(lambda x, w: rms_norm(x, w, eps), rows=(0,))
        self.add_norm = self._for_any_rows(lambda h, u, p, f: add_norm(h, u, p, f, eps), rows=(0, 1))
        self.norm_rotate = self._for_any_rows(lambda x, w, c, s: norm_rotate(x, w, c, s, eps), rows=(0, 2, 3))
        self.masked_softmax = self._for_any_rows(masked_softmax, rows=(0, 1), keys=2)

    def _for_any_rows(
        self, function: Callable[..., Any], rows: tuple[int, ...], keys: int | None = None
    ) -> Callable[..., Any]:
        """`function`, fused once for every size of the first axis of the arguments `rows` (and of axis `keys`)."""
        if not self.compiled:
            return function
        torch._dynamo.config.recompile_limit = MAX_COMPILATIONS
        separate_compiled_code()
        fused = torch.compile(function, backend=self._inductor, dynamic=False)

        def call(*tensors: Tensor) -> Any:
            # A compiler takes 1 for a constant; so little is as fast unfused.
            if not self.compiled or tensors[0].shape[0] < 2 or (keys is not None and tensors[0].shape[keys] < 2):
                return function(*tensors)
            for row in rows:
                torch._dynamo.maybe_mark_dynamic(tensors[row], 0)
                if keys is not None:
                    torch._dynamo.maybe_mark_dynamic(tensors[row], keys)
            try:
                return fused(*tensors)
            except torch._dynamo.exc.TorchDynamoException as exc:  # no compiler that works: slower, not wrong
                log.warning("computing unfused: %s", getattr(exc, "inner_exception", exc))
                self.compiled = False
                return function(*tensors)

        return call

    def _inductor(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.num_compilations += 1
        return compile_fx(graph, inputs)
