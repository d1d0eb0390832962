"""Declarations of a checkpoint about its own arithmetic: applied by transformers or by the profile, or refused.

config.json, and the files that sentence-transformers writes beside it: modules.json, config_sentence_transformers.json
and sentence_bert_config.json. Does not know tensors or tokens.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError
from checkpoint.fields import STORAGE, check_fields
from checkpoint.files import read_json, read_json_value
from decoder_server.cross_encoder.profiles import GENERIC, Profile

# Older names of RoPE's numbers, which classes with `rope_parameters` still take.
ROPE_FIELDS = frozenset({
    "global_rope_theta", "local_rope_theta", "partial_rotary_factor", "rope_local_base_freq", "rope_scaling",
    "rope_theta",
})  # fmt: skip
# Older names of other fields, by the one that classes have today.
RENAMED = {
    "global_attn_every_n_layers": "layer_types",
    "max_window_layers": "layer_types",
    "sliding_window_pattern": "layer_types",
}
# Fields that a model reads where its configuration has them, though its class does not name them (transformers 5.23).
ALSO_READ = {
    "deberta": {"cls_dropout", "embedding_size", "pooler_hidden_size", "talking_head"},
    "deberta-v2": {
        "attention_head_size", "cls_dropout", "conv_act", "conv_groups", "conv_kernel_size", "embedding_size",
        "norm_rel_ebd", "pooler_hidden_size", "position_buckets", "share_att_key",
    },
    "modernbert": {"layer_norm_eps"},  # stored beside norm_eps, which is read, by its authors
    "qwen2": {"head_dim"},
}  # fmt: skip
# Modules of sentence-transformers that a profile stands for: the model itself, and the answer tokens' logits.
MODULES = frozenset({"Transformer", "LogitScore"})
ACTIVATIONS = {"Identity": "identity", "Sigmoid": "sigmoid"}


def check_declared(directory: Path, raw: dict[str, Any], config: Any, profile: Profile) -> None:
    """Raises CheckpointError where something declared is applied by nothing here, naming it.

    Args:
        raw: config.json as it stands.
        config: what transformers made of it.
    """
    if not profile.needs_remote_code:  # else the checkpoint's own Python reads what it declares
        applied = _applied(raw, config)
        if profile.head != "classifier":  # transformers attends both ways for unpadded batches only
            applied -= {"use_bidirectional_attention"}
        check_fields(str(directory / "config.json"), raw, {}, applied)
    _check_modules(directory, profile)
    if profile.model == GENERIC:
        _check_texts(directory)


def _applied(raw: dict[str, Any], config: Any) -> set[str]:
    """Fields that transformers' class, or the model that reads its configuration, takes into account."""
    kind = type(config)
    own = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    applied: set[str] = own | set(getattr(kind, "attribute_map", {})) | STORAGE
    if "rope_parameters" in own:
        applied |= ROPE_FIELDS
    applied |= ALSO_READ.get(str(raw.get("model_type")), set())
    applied |= {old for old, new in RENAMED.items() if new in own}
    return applied


def _check_modules(directory: Path, profile: Profile) -> None:
    """Heads that sentence-transformers would put behind the model."""
    path = directory / "modules.json"
    if not path.exists():
        return
    modules = read_json_value(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path}: expected a list of objects")
    for module in modules:
        kind = str(module.get("type", "none"))
        place = directory / str(module.get("path") or "")
        name = kind.rpartition(".")[2]
        weighs = place.resolve() != directory.resolve() and any(
            path.suffix in (".safetensors", ".bin") for path in place.glob("*")
        )
        known = kind.startswith("sentence_transformers.") and name in MODULES
        # A published model's own module is part of its recipe, so the profile that goes by its id has it.
        if weighs or not (known or (profile.model != GENERIC and not kind.startswith("sentence_transformers."))):
            raise CheckpointError(
                f"{path}: lists the module {kind} ({place.name}), which is not applied here; "
                f"expected {' and '.join(sorted(MODULES))} alone"
            )
        if name == "LogitScore" and known:
            _check_answers(place / "config.json", profile)


def _check_answers(path: Path, profile: Profile) -> None:
    """The answer tokens that sentence-transformers reads, where the profile gives ids for its own."""
    found = read_json(path) if path.exists() else {}
    given = tuple(answer for answer in (profile.yes, profile.no) if answer is not None)
    ids = given if all(isinstance(answer, int) for answer in given) else profile.answer_ids
    for key, expected in zip(("true_token_id", "false_token_id"), (*ids, None), strict=False):
        if ids and found.get(key) != expected:
            raise CheckpointError(
                f"{path}: {key} is {found.get(key)!r}; the profile {profile.model!r} reads token {expected!r}"
            )


def _check_texts(directory: Path) -> None:
    """Changes sentence-transformers would make to texts first, for a model that no profile describes."""
    path = directory / "sentence_bert_config.json"
    if path.exists() and read_json(path).get("do_lower_case"):
        raise CheckpointError(f"{path}: do_lower_case is true, which is not applied here; expected false")
    path = directory / "config_sentence_transformers.json"
    if path.exists():
        found = read_json(path)
        name, prompts = found.get("default_prompt_name"), found.get("prompts") or {}
        if name is not None and (not isinstance(prompts, dict) or prompts.get(name)):
            raise CheckpointError(
                f"{path}: default_prompt_name is {name!r}; a prompt needs a profile with a template "
                "(docs/cross-encoders.md)"
            )


def declared_activation(directory: Path, raw: dict[str, Any], labels: int) -> str:
    """As sentence-transformers reads it: what a file names, else a sigmoid for one label.

    Raises:
        CheckpointError: an activation that profiles do not have.
    """
    path = directory / "config_sentence_transformers.json"
    saved = read_json(path).get("activation_fn") if path.exists() else None
    if saved is None:
        inner = raw.get("sentence_transformers")
        saved = inner.get("activation_fn") if isinstance(inner, dict) else None
    if saved is None:
        saved = raw.get("sbert_ce_default_activation_function")
    if saved is None or labels == 2:  # of two labels the margin's sigmoid is the softmax
        return "sigmoid"
    name = str(saved).rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{directory}: the activation function is {saved!r}; expected {' or '.join(ACTIVATIONS)}, or a profile"
        )
    return ACTIVATIONS[name]


def declared_max_tokens(directory: Path) -> int | None:
    """The input that sentence-transformers cuts at, where it or the tokenizer says so."""
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        path = directory / name
        found = read_json(path).get(key) if path.exists() else None
        if type(found) is int and found > 0:  # transformers stores 1e30 where there is no limit
            return found
    return None
