"""The models of a command: `--model DIR|HUB_ID`, or `--model [NAME=]CHECKPOINT[,KEY=VALUE...]`, repeated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from decoder_server.config import SHIPPED_MODEL, ModelConfig
from preread_cli import flags
from preread_cli.flags import option
from preread_edge.settings import LoadConfig

if TYPE_CHECKING:
    from encoder_worker.passage_encoder import PassageEncoder

_KEYS = {one.name: one for one in ModelConfig.knobs() if one.name != "name" and not one.is_secret}
_SHOWN_KEYS = ", ".join(name.replace("_", "-") for name in _KEYS)
# A name clients may send in a path or a header; anything else before "=" belongs to the checkpoint's own path.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9._:-]+)?")


def _shipped_model() -> str:
    if not (SHIPPED_MODEL / "config.json").exists():
        raise click.UsageError("Name a model, a directory or a hub id; none came with this installation.")
    return str(SHIPPED_MODEL)


def _or_shipped(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    return value or ("" if ctx.resilient_parsing else _shipped_model())


# Both are always a string when the command runs.
model_argument = click.argument("model", metavar="[DIR|HUB_ID]", required=False, callback=_or_shipped)
model_option = option(
    "--model",
    metavar="DIR|HUB_ID",
    callback=_or_shipped,
    help="Checkpoint: a directory or a Hugging Face id, such as KaLM-Embedding/KaLM-Reranker-V1-Nano. "
    "Without it, the small one that comes with preread.",
)
models_option = option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]DIR|HUB_ID[,KEY=VALUE]",
    help="A model to serve; may be repeated, the first is the default. DIR or HUB_ID is a T5Gemma 2 reranker, "
    f"which scores stored states, or a cross-encoder, which reads text. KEY: {_SHOWN_KEYS}. Without it, the small one "
    "that comes with preread.",
)
# How a model computes, without its passage limit, which is a stored collection's.
_COMPUTE = flags.knob_options(LoadConfig, only=["device", "dtype", "read_control_tokens"])
compute_options = flags.options_of(_COMPUTE, flags.threads)


def load_encoder(options: Mapping[str, Any], **limits: Any) -> PassageEncoder:
    """The encoder of --model, loaded on the thread that will compute."""
    import torch

    from checkpoint.compute import tune_process
    from encoder_worker.passage_encoder import PassageEncoder

    tune_process(options["threads"], one_heap=True)
    torch.set_flush_denormal(True)  # a setting of the thread
    names = ("device", "dtype", "read_control_tokens", "max_passage_tokens", "max_batch_tokens")
    return PassageEncoder.load(options["model"], **{name: options[name] for name in names if name in options} | limits)


def parse_models(options: Mapping[str, Any], **common: Any) -> tuple[ModelConfig, ...]:
    """Every model of the command line; settings that it does not name come from the other options, or are `common`.

    Raises click.UsageError: no model, or one that cannot be read.
    """
    # Names and encoders are not common: the first model gets the flag's.
    shared = {flag: value for flag, value in options.items() if flag not in ("served_model_name", "encoder_address")}
    models = []
    for spec in options["models"] or [_shipped_model()]:
        try:
            fields = {"encoder_api_key": "", **common, **_fields(spec)}
            models.append(flags.from_options(ModelConfig, shared, **fields))
        except (ValueError, click.UsageError) as exc:
            raise click.UsageError(f"--model {spec}: {exc}") from exc
    if options.get("served_model_name"):
        models[0] = replace(models[0], name=options["served_model_name"])
    return tuple(models)


def _fields(spec: str) -> dict[str, Any]:
    checkpoint, *pairs = spec.split(",")
    name, equals, rest = checkpoint.partition("=")
    named = equals and _NAME.fullmatch(name)
    fields: dict[str, Any] = {"name": name, "checkpoint": rest} if named else {"checkpoint": checkpoint}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        one = _KEYS.get(key.strip().replace("-", "_"))
        if not equals or one is None:
            raise ValueError(f"{pair!r} is not KEY=VALUE with KEY one of {_SHOWN_KEYS}")
        if (one.kind == "int" and not value.isdecimal()) or (one.kind == "bool" and value not in ("yes", "no")):
            raise ValueError(f"{key} is {value!r}; expected {'a number' if one.kind == 'int' else 'yes or no'}")
        fields[one.name] = int(value) if one.kind == "int" else value == "yes" if one.kind == "bool" else value
    return fields
