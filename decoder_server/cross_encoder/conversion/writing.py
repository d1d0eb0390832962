"""Writes the classifier: the same layers, and one row of the output embedding as its score.

A tensor is read, and a shard of at most SHARD_BYTES written, at a time; the source is never held as a whole,
in however many files it comes. Does not judge the result.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoint.errors import CheckpointError
from checkpoint.files import read_json
from decoder_server.cross_encoder.choosing import FILE_NAME as PROFILE_FILE
from decoder_server.cross_encoder.conversion.source import COLUMN, HEAD, CausalSource

SCORE = "score.weight"
LABEL = "SCORE"
SHARD_BYTES = 1 << 30
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# What the source's licence asks to be passed on, and its card, which says which licence that is.
_PAPERS = ("LICENSE*", "LICENCE*", "NOTICE*", "README.md")

Advance = Callable[[int], None]  # told how many tensors were written


def convert(source: CausalSource, folder: Path, advance: Advance = lambda num: None) -> None:
    """Fills `folder` with the converted checkpoint: weights, configuration, tokenizer, profile, licence.

    Raises:
        CheckpointError: a tensor that cannot be read, or a disk too small.
    """
    groups = _groups(source)
    num_bytes = sum(_num_bytes(source, name) for group in groups for name in group)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CheckpointError(f"{folder.parent}: {free:,} bytes are free; the result takes {num_bytes:,}")
    _write_weights(source, folder, groups, num_bytes, advance)
    _write_json(folder / "config.json", _config(source))
    _write_tokenizer(source, folder)
    (folder / PROFILE_FILE).write_text(_profile_row(source), encoding="utf-8")
    for pattern in _PAPERS:
        for path in source.path.glob(pattern):
            # The card describes the language model: beside the weights, but not as their own.
            shutil.copyfile(path, folder / (f"SOURCE-{path.name}" if path.name == "README.md" else path.name))


def _num_bytes(source: CausalSource, name: str) -> int:
    if name == SCORE:
        return 8 * int(source.config["hidden_size"])
    weight = source.tensors.weights[name]
    item = _ITEM_BYTES["F32"] if weight.quantized else _ITEM_BYTES.get(weight.values.dtype, 8)
    return math.prod(weight.shape) * item


def _groups(source: CausalSource) -> list[list[str]]:
    """Tensor names of the result, shard by shard, in the source's order."""
    groups: list[list[str]] = [[SCORE]]
    size = 0
    for name in source.tensors.weights:
        if name == HEAD:
            continue
        size += _num_bytes(source, name)
        if size > SHARD_BYTES and groups[-1] != [SCORE]:
            groups.append([])
            size = _num_bytes(source, name)
        groups[-1].append(name)
    return groups


def _write_weights(
    source: CausalSource, folder: Path, groups: list[list[str]], num_bytes: int, advance: Advance
) -> None:
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        save_file(dict(_read(source, group, advance)), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _read(source: CausalSource, names: list[str], advance: Advance) -> Iterator[tuple[str, torch.Tensor]]:
    """One after the other; what was quantized becomes float32, which holds the product with its scales."""
    for name in names:
        weight = source.tensors.weights[source.head if name == SCORE else name]
        if name == SCORE:
            row = weight.rows(COLUMN, COLUMN + 1)  # (1, hidden)
            if not row.isfinite().all() or not row.any():
                raise CheckpointError(
                    f"{weight.values.path}: row {COLUMN} of {source.head} is zero or not finite: no score"
                )
            yield name, row.clone()
        elif weight.quantized:
            yield name, source.tensors.read(name)
        else:
            yield name, weight.values.rows(0, math.prod(weight.shape[:1]))
        advance(1)


def _config(source: CausalSource) -> dict[str, Any]:
    config = dict(source.config)
    config.update(
        architectures=[source.target],
        num_labels=1,
        id2label={"0": LABEL},
        label2id={LABEL: 0},
        pad_token_id=source.pad_token_id,
        tie_word_embeddings=False,  # no output embedding is left to tie
        # One label makes sentence-transformers take a sigmoid unless told otherwise; the score is the logit.
        sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"},
    )
    config.pop("auto_map", None)
    if source.tensors.quantization:  # the result holds plain numbers
        for key in ("quantization_config", "compression_config"):
            config.pop(key, None)
        config["dtype"] = "float32"
        config.pop("torch_dtype", None)
    return config


def _write_tokenizer(source: CausalSource, folder: Path) -> None:
    """The source's files, with the padding that configuration and profile say."""
    for name in _TOKENIZER_FILES:
        if (source.path / name).exists():
            shutil.copyfile(source.path / name, folder / name)
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    _write_json(path, config | {"pad_token": source.pad_token, "padding_side": "left"})


def _profile_row(source: CausalSource) -> str:
    """The recipe that the result carries: the source's template and limits with the new head."""
    profile = source.profile
    rows: dict[str, object] = {
        "models": [f"{source.name.rstrip('/')} (as a classifier)"],
        "architectures": [source.target],
        "head": "score",
        "template": list(profile.template),
        "instruction_format": profile.instruction_format,
        "add_special_tokens": profile.add_special_tokens,
        "strip": profile.strip,
        "padding": "left",
        "max_tokens": profile.max_tokens,
        "license": profile.license,
        "note": f"row {COLUMN} of {source.head} of {source.name}",
    }
    # JSON's strings, numbers, booleans and lists are TOML's too.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in rows.items()]
    return "# How this checkpoint is asked; written by `preread convert-ctxl`.\n[[profile]]\n" + "\n".join(lines) + "\n"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
