"""Makes cross-encoders with random weights: for tests, benchmarks and trying out a server.

They load like real ones and rank like dice. Tokenizers are made here too; nothing is fetched. The same arguments give
the same bytes in every process and on every processor.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from decoder_server.models.cross_encoder.files import quiet

CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|embed_token|>", "<|rerank_token|>")

# What tokenizers are trained on: enough to give real merges and the words of the templates.
_TEXT = (
    "Check whether a given document contains information helpful to answer the query. <Document> <Query> ??",
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no". yes no Yes No 0 1 system user assistant <think> </think>',
    "A: B: Given a query A and a passage B, determine whether the passage contains an answer to the query",
    "The capital of China is Beijing. Gravity attracts bodies toward one another. What is the capital of China? "
    "수도는 서울이다. 대한민국의 수도는 어디인가? 검색 질의에 답하는 문서를 찾는다.",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """The numbers that decide how large a model is."""

    hidden: int = 32
    intermediate: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 700
    positions: int = 512


TINY = Size()
# Class name in config.json -> which tokenizer it has.
KINDS = {
    "BertForSequenceClassification": "wordpiece",
    "XLMRobertaForSequenceClassification": "unigram",
    "ModernBertForSequenceClassification": "wordpiece",
    "DebertaV2ForSequenceClassification": "wordpiece",
    "Qwen3ForSequenceClassification": "chat",
    "Qwen3ForCausalLM": "chat",
    "Qwen2ForCausalLM": "chat",
    "GemmaForCausalLM": "gemma",
    "MistralForCausalLM": "mistral",
    "JinaForRanking": "chat",  # a Qwen3 with a projector instead of an output embedding
}


def make_cross_encoder(
    directory: str | Path,
    architecture: str = "XLMRobertaForSequenceClassification",
    size: Size = TINY,
    *,
    num_labels: int = 1,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **save: Any,
) -> Path:
    """Writes a random checkpoint and returns its directory.

    Args:
        seed: of the weights, which no other random numbers touch.
        config: further fields of config.json.
        save: further arguments of `save_pretrained`, such as max_shard_size.
    """
    import transformers

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = TOKENIZERS[KINDS[architecture]](size.vocab)
    save_tokenizer(tokenizer, directory, KINDS[architecture])
    listwise = architecture == "JinaForRanking"
    kind: Any = transformers.Qwen3Model if listwise else getattr(transformers, architecture)
    fields = _fields(architecture, size, tokenizer) | ({"num_labels": num_labels} if "Sequence" in architecture else {})
    with torch.random.fork_rng():  # what transformers draws is written over
        model = kind(kind.config_class(**(fields | (config or {}))))
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.from_numpy(rng.standard_normal(parameter.shape, dtype=np.float32))
        # Weights at a scale where attention, heads and norms all have something to say.
        if parameter.dim() > 1:
            parameter.data = drawn * (parameter.shape[-1] ** -0.5 * (4 if "embed" in name else 1.5))
        else:
            parameter.data += 0.1 * drawn
    with quiet():
        model.to(dtype).save_pretrained(directory, **save)
    if listwise:
        _add_projector(directory, size, seed)
    return directory


def save_tokenizer(tokenizer: Tokenizer, directory: Path, kind: str) -> None:
    """tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {
        "wordpiece": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"},
        "unigram": {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"},
        "chat": {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        "gemma": {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
        "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    }[kind]
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if kind == "wordpiece" else [])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": names, **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def wordpiece_tokenizer(vocab: int) -> Tokenizer:
    """As BERT's: `[CLS] query [SEP] passage [SEP]`, the passage in segment 1."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words, letters = _pieces(tokenizer)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    for word in words:  # whole, and the two halves of it that other words may share
        half = (len(word) + 1) // 2
        pieces += [word, word[:half], f"##{word[half:]}"] if len(word) > 1 else []
    table = {piece: number for number, piece in enumerate(list(dict.fromkeys(pieces))[:vocab])}
    tokenizer.model = models.WordPiece(table, unk_token="[UNK]")
    tokenizer.add_special_tokens(pieces[:5])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def unigram_tokenizer(vocab: int) -> Tokenizer:
    """As XLM-R's: `<s> query </s></s> passage </s>`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    words, letters = _pieces(tokenizer)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    # A letter costs more than a word, so that words are read whole.
    pieces = dict.fromkeys(letters, -10.0) | {
        piece: math.log(count / words.total()) for piece, count in words.items() if len(piece) > 1
    }
    table = [*((token, 0.0) for token in special), *pieces.items()]
    tokenizer.model = models.Unigram(table[:vocab], unk_id=3)
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def _pieces(tokenizer: Tokenizer) -> tuple[Counter[str], list[str]]:
    """Words of the text as a tokenizer splits it, in order of appearance with their counts, and their letters.

    The library's own trainers of these two models number and choose pieces in the order of a hash table with a random
    seed: another vocabulary in every process.
    """
    words: Counter[str] = Counter()
    for text in _TEXT:
        normalized = tokenizer.normalizer.normalize_str(text)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized))
    return words, sorted({letter for word in words for letter in word})


def chat_tokenizer(vocab: int) -> Tokenizer:
    """As Qwen's: byte-level BPE, nothing added, control tokens of a chat; id 0 is `!`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(CHAT_TOKENS), initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator((*_TEXT, *("yes no Yes No ",) * 50), trainer)
    tokenizer.add_special_tokens(list(CHAT_TOKENS))
    return tokenizer


def gemma_tokenizer(vocab: int) -> Tokenizer:
    """As Gemma's: spaces become `▁`, bytes back up what is unknown, a `<bos>` that templates write themselves."""
    return _metaspace_tokenizer(vocab, ["<pad>", "<eos>", "<bos>", "<unk>"])


def mistral_tokenizer(vocab: int) -> Tokenizer:
    """As Mistral's: `<unk>` is id 0, and `<s>` is put in front of every text."""
    tokenizer = _metaspace_tokenizer(vocab, ["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def _metaspace_tokenizer(vocab: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[*special, *bytes_, "Yes", "No", "yes", "no"], show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    # Training registers every listed token as special; only the control tokens are.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(state))


TOKENIZERS = {
    "wordpiece": wordpiece_tokenizer,
    "unigram": unigram_tokenizer,
    "chat": chat_tokenizer,
    "gemma": gemma_tokenizer,
    "mistral": mistral_tokenizer,
}


def _fields(architecture: str, size: Size, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of an architecture at a size."""
    fields: dict[str, Any] = {
        "vocab_size": max(size.vocab, tokenizer.get_vocab_size()),
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.positions,
    }
    if architecture.startswith(("Qwen", "Gemma", "Mistral", "Jina")):
        fields |= {"num_key_value_heads": size.kv_heads, "head_dim": size.hidden // size.heads}
        names = ("<|endoftext|>", "<pad>")
        fields["pad_token_id"] = next(i for i in map(tokenizer.token_to_id, names) if i is not None)
        fields["tie_word_embeddings"] = architecture.startswith("Gemma")
    elif architecture.startswith("XLM"):
        fields |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
        fields["max_position_embeddings"] = size.positions + 2
    elif architecture.startswith("Deberta"):
        # As the published ones: relative positions alone, no segments.
        fields |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
        fields |= {"type_vocab_size": 0, "pooler_hidden_size": size.hidden, "position_buckets": 16}
        fields |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "pad_token_id": 0}
    else:
        fields["pad_token_id"] = 0
    if architecture.startswith("ModernBert"):
        fields |= {"cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "local_attention": 16}
    return fields


def _add_projector(directory: Path, size: Size, seed: int) -> None:
    """Two layers over a marker's hidden state, and the class name of the published checkpoint."""
    from safetensors.torch import load_file, save_file

    rng = np.random.default_rng(seed)
    path = directory / "model.safetensors"
    tensors = {f"model.{name}": tensor for name, tensor in load_file(path).items()}
    half = size.hidden // 2
    for name, width in (("projector.0.weight", size.hidden), ("projector.2.weight", half)):
        tensors[name] = torch.from_numpy(rng.standard_normal((half, width), dtype=np.float32)) * width**-0.5
    save_file(tensors, path, metadata={"format": "pt"})
    published = {"architectures": ["JinaForRanking"], "auto_map": {"AutoModel": "modeling.JinaForRanking"}}
    config = json.loads((directory / "config.json").read_text()) | published
    (directory / "config.json").write_text(json.dumps(config, indent=2))
