"""Checkpoints with random weights: they load like real ones, rank like dice, and have the same bytes everywhere."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from checkpoint.model import tensor_shapes

CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

# The tokenizer is trained on it: enough to give real merges, and the words of the default template.
_TEXT = (
    'Judge whether the Document meets the requirements based on the Query and the Instruct provided. '
    'Note that the answer can only be "yes" or "no".',
    "user model system", "<Document>: <Query>: <Instruct>: Given a query, retrieve documents that answer the query.",
    "A passage is read once, and the pooled states of its tokens are kept in a store. "
    "The decoder reads the query, attends over the cached states, and answers yes or no. "
    "The capital of China is Beijing. Gravity attracts bodies toward one another. What is the capital of China?",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The numbers of a T5Gemma 2 configuration that decide its size."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int
    layer_types: tuple[str, ...] | None = None  # None: five sliding layers, then a full one


SHAPES = {
    # Two kv heads, sliding and full layers, a window shorter than most passages.
    "tiny": Shape(512, 64, 128, 3, 4, 2, 16, 8, ("sliding_attention", "full_attention", "sliding_attention")),
    # Text halves of t5gemma-2-270m-270m, the base of KaLM-Reranker-V1-Nano.
    "nano": Shape(262_144, 640, 2048, 18, 4, 1, 256, 512),
}


def make_checkpoint(
    directory: str | Path,
    shape: str | Shape = "tiny",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Writes a random checkpoint and returns its directory; `settings` become its preread.json."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    _tokenizer(shape.vocab_size).save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=2))
    if settings is not None:
        (directory / "preread.json").write_text(json.dumps({"format_version": 1} | settings, indent=2))
    rng = np.random.default_rng(seed)  # torch's normal numbers depend on the processor's vector units
    shapes = tensor_shapes("encoder", shape) | tensor_shapes("decoder", shape)
    tensors = {}
    for name in sorted(shapes, key=lambda name: "embed_tokens" in name):  # the order in which numbers are drawn
        if name.startswith("decoder.embed_tokens"):  # tied
            continue
        # Attention, margins and norms all have something to say.
        scale = 0.1 if "norm" in name else (shapes[name][-1] ** -0.5)
        drawn = torch.from_numpy(rng.standard_normal(shapes[name], dtype=np.float32))
        tensors[f"model.{name}"] = (drawn * scale).to(dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-fallback BPE with Gemma's habits: spaces become `▁`, control tokens are special, four newlines are one."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 500),
        special_tokens=[*CONTROL_TOKENS, *(f"<0x{i:02X}>" for i in range(256)), "yes", "no"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    # Training registers every listed token as special; only the control tokens are.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in CONTROL_TOKENS]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in range(2, 5)])
    return tokenizer


def _config(shape: Shape) -> dict[str, Any]:
    stack = dataclasses.asdict(shape) | {"query_pre_attn_scalar": shape.head_dim}
    if shape.layer_types is None:
        del stack["layer_types"]
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 896, "patch_size": 14,
    }  # fmt: skip
    text, special = {"model_type": "t5gemma2_text", **stack}, {"eoi_token_index": 1, "image_token_index": 3}
    return {
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "model_type": "t5gemma2",
        "encoder": {"model_type": "t5gemma2_encoder", "text_config": text, "vision_config": vision, **special},
        "decoder": {"model_type": "t5gemma2_decoder", **stack},
        **special,
        "tie_word_embeddings": True,
    }
