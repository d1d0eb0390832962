"""A checkpoint's files: found in a directory or on the hub, the small ones read, configuration fields checked.

A field that changes the arithmetic and is not applied makes scores that are not the model's: a field is applied, known
not to matter for a score, has the value that the model's class gives it when it is missing, or is an error.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names the file, the value and the expectation."""


# Everything a model may need; the vision tower lives in the same shards, so shards come whole. Vocabularies of older
# cross-encoders are `vocab.txt`, `merges.txt` or sentencepiece's `*.model`.
HUB_PATTERNS = ("*.json", "*.safetensors", "tokenizer*", "vocab.txt", "merges.txt", "*.model", "*.toml", "*.md")


def resolve(name: str, *, with_code: bool = False) -> Path:
    """The local directory of a checkpoint: `name` itself, or the hub snapshot, `with_code` with its Python files.
    Raises CheckpointError where it is neither a directory nor a hub id that can be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"checkpoint {name!r} is a file; expected a Hugging Face directory or a hub id")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"checkpoint {name!r}: no such directory, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a directory

    try:
        return Path(snapshot_download(name, allow_patterns=[*HUB_PATTERNS, *(["*.py"] if with_code else [])]))
    except Exception as exc:  # the hub client raises many unrelated types; each means the same here
        raise CheckpointError(f"checkpoint {name!r}: no directory, and the hub gave none ({one_line(exc)})") from exc


def read_json(path: Path, *, optional: bool = False, kind: Any = dict[str, Any]) -> Any:
    """What a JSON file of a checkpoint holds, an object by default; an empty one where an optional file is missing."""
    if optional and not path.exists():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a checkpoint directory needs it") from None
    except (OSError, ValueError, RecursionError) as exc:  # bad UTF-8, bad JSON, a number or a nesting too long
        raise CheckpointError(f"{path}: cannot be read as JSON ({exc})") from exc
    return read_fields(str(path.parent), {path.name: value}, {path.name: kind})[path.name]


def one_line(exc: Exception) -> str:
    """The beginning of an exception's message, which may be pages long."""
    text = " ".join(str(exc).split())[:300]
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


# Names, versions and labels; tokens, which templates and tokenizers write themselves; what only training or the
# generation of text reads. Old writers stored all of transformers' defaults for the latter.
HARMLESS = frozenset({
    # identity
    "architectures", "auto_map", "dtype", "finetuning_task", "id2label", "label2id", "language", "license",
    "model_type", "name", "name_or_path", "num_labels", "prefix", "problem_type",
    "sbert_ce_default_activation_function", "sentence_transformers", "task_specific_params", "tokenizer_class",
    "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version",
    # tokens
    "bad_words_ids", "begin_suppress_tokens", "boi_token_id", "boi_token_index", "bos_token_id", "cls_token_id",
    "decoder_start_token_id", "eoi_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "image_token_id", "image_token_index", "mask_token_id", "pad_token_id", "sep_token_id", "suppress_tokens",
    "unk_token_id",
    # training
    "attention_dropout", "attention_probs_dropout_prob", "classifier_dropout", "classifier_dropout_prob",
    "classifier_dropout_rate", "dropout", "dropout_rate", "embedding_dropout", "gradient_checkpointing",
    "hidden_dropout", "hidden_dropout_prob", "initializer_cutoff_factor", "initializer_factor", "initializer_range",
    "mlp_dropout", "pooler_dropout", "tf_legacy_loss", "use_bfloat16",
    # form of the output, speed and memory
    "cache_implementation", "chunk_size_feed_forward", "compile", "head_dtype", "max_seq_length", "model_max_length",
    "output_attentions", "output_hidden_states", "output_past", "output_scores", "reference_compile", "return_dict",
    "return_dict_in_generate", "torchscript", "use_cache", "use_return_dict",
    # generation
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty",
    "temperature", "top_k", "top_p", "typical_p",
    # a pooler that no class has any more (BERT's first multilingual checkpoints)
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
})  # fmt: skip
# How the weights are stored, given next to the model's fields; checkpoint.tensors reads it.
STORAGE = frozenset({"compression_config", "quantization_config"})
# Fields that classes of today no longer have, by the one value that they all compute.
ONLY = {"is_causal": True, "position_embedding_type": "absolute", "pooler_type": "first_token_transform"}


def check_fields(where: str, raw: Mapping[str, Any], defaults: Mapping[str, Any], applied: Collection[str]) -> None:
    """Raises CheckpointError, beginning with `where`, at a field that is neither `applied` nor known not to matter.
    `defaults` is what the model's class takes for a field that is missing; a field without one is unknown to it.
    """
    known = ONLY | dict(defaults)
    for key, value in raw.items():
        # Off, empty or absent: nothing that could be missing from the arithmetic.
        fits, expected = value is None or value is False or value in ({}, [], ""), "a field that this model has"
        if key in known:
            fits, expected = value == known[key], repr(known[key])
        if not (fits or key in applied or key in HARMLESS or key.startswith("_")):
            raise CheckpointError(
                f"{where}: {key} is {value!r:.80}; expected {expected}. It is not applied here; if it changes no "
                "score, remove it from the file"
            )


def read_fields(where: str, raw: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an object in a file, as the annotations `kinds` want them.
    Raises CheckpointError for an unknown key, or a value of another type or out of its bounds.
    """
    values = {}
    for key, value in raw.items():
        if key not in kinds:
            raise CheckpointError(f"{where}: unknown key {key!r}; known: {', '.join(kinds)}")
        try:
            values[key] = msgspec.convert(value, kinds[key])
        except msgspec.ValidationError as exc:
            expected = f"{exc}".replace("Expected", "expected", 1)
            if get_origin(kinds[key]) is Literal:
                expected = f"expected one of {', '.join(map(str, get_args(kinds[key])))}"
            raise CheckpointError(f"{where}: {key} is {value!r:.80}; {expected}") from exc
    return values
