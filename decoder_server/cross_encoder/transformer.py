"""Loads a transformers model so that nothing in it is random and nothing is said twice. Does not know profiles."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from checkpoint.errors import CheckpointError


def load_config(directory: Path, *, trust_remote_code: bool) -> Any:
    """The configuration object of config.json.

    Raises:
        CheckpointError: none that the installed transformers reads.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as exc:  # strict config classes and remote code raise several unrelated types
        raise CheckpointError(
            f"{directory / 'config.json'}: cannot be read as a configuration ({one_line(exc)})"
        ) from exc


def load_transformer(
    directory: Path, config: Any, dtype: torch.dtype, device: torch.device, *, headless: bool, trust_remote_code: bool
) -> Any:
    """The base model (`headless`), or the one with its sequence-classification head, in evaluation mode.

    Raises:
        CheckpointError: weights missing (transformers would draw them at random), of another shape, or unreadable.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    kind = AutoModel if headless else AutoModelForSequenceClassification
    try:
        with quiet():
            model, info = kind.from_pretrained(
                directory,
                config=config,
                dtype=dtype,  # else transformers keeps the stored one, which may be float16
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except Exception as exc:  # shapes, files, remote code: unrelated types, one meaning
        raise CheckpointError(f"{directory}: the model cannot be loaded ({one_line(exc)})") from exc
    missing = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise CheckpointError(
            f"{directory}: {len(missing)} weights of {type(model).__name__} are not in the checkpoint "
            f"and would be random: {shown}"
        )
    return cast(Any, model).to(device).eval()


def keep_heads_in_float32(model: Any) -> None:
    """Everything but the base model computes in float32: its input is a vector per pair, its output is the score."""

    def widen(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)

    for name, child in model.named_children():
        if name != model.base_model_prefix:
            child.float()
            child.register_forward_pre_hook(widen)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers draws bars and logs a table of missing weights: the caller says both in its own way."""
    from transformers.utils import logging as said

    talk: Any = said  # its bar functions are untyped
    level, bar = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity(logging.CRITICAL)
    talk.disable_progress_bar()
    try:
        yield
    finally:
        talk.set_verbosity(level)
        if bar:
            talk.enable_progress_bar()


def one_line(exc: Exception) -> str:
    """The first line of a message that may be pages long."""
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0][:300]}" if lines else type(exc).__name__
