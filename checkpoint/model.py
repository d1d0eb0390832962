"""One opened checkpoint: configuration, settings, tokenizer, identity, and the tensors of either half.
Source of tensor names: transformers' T5Gemma2ForConditionalGeneration; the vision tower is in neither half.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from msgspec import Meta

from checkpoint.files import STORAGE, CheckpointError, check_fields, read_fields, read_json, resolve
from checkpoint.settings import CheckpointSettings
from checkpoint.tensors import StoredTensors
from checkpoint.text import TextTokenizer

if TYPE_CHECKING:
    from transformers import T5Gemma2Config
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2DecoderConfig, T5Gemma2TextConfig

MODEL_TYPE = "t5gemma2"
POOLING_VERSION = 1  # raised whenever pooling or the encoder pass changes a state beyond rounding
HEAD = "lm_head.weight"  # the output embedding, where it is stored

# Fields of config.json that change a state without changing a tensor.
NUMERIC_KEYS = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_activation", "rms_norm_eps",
    "query_pre_attn_scalar", "sliding_window", "layer_types", "rope_parameters",
)  # fmt: skip

# Fields of either stack that checkpoint.layers, the encoder and the decoder compute by; the others must have the
# values of transformers' class. The older names of RoPE are what transformers makes `rope_parameters` of.
APPLIED = frozenset({
    "head_dim", "hidden_size", "intermediate_size", "layer_types", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "query_pre_attn_scalar", "rms_norm_eps", "rope_local_base_freq",
    "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "sliding_window_pattern", "tie_word_embeddings",
    "vocab_size",
})  # fmt: skip
_Whole = Annotated[int, Meta(ge=1)]
_Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
# Numbers of either stack, beyond what transformers checks.
NUMBERS: dict[str, Any] = {
    "hidden_size": _Whole, "intermediate_size": _Whole, "num_hidden_layers": _Whole, "num_attention_heads": _Whole,
    "num_key_value_heads": _Whole, "head_dim": _Whole, "vocab_size": _Whole, "query_pre_attn_scalar": _Positive,
    "rms_norm_eps": _Positive, "final_logit_softcapping": _Positive | None,
    "layer_types": list[Literal["full_attention", "sliding_attention"]],
}  # fmt: skip
ROPE: dict[str, Any] = {
    # The other types change with the length of the text at hand; here tables are made once, for the longest.
    "rope_type": Literal["default", "linear", "llama3", "yarn"],
    "type": Any,  # its older name
    "truncate": Any,
    "partial_rotary_factor": Annotated[float, Meta(ge=1, le=1)] | None,  # every number of a head is rotated here
    "attention_factor": _Positive, "beta_fast": _Positive, "beta_slow": _Positive, "factor": _Positive,
    "high_freq_factor": _Positive, "low_freq_factor": _Positive, "mscale": _Positive, "mscale_all_dim": _Positive,
    "original_max_position_embeddings": _Positive, "rope_theta": _Positive,
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]  # of tensors, by name


def tensor_shapes(half: str, config: Any) -> Shapes:
    """Layers, final norm and embedding of one half (`encoder` or `decoder`), as its configuration implies them."""
    dim, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    num_q, num_kv = config.num_attention_heads * head, config.num_key_value_heads * head
    layer: Shapes = {
        "self_attn.q_proj": (num_q, dim), "self_attn.k_proj": (num_kv, dim), "self_attn.v_proj": (num_kv, dim),
        "self_attn.o_proj": (dim, num_q), "self_attn.q_norm": (head,), "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, dim), "mlp.up_proj": (inner, dim), "mlp.down_proj": (dim, inner),
        **{f"{side}_{block}_layernorm": (dim,) for block in ("self_attn", "feedforward") for side in ("pre", "post")},
    }  # fmt: skip
    shapes: Shapes = {f"{half}.norm.weight": (dim,)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"{half}.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes[f"{half}.embed_tokens.weight"] = (config.vocab_size, dim)
    shapes[f"{half}.embed_tokens.eoi_embedding"] = (dim,)  # the end-of-image row is stored apart
    return shapes


@dataclass(frozen=True)
class EncoderIdentity:
    """The encoder that wrote (or may read) a collection, with all that changes a stored state."""

    fingerprint: str  # sha256, hex, of the files wherever they lie and however tensors are spread over shards
    checkpoint: str  # name it was opened by; for people, not part of the fingerprint
    dim: int
    max_passage_tokens: int
    passage_template: str
    pooling_version: int


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A T5Gemma2ForConditionalGeneration directory, opened for reading: only its small files so far."""

    path: Path
    name: str  # as it was opened
    config: T5Gemma2Config
    settings: CheckpointSettings
    neutralise: bool  # tokenize control-token text from outside as plain text

    @classmethod
    def open(cls, name: str | Path, *, max_passage_tokens: int | None = None, neutralise: bool = True) -> Checkpoint:
        """Opens a directory or hub id; `max_passage_tokens` overrides its limit, up to the encoder's positions."""
        path = resolve(str(name))
        config = _read_config(path)
        settings = CheckpointSettings.load(path)
        if max_passage_tokens is not None:
            settings = dataclasses.replace(settings, max_passage_tokens=max_passage_tokens)
        positions = int(cast(Any, config.encoder).text_config.max_position_embeddings)
        if not 1 <= settings.max_passage_tokens <= positions:
            raise CheckpointError(
                f"max_passage_tokens is {settings.max_passage_tokens}; expected 1..{positions}, the encoder's positions"
            )
        return cls(path, str(name), config, settings, neutralise)

    @property
    def encoder_config(self) -> T5Gemma2TextConfig:
        return cast("T5Gemma2TextConfig", cast(Any, self.config.encoder).text_config)

    @property
    def decoder_config(self) -> T5Gemma2DecoderConfig:
        return cast("T5Gemma2DecoderConfig", self.config.decoder)

    @property
    def eoi_id(self) -> int:  # end of image: the token whose embedding is stored apart
        return cast(int, self.config.eoi_token_index)

    @property
    def dim(self) -> int:
        return int(self.decoder_config.hidden_size)

    @cached_property
    def text(self) -> TextTokenizer:
        tokenizer = TextTokenizer(self.path, self.settings, neutralise=self.neutralise)
        rows = self.decoder_config.vocab_size
        if (top := tokenizer.max_id) >= rows:
            raise CheckpointError(f"{self.path}: the tokenizer's largest token is {top}; the embedding has {rows} rows")
        return tokenizer

    @cached_property
    def _tensors(self) -> StoredTensors:
        shapes = tensor_shapes("encoder", self.encoder_config) | tensor_shapes("decoder", self.decoder_config)
        return StoredTensors(self.path, shapes.keys() | {HEAD})

    def encoder_tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Encoder layers, norm and embedding by canonical name (`encoder.…`)."""
        return self._tensors.read_all(tensor_shapes("encoder", self.encoder_config), dtype)

    def decoder_tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Decoder layers, norm and embedding by canonical name (`decoder.…`).
        The embedding is usually stored once, under the encoder. `lm_head.weight` comes along where the output embedding
        is another one than the decoder's own: transformers ties it to the encoder's, unless it is stored.
        """
        wanted, head = self._decoder_shapes()
        embedding = next(name for name in wanted if name.endswith("embed_tokens.weight"))
        apart = head not in ("", embedding) and not self._tensors.equal(head, embedding)
        tensors = self._tensors.read_all(wanted | ({head: wanted[embedding]} if apart else {}), dtype)
        if apart:
            tensors[HEAD] = tensors.pop(head)
        return {name.replace("encoder.embed_tokens", "decoder.embed_tokens"): t for name, t in tensors.items()}

    def check_decoder(self) -> None:
        """Raises CheckpointError where the decoder's tensors are not all there; reads names and shapes."""
        self._tensors.check(self._decoder_shapes()[0])

    def _decoder_shapes(self) -> tuple[Shapes, str]:
        """Tensors of the decoder as they are stored, and the output embedding, empty where that is not stored."""
        shapes, stored = tensor_shapes("decoder", self.decoder_config), self._tensors
        if not self.config.tie_word_embeddings:
            for name in (*(name for name in shapes if "embed_tokens" in name), HEAD):
                if name not in stored:
                    raise CheckpointError(f"{self.path}: tie_word_embeddings is false and {name} is not stored")
        shared = {name: name.replace("decoder.embed_tokens", "encoder.embed_tokens") for name in shapes}
        wanted = {name if name in stored else shared[name]: shape for name, shape in shapes.items()}
        head = HEAD if HEAD in stored else shared["decoder.embed_tokens.weight"]
        return wanted, head if head in stored else ""

    @cached_property
    def identity(self) -> EncoderIdentity:
        """Hashes the encoder's weights at the first call: about a second per gigabyte."""
        weights = self._tensors.digest_of(tensor_shapes("encoder", self.encoder_config))
        tokenizer = hashlib.sha256((self.path / "tokenizer.json").read_bytes()).digest()
        template, limit = self.settings.passage_template, self.settings.max_passage_tokens
        shared: dict[str, Any] = {"max_passage_tokens": limit, "passage_template": template}
        shared["pooling_version"] = POOLING_VERSION
        config = shared | {"eoi_token_index": self.eoi_id, "neutralise": self.neutralise}
        config["config"] = {key: getattr(self.encoder_config, key) for key in NUMERIC_KEYS}
        rest = json.dumps(config, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
        fingerprint = hashlib.sha256(weights + tokenizer + rest).hexdigest()
        return EncoderIdentity(fingerprint=fingerprint, checkpoint=self.name, dim=self.dim, **shared)

    def weights_digest(self) -> str:
        """sha256, hex, of every tensor either half reads; with `settings` it is all that margins depend on."""
        return self._tensors.digest_of(self._tensors.weights).hex()


def _read_config(path: Path) -> T5Gemma2Config:
    from transformers import T5Gemma2Config  # a second to import; `--help` should not pay it

    where = path / "config.json"
    raw = read_json(where)
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{where}: model_type is {raw.get('model_type')!r}; expected {MODEL_TYPE!r} "
            "(T5Gemma2ForConditionalGeneration)"
        )
    try:
        config: T5Gemma2Config = T5Gemma2Config.from_dict(raw)
    except Exception as exc:  # the strict config classes raise several unrelated types
        raise CheckpointError(f"{where}: no valid T5Gemma 2 configuration ({exc})") from exc
    encoder, decoder = cast(Any, config.encoder), cast(Any, config.decoder)
    raw_encoder = raw.get("encoder") or {}
    shared, own = {"eoi_token_index", "vocab_size"}, {"mm_tokens_per_image", "text_config", "vision_config"}
    parts: list[tuple[str, Any, Any, Collection[str]]] = [
        ("the model", raw, config, STORAGE | shared | {"encoder", "decoder", "tie_word_embeddings"}),
        ("encoder", raw_encoder, encoder, shared | own),  # the vision tower is never built
        ("encoder.text_config", raw_encoder.get("text_config") or {}, encoder.text_config, APPLIED),
        ("decoder", raw.get("decoder") or {}, decoder, APPLIED | {"final_logit_softcapping", "is_decoder"}),
    ]
    for place, found, made, applied in parts:
        fields = {field.name: field.default for field in dataclasses.fields(made) if not field.name.startswith("_")}
        defaults = {name: value for name, value in fields.items() if value is not dataclasses.MISSING}
        check_fields(f"{where}: {place}", found, defaults, applied)
    for place, stack in ((f"{where}: encoder.text_config", encoder.text_config), (f"{where}: decoder", decoder)):
        kinds = NUMBERS | ({"sliding_window": _Whole} if "sliding_attention" in (stack.layer_types or ()) else {})
        read_fields(place, {key: getattr(stack, key) for key in kinds}, kinds)
        heads, groups, layers = stack.num_attention_heads, stack.num_key_value_heads, stack.layer_types
        if heads % groups:
            told = f"num_attention_heads is {heads}; expected a multiple of num_key_value_heads, {groups}"
            raise CheckpointError(f"{place}: {told}")
        if len(layers) != stack.num_hidden_layers:
            raise CheckpointError(f"{place}: layer_types has {len(layers)} layers; expected {stack.num_hidden_layers}")
        for kind in sorted(set(layers)):
            read_fields(f"{place}: rope_parameters.{kind}", stack.rope_parameters.get(kind) or {}, ROPE)
    return config
