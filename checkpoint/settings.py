"""Templates, answers and limits of a checkpoint: KaLM's, unless its files say otherwise.
`preread.json` is ours. KaLM-Reranker-V1-*-R2 brings the configuration of its sentence-transformers module and
sentence-transformers' own file, whose default prompt is that module's instruction.
"""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, get_type_hints

from msgspec import Meta

from checkpoint.files import CheckpointError, read_fields, read_json

FILE_NAME = "preread.json"
FORMAT_VERSION = 1
# A checkpoint is a stranger's input: the cost of its strings and numbers is bounded when they are read.
MAX_TEXT_CHARS = 65_536
MAX_FIELD_USES = 4  # of one field in one template: a text from outside is repeated at most so often
_Text = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]
_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]  # as the wire's integers

KALM_MODULE = "KaLMCrossEncoderModule"
KALM_FILE_NAME = "kalm_cross_encoder_config.json"
KALM_FIELDS = {  # of its file, by the setting that each becomes
    "query_max_length": "max_query_tokens",
    "document_max_length": "max_passage_tokens",
    "encoder_chunk_size": "default_compression_ratio",
    "system_instruction": "prompt_template",
}
# Source: the reference code of KaLM-Embedding/KaLM-Reranker-V1-Nano on the hub.
KALM_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_AROUND_SYSTEM = (
    "<bos><start_of_turn>user\n",
    "\n\n<Instruct>: {instruction}\n<Query>: {query}<end_of_turn>\n<start_of_turn>model\n\n\n\n",
)
KALM_PROMPT = KALM_SYSTEM.join(_AROUND_SYSTEM)


@dataclass(frozen=True)
class CheckpointSettings:
    """Templates and limits of one checkpoint; the defaults are KaLM-Reranker-V1's."""

    passage_template: _Text = "<Document>: {passage}"
    prompt_template: _Text = KALM_PROMPT
    yes_token: _Text = "yes"
    no_token: _Text = "no"
    default_instruction: _Text = "Given a query, retrieve documents that answer the query."
    default_compression_ratio: _Count = 4
    max_passage_tokens: _Count = 1024
    max_query_tokens: _Count = 512

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Reads `preread.json` and KaLM's own files, where they are there; a key of `preread.json` wins."""
        path = directory / FILE_NAME
        listed = read_json(directory / "modules.json", optional=True, kind=list[dict[str, Any]])
        modules = [str(module.get("type", module)) for module in listed]
        if len(modules) > 1 or any(kind.rpartition(".")[2] != KALM_MODULE for kind in modules):
            raise CheckpointError(
                f"{directory / 'modules.json'}: lists the modules {', '.join(modules)}; "
                f"expected {KALM_MODULE} alone: others are not applied here"
            )
        kinds = get_type_hints(cls, include_extras=True)
        own = read_json(path, optional=True)
        version = own.pop("format_version", None) if path.exists() else FORMAT_VERSION
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format_version is {version!r}; this version reads {FORMAT_VERSION}")
        settings = cls(**_kalm_values(directory, kinds) | read_fields(str(path), own, kinds))
        for key, needed, optional in (("passage_template", "passage", ""), ("prompt_template", "query", "instruction")):
            try:
                found = sorted(set(template_fields(getattr(settings, key))))
            except ValueError as exc:
                told = f"{key} is not a template ({exc}); braces of the text itself are doubled"
                raise CheckpointError(f"{path}: {told}") from exc
            allowed = sorted({needed, optional or needed})
            if needed not in found or not set(found) <= set(allowed):
                raise CheckpointError(f"{path}: {key} has the fields {found}; expected {[needed]}, allowed {allowed}")
        return settings


def _kalm_values(directory: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    path = directory / KALM_FILE_NAME
    if not path.exists():
        return {}
    own = {key: kinds[setting] for key, setting in KALM_FIELDS.items()}
    own["encoder_chunk_size"] |= None  # no pooling
    values = {KALM_FIELDS[key]: value for key, value in read_fields(str(path), read_json(path), own).items()}
    if values.get("default_compression_ratio", 1) is None:
        values["default_compression_ratio"] = 1
    if "prompt_template" in values:
        # A system instruction is text and no template.
        system = values["prompt_template"].replace("{", "{{").replace("}", "}}")
        values["prompt_template"] = system.join(_AROUND_SYSTEM)
    # The prompt that sentence-transformers uses where it is given none.
    path = directory / "config_sentence_transformers.json"
    found = read_json(path, optional=True)
    name, prompts = found.get("default_prompt_name"), found.get("prompts")
    if name is not None:
        if not isinstance(prompts, dict) or name not in prompts:
            raise CheckpointError(f"{path}: default_prompt_name is {name!r}; expected a name in prompts")
        key = f"prompts.{name}"
        read = read_fields(str(path), {key: prompts[name]}, {key: kinds["default_instruction"]})
        values["default_instruction"] = read[key]
    return values


def template_fields(template: str) -> list[str]:
    """Names of a template's fields, in order, each with whatever more its braces hold.
    str.format pads (`{query:>999999999}` takes a gigabyte), converts, indexes and follows attributes. None of it is a
    plain name, so a caller that allows plain names alone rejects it. ValueError where it is no template, or one too
    long or too repetitive to be filled with texts from outside.
    """
    if len(template) > MAX_TEXT_CHARS:
        raise ValueError(f"it has {len(template):,} characters; expected at most {MAX_TEXT_CHARS:,}")
    parts = string.Formatter().parse(template)
    names = [f"{name}{kind or ''}{form or ''}" for _, name, form, kind in parts if name is not None]
    for name in set(names):
        if names.count(name) > MAX_FIELD_USES:
            raise ValueError(f"it names {name!r} {names.count(name)} times; expected at most {MAX_FIELD_USES}")
    return names
