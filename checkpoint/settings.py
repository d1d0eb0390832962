"""How a checkpoint wants its texts: templates, answers, limits. KaLM's, unless `preread.json` says otherwise.

Does not know tokens; checkpoint.text applies what is declared here.
"""

from __future__ import annotations

import dataclasses
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError
from checkpoint.files import read_json

FILE_NAME = "preread.json"
FORMAT_VERSION = 1

# Source: the reference code of KaLM-Embedding/KaLM-Reranker-V1-Nano on the hub.
KALM_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
KALM_PROMPT = (
    "<bos><start_of_turn>user\n" + KALM_SYSTEM + "\n\n<Instruct>: {instruction}\n<Query>: {query}"
    "<end_of_turn>\n<start_of_turn>model\n\n\n\n"
)


@dataclass(frozen=True)
class CheckpointSettings:
    """Templates and limits of one checkpoint; the defaults are KaLM-Reranker-V1's."""

    passage_template: str = "<Document>: {passage}"
    prompt_template: str = KALM_PROMPT
    yes_token: str = "yes"
    no_token: str = "no"
    default_instruction: str = "Given a query, retrieve documents that answer the query."
    default_compression_ratio: int = 4
    max_passage_tokens: int = 1024
    max_query_tokens: int = 512

    @classmethod
    def load(cls, directory: Path) -> CheckpointSettings:
        """Reads `preread.json` where there is one.

        Raises:
            CheckpointError: an unknown key, a wrong type, a template without its field.
        """
        path = directory / FILE_NAME
        if not path.exists():
            return cls()
        values = read_json(path)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format_version is {version!r}; this version reads {FORMAT_VERSION}")
        for key, value in values.items():
            _check(path, key, value)
        settings = cls(**values)
        _check_template(path, "passage_template", settings.passage_template, {"passage"}, {"passage"})
        _check_template(path, "prompt_template", settings.prompt_template, {"query"}, {"query", "instruction"})
        return settings


def _check(path: Path, key: str, value: Any) -> None:
    defaults = dataclasses.asdict(CheckpointSettings())
    if key not in defaults:
        raise CheckpointError(f"{path}: unknown key {key!r}; known: format_version, {', '.join(defaults)}")
    kind = type(defaults[key])
    if type(value) is not kind:
        raise CheckpointError(f"{path}: {key} is {value!r}; expected {kind.__name__}")
    if isinstance(value, int) and value < 1:
        raise CheckpointError(f"{path}: {key} is {value}; expected at least 1")


def _check_template(path: Path, key: str, template: str, needed: set[str], allowed: set[str]) -> None:
    try:
        found = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as exc:
        raise CheckpointError(
            f"{path}: {key} is not a template ({exc}); braces of the text itself are doubled"
        ) from exc
    if not needed <= found or not found <= allowed:
        raise CheckpointError(
            f"{path}: {key} has the fields {sorted(found)}; expected {sorted(needed)}, allowed {sorted(allowed)}"
        )
