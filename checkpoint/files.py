"""Finds a checkpoint's files and reads the small ones.

Knows Hugging Face directories and hub ids. Does not know tensors, tokens or templates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError

# Everything a model may need; the vision tower lives in the same shards, so shards come whole. Vocabularies of older
# cross-encoders are `vocab.txt`, `merges.txt` or sentencepiece's `*.model`.
HUB_PATTERNS = ("*.json", "*.safetensors", "tokenizer*", "vocab.txt", "merges.txt", "*.model", "*.toml", "*.md")


def resolve(name: str, revision: str | None = None, *, with_code: bool = False) -> Path:
    """The local directory of a checkpoint: `name` itself, or the hub snapshot with that id.

    Args:
        with_code: fetch the repository's Python files too.

    Raises:
        CheckpointError: neither a directory nor a hub id that can be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"checkpoint {name!r} is a file; expected a Hugging Face directory or a hub id")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"checkpoint {name!r}: no such directory, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a directory

    patterns = [*HUB_PATTERNS, *(["*.py"] if with_code else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as exc:  # the hub client raises many unrelated types; each means the same here
        reason = " ".join(f"{type(exc).__name__}: {exc}".split())  # the hub's messages have several lines
        raise CheckpointError(
            f"checkpoint {name!r}: no local directory, and the hub did not provide it ({reason})"
        ) from exc


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_value(path: Path) -> Any:
    """Any JSON value from a file of a checkpoint. Raises CheckpointError: unreadable, or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a checkpoint directory needs it") from None
    except (OSError, ValueError, RecursionError) as exc:  # bad UTF-8, bad JSON, a number or a nesting too long
        raise CheckpointError(f"{path}: cannot be read as JSON ({exc})") from exc
