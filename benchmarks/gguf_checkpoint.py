"""A checkpoint out of a Gemma 3 GGUF file, to measure on the activations of weights that were really trained.

    python -m benchmarks.gguf_checkpoint gemma-3-270m.gguf tokenizer.json DIR     # needs `pip install gguf`

Gemma 3 270M has the shape of KaLM-Reranker-V1-Nano's halves, and T5Gemma 2 starts from Gemma 3. Both halves get the
same weights; the encoder reads them in both directions and the decoder attends over passage states, for neither of
which they were trained. What comes out loads and computes like a reranker and is none: only its statistics are
genuine. Does not know states; the weights stay under their own licence.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# GGUF's names for a layer's tensors, and transformers'.
LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "pre_self_attn_layernorm", "post_attention_norm": "post_self_attn_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
EOI_ID, IMAGE_ID = 256_000, 262_144


def read_tensors(reader: Any, dequantize: Any) -> dict[str, Tensor]:
    """Tensors by transformers' name without its half: `layers.0.mlp.up_proj.weight`, `embed_tokens.weight`."""
    found = {}
    for tensor in reader.tensors:
        match tensor.name.split("."):
            case ["token_embd", "weight"]:
                name = "embed_tokens.weight"
            case ["output_norm", "weight"]:
                name = "norm.weight"
            case ["blk", layer, part, "weight"] if part in LAYER:
                name = f"layers.{layer}.{LAYER[part]}.weight"
            case _:
                raise SystemExit(f"tensor {tensor.name!r} is no part of a Gemma 3 text model")
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        # GGUF stores a norm's factor, transformers what is added to 1.
        found[name] = (value - 1.0 if "norm" in name else value).bfloat16()
    return found


def config(reader: Any) -> dict[str, Any]:
    """A T5Gemma 2 configuration with Gemma 3's numbers."""

    def number(key: str) -> Any:
        return reader.fields[f"gemma3.{key}"].contents()

    rows = next(int(tensor.shape[1]) for tensor in reader.tensors if tensor.name == "token_embd.weight")
    stack = {
        "vocab_size": rows,
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": number("attention.key_length"),
        "query_pre_attn_scalar": number("attention.key_length"),
        "sliding_window": number("attention.sliding_window"),
        "max_position_embeddings": number("context_length"),
    }
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 1, "image_size": 896, "patch_size": 14}  # fmt: skip
    images = {"eoi_token_index": EOI_ID, "image_token_index": IMAGE_ID}
    return {
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "model_type": "t5gemma2",
        "encoder": {"model_type": "t5gemma2_encoder", "text_config": {"model_type": "t5gemma2_text", **stack},
                    "vision_config": vision, **images},
        "decoder": {"model_type": "t5gemma2_decoder", **stack},
        "tie_word_embeddings": True,
        **images,
    }  # fmt: skip


def write_tokenizer(source: Path, target: Path, num_rows: int) -> None:
    """Gemma 3's tokenizer without tokens beyond the embedding: the image placeholder of the larger models."""
    state = json.loads(source.read_text(encoding="utf-8"))
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < num_rows]
    state["model"]["vocab"] = {text: i for text, i in state["model"]["vocab"].items() if i < num_rows}
    target.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("tokenizer", type=Path, help="Gemma 3's tokenizer.json")
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(args.gguf)
    tensors = read_tensors(reader, gguf.quants.dequantize)
    embedding = tensors.pop("embed_tokens.weight")
    both = {f"model.{half}.{name}": t.clone() for half in ("encoder", "decoder") for name, t in tensors.items()}
    both["model.encoder.embed_tokens.weight"] = embedding
    both["model.encoder.embed_tokens.eoi_embedding"] = embedding[EOI_ID].clone()
    args.directory.mkdir(parents=True, exist_ok=True)
    (args.directory / "config.json").write_text(json.dumps(config(reader), indent=2) + "\n")
    write_tokenizer(args.tokenizer, args.directory / "tokenizer.json", embedding.shape[0])
    save_file(both, args.directory / "model.safetensors", metadata={"format": "pt"})
    print(f"{args.directory}: {sum(t.numel() for t in both.values()):,} numbers in bfloat16")


if __name__ == "__main__":
    main()
