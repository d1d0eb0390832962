"""Loads a transformers model so that nothing in it is random and nothing is said twice. Does not know profiles.

A cross-encoder's files, opened and checked against each other, before any large tensor is read.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer

from checkpoint.files import CheckpointError
from checkpoint.tensors import StoredTensors, is_buffer, refuse_unused
from decoder_server.models.cross_encoder.profiles import Profile, check_declared
from decoder_server.models.cross_encoder.templates import PairReader

# Heads that a checkpoint keeps from its training and a score is not read from; and, where no class has one, the pooler
# that they stood on. A tensor of these names that the model does use is never left over.
_OTHER_HEADS = re.compile(
    r"(?:(?:cls\.(?:predictions|seq_relationship)|lm_head|lm_predictions|mask_predictions|decoder)\.(?:\w+\.)*|"
    r"(?:\w+\.)?pooler\.dense\.)(?:weight|bias|gamma|beta)$"
)


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
    tensors: StoredTensors,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kind: str,
    beside: Collection[str] = (),
    trust_remote_code: bool = False,
) -> Any:
    """A model of transformers in evaluation mode, with every stored tensor in it or accounted for.

    Args:
        kind: name of the auto class.
        beside: tensors that somebody else reads, or that the readout has no use for.

    Raises:
        CheckpointError: weights missing (transformers would draw them at random), of another shape, unreadable, or
            stored and not used by the model (transformers would leave them out).
    """
    import transformers

    directory = tensors.directory
    for name in tensors.names():
        if not is_buffer(name):
            tensors.check_format(name)
    try:
        with quiet():
            model, info = _from_pretrained(
                getattr(transformers, kind),
                tensors,
                config,
                ignore_mismatched_sizes=True,  # refused below, by name
                dtype=dtype,  # else transformers keeps the stored one, which may be float16
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except KeyError as exc:  # of a table of transformers', such as that of the activation functions
        raise CheckpointError(f"{directory / 'config.json'}: names {exc}, which transformers does not have") from exc
    except Exception as exc:  # files, remote code: unrelated types, one meaning
        raise CheckpointError(f"{directory}: the model cannot be loaded ({one_line(exc)})") from exc
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise CheckpointError(f"{directory}: {name} has the shape {tuple(found)}; config.json says {tuple(wanted)}")
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise CheckpointError(
            f"{directory}: {len(missing)} weights of {type(model).__name__} are not in the checkpoint "
            f"and would be random: {shown}"
        )
    left = {name for name in info["unexpected_keys"] if name not in beside and not is_buffer(name)}
    if kind == "AutoModelForSequenceClassification":
        left = {name for name in left if not _OTHER_HEADS.match(name)}
    refuse_unused(directory, left)
    return cast(Any, model).to(device).eval()


def _from_pretrained(kind: Any, tensors: StoredTensors, config: Any, *, dtype: torch.dtype, **how: Any) -> Any:
    """transformers' own loading, or of plain numbers where the stored ones are quantized.

    transformers reads one of the two layouts, and only with a further package.
    """
    if not tensors.quantization:
        return kind.from_pretrained(
            tensors.directory, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, **how
        )
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        exact = type(kind.from_config(plain, trust_remote_code=how.pop("trust_remote_code")))
    state = {name: tensors.read(name, dtype) for name in tensors.names()}
    return exact.from_pretrained(None, config=plain, dtype=dtype, state_dict=state, **how)


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
    """The beginning of a message that may be pages long."""
    text = " ".join(str(exc).split())[:300]
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spm.model",
    "tokenizer.model",
    "tekken.json",
)


@dataclass(frozen=True, slots=True)
class Source:
    """What every runtime loads from."""

    directory: Path
    profile: Profile
    config: Any  # transformers' configuration object
    raw: dict[str, Any]  # config.json as it stands
    tokenizer: Tokenizer
    reader: PairReader
    tensors: StoredTensors
    pad_id: int
    typed: bool  # whether the model reads segment ids
    trust_remote_code: bool

    @classmethod
    def open(cls, directory: Path, raw: dict[str, Any], profile: Profile, *, trust_remote_code: bool) -> Source:
        """
        Raises:
            CheckpointError: a tokenizer, configuration or weights file that is missing, broken or of another model.
        """
        config = load_config(directory, trust_remote_code=trust_remote_code)
        check_declared(directory, raw, config, profile)
        tokenizer, pad_id, names = _load_tokenizer(directory, raw, trust_remote_code)
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        if size > config.vocab_size:
            raise CheckpointError(
                f"{directory}: the tokenizer has {size} tokens; the embedding has {config.vocab_size} rows"
            )
        typed = int(raw.get("type_vocab_size") or 0) > 1 and "token_type_ids" in names
        return cls(
            directory,
            profile,
            config,
            raw,
            tokenizer,
            PairReader(tokenizer, profile),
            StoredTensors(directory),
            pad_id,
            typed,
            trust_remote_code,
        )

    def fingerprint(self) -> str:
        """sha256 over weights, tokenizer, configuration and profile: a second or two per gigabyte."""
        rest = json.dumps([self.raw, dataclasses.asdict(self.profile)], sort_keys=True)
        return hashlib.sha256("\n".join([self.tensors.digest(), self.tokenizer.to_str(), rest]).encode()).hexdigest()


def _load_tokenizer(directory: Path, raw: dict[str, Any], trust_remote_code: bool) -> tuple[Tokenizer, int, list[str]]:
    """The tokenizer, the id that pads, and the names of a model's inputs."""
    from transformers import AutoTokenizer

    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        # Given none of these, transformers makes a tokenizer that reads every text as nothing.
        raise CheckpointError(f"{directory}: no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}")
    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
        tokenizer: Tokenizer = loaded.backend_tokenizer
    except Exception as exc:  # a missing file, a broken one and an unknown class raise unrelated types
        lines = str(exc).strip().splitlines() or [""]
        raise CheckpointError(f"{directory}: no tokenizer that can be read ({lines[0][:300]})") from exc
    if len(tokenizer.encode("a query and a passage", add_special_tokens=False).ids) == 0:
        raise CheckpointError(f"{directory}: the tokenizer reads every text as nothing; its files are not all there")
    # Encoders that count positions from the pad id want the configuration's; elsewhere padding is masked.
    candidates = (raw.get("pad_token_id"), loaded.pad_token_id, loaded.eos_token_id, 0)
    pad_id = next(id_ for id_ in candidates if isinstance(id_, int) and id_ >= 0)
    return tokenizer, pad_id, list(loaded.model_input_names)
