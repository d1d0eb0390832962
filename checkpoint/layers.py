"""All of a T5Gemma 2 stack that encoder and decoder share; the oracle in the tests is transformers' own model.

Weights are laid out once as the machine reads them: handed plain ones, oneDNN re-orders them on every call, which costs
a tenth of a large batch and most of a small one. Its operators are those that torch.compile emits, pinned with torch by
constraints.txt; a build or device without them multiplies plain weights.
"""

import hashlib
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

log = logging.getLogger(__name__)
Rotation = tuple[Tensor, Tensor]  # cos and sin, (tokens, 1, head_dim) each
_Steps = Callable[..., Any]
# Compilations before torch runs these functions unfused. It counts over all stacks of a process, and each has a few
# shapes: its width, its heads, its kv heads.
MAX_COMPILATIONS = 256
# Logits at a time on a CPU, about: more leave its caches before the softmax reads them.
BLOCK_LOGITS = 1 << 20
_COMPILED = "preread-"  # begins the name of a processor's folder


class Pointwise:
    """The steps between matrix products, in float32 inside, compiled or not.

    Compiled ones are built for any number of rows: another batch size compiles nothing, as `num_compilations` shows.

        rms_norm(x, weight)
        add_norm(hidden, update, post, following)   a residual block's end and the next one's begin: the sum, and the
                                                    sum normed, (tokens, dim) each; `post` norms the update
        norm_rotate(x, weight, cos, sin)            a head's norm and rotary embedding on (tokens, heads, head_dim)
        masked_softmax(logits, mask)                of (rows, group, keys) + (rows, 1, keys), over keys
    """

    def __init__(self, eps: float, *, compiled: bool = False) -> None:
        def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
            x32 = x.float()
            return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)

        def add_norm(hidden: Tensor, update: Tensor, post: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
            hidden = hidden + rms_norm(update, post)
            return hidden, rms_norm(hidden, following)

        def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            x = rms_norm(x, weight)
            half = x.shape[-1] // 2
            return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

        def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
            return torch.softmax(logits.float() + mask, dim=-1).to(logits.dtype)

        self.num_compilations = 0
        self.compiled = compiled
        self.rms_norm: Callable[..., Tensor] = self._for_any_rows(rms_norm, rows=(0,))
        self.add_norm: Callable[..., tuple[Tensor, Tensor]] = self._for_any_rows(add_norm, rows=(0, 1))
        self.norm_rotate: Callable[..., Tensor] = self._for_any_rows(norm_rotate, rows=(0, 2, 3))
        self.masked_softmax = self._for_any_rows(masked_softmax, rows=(0, 1), keys=2)

    def _for_any_rows(self, function: _Steps, rows: tuple[int, ...], keys: int | None = None) -> _Steps:
        """`function`, fused once for every size of the first axis of the arguments `rows` (and of axis `keys`)."""
        if not self.compiled:
            return function
        torch._dynamo.config.recompile_limit = MAX_COMPILATIONS
        _separate_compiled_code()
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


def _separate_compiled_code() -> None:
    """Points torch's cache of compiled code at a folder for this processor, inside of TORCHINDUCTOR_CACHE_DIR.
    torch names what it keeps by source and options, not by the vector units it was generated for: code of another
    processor (a folder that moved, an image, ATEN_CPU_CAPABILITY) gives wrong numbers or ends the process.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    units = {name: value for name, value in torch.cpu.get_capabilities().items() if isinstance(value, bool)}
    described = f"{platform.machine()} {pick_vec_isa()} {sorted(units.items())} {torch.__version__}"
    given = Path(cache_dir())
    above = given.parent if given.name.startswith(_COMPILED) else given  # this process, or its parent, was here before
    folder = _COMPILED + hashlib.sha256(described.encode()).hexdigest()[:16]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(above / folder)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, pointwise: Pointwise) -> Tensor:
    """softmax(q keysᵀ + mask) values, in the shape of q; q is scaled already.
    On a CPU two batched products around one softmax: with heads of 256 that is more than twice the rate of torch's
    blocked kernel. Callers cut long queries, so that whole rows of logits fit. Shapes: q (batch, num_kv, queries *
    group, head) with queries that share a kv head next to each other, keys and values (batch, num_kv, keys, head), the
    additive mask (batch, num_kv, queries, keys); without one every query sees every key.
    """
    if q.device.type != "cpu":
        seen = None if mask is None else mask.repeat_interleave(q.shape[2] // mask.shape[2], dim=2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=1.0)
    num_rows, num_keys = q.shape[2], keys.shape[2]
    flat_q, flat_keys, flat_values = q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
    seen = None if mask is None else mask.flatten(0, 1)
    out = torch.empty_like(flat_q)
    step = max(1, BLOCK_LOGITS // (num_rows * num_keys))
    for first in range(0, len(flat_q), step):
        at = slice(first, first + step)
        logits = torch.bmm(flat_q[at], flat_keys[at])
        if seen is None:
            weights = torch.softmax(logits, dim=-1)
        else:
            grouped = logits.view(logits.shape[0] * seen.shape[1], -1, num_keys)  # queries of one position together
            weights = pointwise.masked_softmax(grouped, seen[at].reshape(-1, 1, num_keys)).view(logits.shape)
        torch.bmm(weights, flat_values[at], out=out[at])
    return out.view(q.shape)


class Linear:
    """x Wᵀ of a weight (out, in), which is not held where it is re-ordered."""

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.packed = weight.device.type == "cpu" and _has_onednn(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.packed:
            return F.linear(x, self.weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return product


class GatedLinear:
    """gelu(x Gᵀ) · (x Uᵀ), the first half of an MLP.
    oneDNN applies gelu and product while the matrix product's tile is in cache; tanh over bfloat16 alone costs more.
    """

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self.gate, self.up = Linear(gate), Linear(up)

    def __call__(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out)."""
        if not self.gate.packed:
            return F.gelu(self.gate(x), approximate="tanh").mul_(self.up(x))
        linear = torch.ops.mkldnn._linear_pointwise
        gated = linear(x, self.gate.weight, None, "gelu", [], "tanh")
        fused: Tensor = linear.binary(x, gated, self.up.weight, None, "mul")
        return fused


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether this build's operators give the expected product, tried on one that is exact."""
    if dtype not in (torch.float32, torch.bfloat16) or not cast(Any, torch.backends.mkldnn).is_available():
        return False
    x = torch.arange(32, dtype=dtype).view(4, 8) / 8
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(x)
        linear = torch.ops.mkldnn._linear_pointwise
        product = linear.binary(x, linear(x, weight, None, "gelu", [], "tanh"), weight, None, "mul")
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(product, F.gelu(x @ x.T, approximate="tanh") * (x @ x.T), rtol=0.02)


def _rotary_frequencies(config: Any, kind: str) -> tuple[Tensor, float]:
    """Radians per position of each half head, and the factor on cos and sin, for one layer type.
    From transformers' table for every rope_type but the default: its model classes would load a hundred megabytes.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters[kind]
    if rope["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, None, layer_type=kind)
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
    return 1.0 / rope["rope_theta"] ** steps, 1.0


@dataclass(frozen=True, slots=True)
class _Layer:
    """The weights of one layer; norms are stored as 1 + w, in float32."""

    q: Linear  # dim -> num_heads head_dim
    kv: Linear  # dim -> 2 num_kv_heads head_dim
    o: Linear  # num_heads head_dim -> dim
    gated: GatedLinear  # dim -> inner
    down: Linear  # inner -> dim
    q_norm: Tensor  # (head_dim,); times the scale of the attention's logits
    k_norm: Tensor  # (head_dim,)
    pre_attention: Tensor  # (dim,)
    post_attention: Tensor  # (dim,)
    pre_mlp: Tensor  # (dim,)
    post_mlp: Tensor  # (dim,)


class Stack:
    """One half's embedding, layers and final norm: all that the encoder and the decoder compute alike."""

    def __init__(self, config: Any, half: str, tensors: dict[str, Tensor], eoi: int, *, compiled: bool = False) -> None:
        """Takes tensors of `half` out of `tensors` as it packs them, so that two copies never stand in memory."""

        def take(name: str) -> Tensor:
            return tensors.pop(f"{half}.{name}.weight")

        def norm(name: str) -> Tensor:
            return 1.0 + take(name).float()

        def layer(at: str) -> _Layer:
            return _Layer(
                q=Linear(take(f"{at}.self_attn.q_proj")),
                kv=Linear(torch.cat([take(f"{at}.self_attn.k_proj"), take(f"{at}.self_attn.v_proj")])),
                o=Linear(take(f"{at}.self_attn.o_proj")),
                gated=GatedLinear(take(f"{at}.mlp.gate_proj"), take(f"{at}.mlp.up_proj")),
                down=Linear(take(f"{at}.mlp.down_proj")),
                q_norm=norm(f"{at}.self_attn.q_norm") * config.query_pre_attn_scalar**-0.5,
                k_norm=norm(f"{at}.self_attn.k_norm"),
                pre_attention=norm(f"{at}.pre_self_attn_layernorm"),
                post_attention=norm(f"{at}.post_self_attn_layernorm"),
                pre_mlp=norm(f"{at}.pre_feedforward_layernorm"),
                post_mlp=norm(f"{at}.post_feedforward_layernorm"),
            )

        self.config = config
        self.embedding = take("embed_tokens")  # (vocab, dim)
        self._eoi_id, self._eoi_row = eoi, tensors.pop(f"{half}.embed_tokens.eoi_embedding")
        self._scale = torch.tensor(self.embedding.shape[1] ** 0.5, dtype=self.embedding.dtype)
        final = norm("norm")
        self.layers = [layer(f"layers.{i}") for i in range(config.num_hidden_layers)]
        self.layer_types: list[str] = list(config.layer_types or ())
        self._norms = [each.pre_attention for each in self.layers] + [final]
        self.pointwise = Pointwise(float(config.rms_norm_eps), compiled=compiled)
        self._frequencies = {kind: _rotary_frequencies(config, kind) for kind in set(self.layer_types)}
        self._rotations: dict[str, Rotation] = {}  # by layer type, grown to the longest text seen

    def embed(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens,) ids -> (tokens, dim), and the same normed for the first layer; the end-of-image row is apart."""
        hidden = F.embedding(token_ids, self.embedding) * self._scale
        hidden[token_ids == self._eoi_id] = self._eoi_row
        return hidden, self.pointwise.rms_norm(hidden, self._norms[0])

    def rotation(self, kind: str, positions: Tensor, num_positions: int) -> Rotation:
        """cos and sin at `positions`, all below `num_positions`, for one layer type, (tokens, 1, head_dim) each."""
        if kind not in self._rotations or len(self._rotations[kind][0]) < num_positions:
            size = 1 << max(9, (num_positions - 1).bit_length())
            frequencies, factor = self._frequencies[kind]
            turns = torch.arange(size, device=self.embedding.device).float()
            half = turns[:, None, None] * frequencies.to(self.embedding.device)
            angles = torch.cat((half, half), dim=-1)
            cos, sin = ((turned * factor).to(self.embedding) for turned in (angles.cos(), angles.sin()))
            self._rotations[kind] = (cos, sin)
        cos, sin = self._rotations[kind]
        return cos[positions], sin[positions]

    def queries(self, layer: _Layer, x: Tensor, rotation: Rotation) -> Tensor:
        """(tokens, dim) -> (tokens, num_heads, head_dim), normed, rotated and scaled."""
        raw = layer.q(x).view(len(x), -1, self.config.head_dim)
        return self.pointwise.norm_rotate(raw, layer.q_norm, *rotation)

    def keys_values(self, layer: _Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, dim) -> raw keys and values, (tokens, num_kv, head_dim) each."""
        kv = layer.kv(x).view(len(x), 2, self.config.num_key_value_heads, self.config.head_dim)
        return kv[:, 0], kv[:, 1]

    def finish(self, index: int, hidden: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """A layer behind its attention (tokens, num_heads * head_dim): the sum, and it normed for what follows."""
        layer = self.layers[index]
        hidden, normed = self.pointwise.add_norm(hidden, layer.o(attended), layer.post_attention, layer.pre_mlp)
        update = layer.down(layer.gated(normed))
        return self.pointwise.add_norm(hidden, update, layer.post_mlp, self._norms[index + 1])
