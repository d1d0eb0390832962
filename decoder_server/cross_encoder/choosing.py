"""Which profile a checkpoint is served by: asked for, its own, by exact id, or made from its config.json.

Does not know tokens or tensors.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, cast

from checkpoint.errors import CheckpointError
from decoder_server.cross_encoder.declared import declared_activation, declared_max_tokens
from decoder_server.cross_encoder.profiles import GENERIC, Activation, Profile, builtin_profiles, load_profiles

# A checkpoint may carry its recipe: what `preread convert-ctxl` writes, and what a user may put there.
FILE_NAME = "preread-profile.toml"
# Longest input taken from a configuration that names more; attention on a CPU is quadratic.
MAX_GENERIC_TOKENS = 8192
# Encoders that transformers gives a classification head over the first token or a pool of all: a pair goes in.
ENCODERS = frozenset({
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert",
    "modernbert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl",
})  # fmt: skip
# These count positions from padding_idx + 1, so two of them are never used.
OFFSET_POSITIONS = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"})


def named_profile(name: str, wanted: str | Profile | None) -> Profile | None:
    """What is known before any file is read: the profile asked for, or the one of this exact id.

    Args:
        wanted: a profile, a model id of the table, or a TOML file with the row of `name` or only one row.

    Raises:
        CheckpointError: no such profile.
    """
    if isinstance(wanted, Profile):
        return wanted
    builtin = builtin_profiles()
    if wanted is None:
        return builtin.get(name) or builtin.get(_owner_and_name(name))
    if wanted in builtin:
        return builtin[wanted]
    if wanted == GENERIC:
        return None
    if not wanted.endswith(".toml"):
        raise CheckpointError(
            f"profile is {wanted!r}; expected a TOML file, {GENERIC!r}, or one of {', '.join(sorted(builtin))}"
        )
    rows = load_profiles(Path(wanted).expanduser())
    if name in rows:
        return rows[name]
    if len(rows) == 1:
        return next(iter(rows.values()))
    raise CheckpointError(f"{wanted}: has profiles for {', '.join(rows)}; none for {name!r}")


def own_profile(directory: Path) -> Profile | None:
    """The recipe that a checkpoint carries in a file of its own: one row."""
    path = directory / FILE_NAME
    if not path.exists():
        return None
    rows = load_profiles(path)
    if len(rows) != 1:
        raise CheckpointError(f"{path}: has {len(rows)} profiles; expected one")
    return next(iter(rows.values()))


def generic_profile(name: str, config: dict[str, Any], directory: Path | None = None) -> Profile:
    """A profile from config.json and what sentence-transformers wrote beside it, for an encoder with a head.

    A decoder's prompt and answer tokens stand in no configuration: guessing them gives numbers, not scores.

    Raises:
        CheckpointError: nothing that can be served without a profile.
    """
    architecture = str((config.get("architectures") or ["none"])[0])
    kind = config.get("model_type")
    if kind not in ENCODERS or not architecture.endswith("ForSequenceClassification"):
        raise CheckpointError(
            f"{name}: no profile for it, and a {architecture} ({kind}) cannot be served from its configuration alone, "
            "which says neither its prompt nor its readout; give a profile (docs/cross-encoders.md)"
        )
    labels = num_labels(config)
    if labels not in (1, 2):
        raise CheckpointError(
            f"{name}: config.json has {labels} labels; a reranker has 1, or 2 with the second relevant"
        )
    positions = int(config.get("max_position_embeddings") or 512)
    at = directory or Path(name)
    if kind in OFFSET_POSITIONS:
        positions -= int(config.get("pad_token_id") or 0) + 1
    return Profile(
        model=GENERIC,
        architectures=(architecture,),
        num_labels=labels,
        activation=cast(Activation, declared_activation(at, config, labels)),
        max_tokens=max(1, min(positions, declared_max_tokens(at) or MAX_GENERIC_TOKENS, MAX_GENERIC_TOKENS)),
        needs_remote_code="auto_map" in config,
    )


def num_labels(config: dict[str, Any]) -> int:
    """As transformers reads it: the labels by name, or a count, or two."""
    names = config.get("id2label")
    if isinstance(names, dict) and names:
        return len(names)
    return int(config.get("num_labels", 2))


def check_architecture(profile: Profile, config: dict[str, Any], name: str) -> None:
    """Raises CheckpointError where the checkpoint is not of the kind that its profile is for."""
    found = [str(item) for item in config.get("architectures") or []]
    if not set(found) & set(profile.architectures):
        raise CheckpointError(
            f"{name}: config.json names the architecture {' '.join(found) or 'none'} "
            f"({config.get('model_type', 'no model_type')}); "
            f"the profile {profile.model!r} is for {' or '.join(profile.architectures)}"
        )
    if profile.head in ("classifier", "score") and num_labels(config) != profile.num_labels:
        raise CheckpointError(
            f"{name}: config.json has {num_labels(config)} labels; "
            f"the profile {profile.model!r} needs {profile.num_labels}"
        )


def limited(profile: Profile, config: dict[str, Any], max_tokens: int | None) -> Profile:
    """The profile with limits that the checkpoint can hold, or as asked for.

    Raises:
        CheckpointError: a limit out of range.
    """
    positions = config.get("max_position_embeddings")
    most = profile.max_tokens
    if isinstance(positions, int):
        offset = int(config.get("pad_token_id") or 0) + 1 if config.get("model_type") in OFFSET_POSITIONS else 0
        most = positions - offset
    if max_tokens is not None:
        if not 1 <= max_tokens <= most:
            raise CheckpointError(f"max_tokens is {max_tokens}; expected 1..{most}, what the checkpoint holds")
        profile = dataclasses.replace(profile, max_tokens=max_tokens)
    total = min(profile.max_tokens, most)
    # Query and instruction may take half together, so that something of every passage is always read.
    share = total // 4 if profile.takes_instruction else total // 2
    return dataclasses.replace(
        profile,
        max_tokens=total,
        max_query_tokens=max(1, min(profile.max_query_tokens, share)),
        max_instruction_tokens=max(1, min(profile.max_instruction_tokens, share)),
    )


def _owner_and_name(name: str) -> str:
    """`owner/name` of a hub cache's snapshot, or of a directory laid out like the hub; else the name itself."""
    cached = re.search(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$", name)
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    return "/".join(name.rstrip("/").split("/")[-2:])
