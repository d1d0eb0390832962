"""How a checkpoint wants its texts: templates, answers, limits. KaLM's, unless `preread.json` says otherwise.

Does not know tokens; checkpoint.text applies what is declared here.
"""

from __future__ import annotations

import dataclasses
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.files import CheckpointError, read_json, read_json_value

FILE_NAME = "preread.json"
FORMAT_VERSION = 1
# A checkpoint is a stranger's input: what its strings and numbers may cost is bounded when they are read.
MAX_TEXT_CHARS = 65_536
MAX_FIELD_USES = 4  # of one field in one template: a text from outside is repeated at most so often
MAX_NUMBER = 2**31 - 1  # what the wire's integers hold

# Files of KaLM-Reranker-V1-*-R2: the configuration of its sentence-transformers module
# (KaLMCrossEncoderModule), and sentence-transformers' own file, whose default prompt is that module's instruction.
KALM_FILE_NAME = "kalm_cross_encoder_config.json"
PROMPTS_FILE_NAME = "config_sentence_transformers.json"
KALM_MODULE = "KaLMCrossEncoderModule"
KALM_KEYS = ("query_max_length", "document_max_length", "encoder_chunk_size", "system_instruction")

# Source: the reference code of KaLM-Embedding/KaLM-Reranker-V1-Nano on the hub.
KALM_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)


def kalm_prompt(system: str) -> str:
    """The prompt's template under a system instruction, which is text and no template."""
    return (
        f"<bos><start_of_turn>user\n{system.replace('{', '{{').replace('}', '}}')}"
        "\n\n<Instruct>: {instruction}\n<Query>: {query}<end_of_turn>\n<start_of_turn>model\n\n\n\n"
    )


KALM_PROMPT = kalm_prompt(KALM_SYSTEM)


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
        """Reads `preread.json` and KaLM's own files, where they are there; a key of `preread.json` wins.

        Raises:
            CheckpointError: an unknown key, a wrong type, a template without its field.
        """
        path = directory / FILE_NAME
        _check_modules(directory / "modules.json")
        values = _kalm_values(directory)
        if path.exists():
            own = read_json(path)
            version = own.pop("format_version", None)
            if version != FORMAT_VERSION:
                raise CheckpointError(f"{path}: format_version is {version!r}; this version reads {FORMAT_VERSION}")
            for key, value in own.items():
                _check(path, key, value)
            values |= own
        settings = cls(**values)
        _check_template(path, "passage_template", settings.passage_template, {"passage"}, {"passage"})
        _check_template(path, "prompt_template", settings.prompt_template, {"query"}, {"query", "instruction"})
        return settings


def _kalm_values(directory: Path) -> dict[str, Any]:
    """Values of KaLM's own files, as fields of CheckpointSettings.

    Raises:
        CheckpointError: a key that the module does not have, or a value it does not take.
    """
    path = directory / KALM_FILE_NAME
    if not path.exists():
        return {}
    given = read_json(path)
    for key in given:
        if key not in KALM_KEYS:
            raise CheckpointError(f"{path}: unknown key {key!r}; known: {', '.join(KALM_KEYS)}")
    values: dict[str, Any] = {}
    names = {"query_max_length": "max_query_tokens", "document_max_length": "max_passage_tokens"}
    for key, name in names.items():
        if key in given:
            _check(path, name, given[key], shown=key)
            values[name] = given[key]
    if "encoder_chunk_size" in given:
        ratio = 1 if given["encoder_chunk_size"] is None else given["encoder_chunk_size"]  # null: no pooling
        _check(path, "default_compression_ratio", ratio, shown="encoder_chunk_size")
        values["default_compression_ratio"] = ratio
    if "system_instruction" in given:
        _check(path, "prompt_template", given["system_instruction"], shown="system_instruction")
        values["prompt_template"] = kalm_prompt(given["system_instruction"])
    instruction = _default_prompt(directory / PROMPTS_FILE_NAME)
    if instruction is not None:
        values["default_instruction"] = instruction
    return values


def _check_modules(path: Path) -> None:
    """Raises CheckpointError where sentence-transformers would put more behind the model than KaLM's own module."""
    modules = read_json_value(path) if path.exists() else []
    if not isinstance(modules, list):
        raise CheckpointError(f"{path}: expected a list of modules, found {type(modules).__name__}")
    kinds = [str(module.get("type", module) if isinstance(module, dict) else module) for module in modules]
    others = [kind for kind in kinds if kind.rpartition(".")[2] != KALM_MODULE]
    if others or len(kinds) > 1:
        raise CheckpointError(
            f"{path}: lists the modules {', '.join(kinds)}; expected {KALM_MODULE} alone: others are not applied here"
        )


def _default_prompt(path: Path) -> str | None:
    """The prompt that sentence-transformers uses where it is given none, if any."""
    if not path.exists():
        return None
    found = read_json(path)
    name, prompts = found.get("default_prompt_name"), found.get("prompts")
    if name is None:
        return None
    if not isinstance(prompts, dict) or name not in prompts:
        raise CheckpointError(f"{path}: default_prompt_name is {name!r}; expected a name in prompts")
    _check(path, "default_instruction", prompts[name], shown=f"prompts.{name}")
    text: str = prompts[name]
    return text


def _check(path: Path, key: str, value: Any, *, shown: str = "") -> None:
    """Raises CheckpointError where a value is none of the field `key`, which the file calls `shown`."""
    defaults = dataclasses.asdict(CheckpointSettings())
    if key not in defaults:
        raise CheckpointError(f"{path}: unknown key {key!r}; known: format_version, {', '.join(defaults)}")
    kind = type(defaults[key])
    key = shown or key
    if type(value) is not kind:
        raise CheckpointError(f"{path}: {key} is {value!r}; expected {kind.__name__}")
    if isinstance(value, int) and not 1 <= value <= MAX_NUMBER:
        raise CheckpointError(f"{path}: {key} is {value}; expected at least 1 and at most {MAX_NUMBER}")
    if isinstance(value, str) and len(value) > MAX_TEXT_CHARS:
        raise CheckpointError(f"{path}: {key} has {len(value):,} characters; expected at most {MAX_TEXT_CHARS:,}")


def template_fields(template: str) -> list[str]:
    """Names of a template's fields, in order, each with whatever more its braces hold.

    str.format pads (`{query:>999999999}` asks for a gigabyte), converts, indexes and follows attributes. None of it
    is a plain name, so a caller that allows plain names alone refuses it.

    Raises:
        ValueError: no template, or one too long or too repetitive to be filled with texts from outside.
    """
    if len(template) > MAX_TEXT_CHARS:
        raise ValueError(f"it has {len(template):,} characters; expected at most {MAX_TEXT_CHARS:,}")
    parts = string.Formatter().parse(template)
    names = [f"{name}{kind or ''}{form or ''}" for _, name, form, kind in parts if name is not None]
    for name in set(names):
        if names.count(name) > MAX_FIELD_USES:
            raise ValueError(f"it names {name!r} {names.count(name)} times; expected at most {MAX_FIELD_USES}")
    return names


def _check_template(path: Path, key: str, template: str, needed: set[str], allowed: set[str]) -> None:
    try:
        found = set(template_fields(template))
    except ValueError as exc:
        raise CheckpointError(
            f"{path}: {key} is not a template ({exc}); braces of the text itself are doubled"
        ) from exc
    if not needed <= found or not found <= allowed:
        raise CheckpointError(
            f"{path}: {key} has the fields {sorted(found)}; expected {sorted(needed)}, allowed {sorted(allowed)}"
        )
