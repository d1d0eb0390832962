"""`--model [NAME=]CHECKPOINT[,KEY=VALUE...]`, repeated: which models a server has. Knows no model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from preread_cli.options import option, shipped_model

if TYPE_CHECKING:
    from decoder_server.config import ModelConfig

F = TypeVar("F", bound=Callable[..., Any])

KEYS = (
    "backend", "device", "dtype", "max_passage_tokens", "read_control_tokens", "runtime", "profile", "encoder_address",
    "trust_remote_code",
)  # fmt: skip
# A name clients may send in a path or a header; anything else before "=" belongs to the checkpoint's own path.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9._:-]+)?")


def models_option(function: F) -> F:
    """--model, as often as there are models."""
    return option(
        "--model",
        "models",
        multiple=True,
        metavar="[NAME=]DIR|HUB_ID[,KEY=VALUE]",
        envvar="PREREAD_MODEL",
        help="A model to serve; repeated, several, the first being the default. DIR or HUB_ID is a T5Gemma 2 reranker, "
        "read from cached states, or a cross-encoder, which reads text. KEY: "
        + ", ".join(key.replace("_", "-") for key in KEYS)
        + ". Without it, the small one that comes with preread.",
    )(function)


def parse_models(options: Mapping[str, Any], **common: Any) -> tuple[ModelConfig, ...]:
    """Every model of the command line; what a model does not say itself it takes from the common options.

    Args:
        common: fields of ModelConfig that a model cannot say itself.

    Raises:
        click.UsageError: no model at all, or one that cannot be read.
    """
    specs: Sequence[str] = options["models"] or [shipped_model() or ""]
    if not specs[0]:
        raise click.UsageError("Name a model: --model with a directory or a hub id; none came with this installation.")
    models = [_parse(spec, options, common) for spec in specs]
    if options["served_model_name"]:
        models[0] = replace(models[0], name=options["served_model_name"])
    return tuple(models)


def _parse(spec: str, options: Mapping[str, Any], common: Mapping[str, Any]) -> ModelConfig:
    from decoder_server.config import ModelConfig

    fields: dict[str, Any] = {
        name: options[name] for name in ("device", "dtype", "max_passage_tokens", "read_control_tokens")
    }
    checkpoint, *pairs = spec.split(",")
    for pair in pairs:
        key, equals, value = pair.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or name not in KEYS:
            known = ", ".join(key.replace("_", "-") for key in KEYS)
            raise click.UsageError(f"--model {spec}: {pair!r} is not KEY=VALUE with KEY one of {known}")
        fields[name] = _read(spec, key, value, name)
    name, equals, rest = checkpoint.partition("=")
    if equals and _NAME.fullmatch(name):
        fields["name"], checkpoint = name, rest
    try:
        return ModelConfig(checkpoint, **fields, **common)
    except ValueError as exc:
        raise click.UsageError(f"--model {spec}: {exc}") from exc


def _read(spec: str, key: str, value: str, name: str) -> object:
    if name == "max_passage_tokens":
        if not value.isdecimal():
            raise click.UsageError(f"--model {spec}: {key} is {value!r}; expected a number")
        return int(value)
    if name in ("trust_remote_code", "read_control_tokens"):
        if value not in ("yes", "no"):
            raise click.UsageError(f"--model {spec}: {key} is {value!r}; expected yes or no")
        return value == "yes"
    return value
