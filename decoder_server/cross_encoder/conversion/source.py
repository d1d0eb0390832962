"""What is to be converted: one causal language model, looked at without reading its weights.

Refuses here, in a second, what would otherwise give a classifier with a meaningless score. Does not write.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from checkpoint.errors import CheckpointError
from checkpoint.files import read_json, resolve
from checkpoint.tensors import StoredTensors, is_buffer
from decoder_server.cross_encoder.choosing import named_profile, own_profile
from decoder_server.cross_encoder.declared import check_declared
from decoder_server.cross_encoder.profiles import Profile, builtin_profiles
from decoder_server.cross_encoder.transformer import load_config

TARGETS = {
    "Qwen3ForCausalLM": "Qwen3ForSequenceClassification",
    "MistralForCausalLM": "MistralForSequenceClassification",
}
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
EMBEDDING = "model.embed_tokens.weight"
COLUMN = 0  # of the vocabulary: the answer that ctxl models were trained to give there


@dataclass(frozen=True)
class CausalSource:
    """A checked causal language model."""

    name: str
    path: Path
    config: dict[str, Any]
    profile: Profile  # how the language model is asked
    tensors: StoredTensors
    head: str  # the tensor whose first row becomes the score
    pad_token: str
    pad_token_id: int

    @classmethod
    def open(cls, name: str) -> CausalSource:
        """A directory or hub id.

        Raises:
            CheckpointError: a model that this conversion is not for, or files that are missing.
        """
        path = resolve(name)
        config = read_json(path / "config.json")
        _check_config(name, config)
        profile = named_profile(name, None) or own_profile(path) or _usual_profile(config["architectures"][0])
        if profile.head != "vocabulary" or profile.yes != COLUMN or profile.no is not None:
            raise CheckpointError(
                f"{name}: its profile {profile.model!r} reads more than column {COLUMN} of the vocabulary; "
                "expected a ctxl reranker, whose relevance is that one column"
            )
        check_declared(path, config, load_config(path, trust_remote_code=False), profile)
        pad_token, pad_token_id = _pad(name, path, config, profile)
        tensors = StoredTensors(path)
        return cls(name, path, config, profile, tensors, _head(name, config, tensors), pad_token, pad_token_id)

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    @property
    def target(self) -> str:
        """The class that the converted checkpoint is of."""
        return TARGETS[self.architecture]

    @property
    def num_tensors(self) -> int:
        """Of the result."""
        return len(self.tensors.weights.keys() - {HEAD}) + 1

    @property
    def tied(self) -> bool:
        """Whether the head is the token embedding itself."""
        return self.head == EMBEDDING


def _check_config(name: str, config: dict[str, Any]) -> None:
    found = [str(item) for item in config.get("architectures") or []]
    if any(one in TARGETS.values() for one in found):
        raise CheckpointError(f"{name}: is a {found[0]} already; serve it as it is")
    if len(found) != 1 or found[0] not in TARGETS:
        raise CheckpointError(
            f"{name}: config.json names the architecture {' '.join(found) or 'none'}; expected {' or '.join(TARGETS)}"
        )


def _usual_profile(architecture: str) -> Profile:
    """A checkpoint of no known name: ctxl's recipe for its architecture."""
    return next(
        profile
        for profile in builtin_profiles().values()
        if "ctxl" in profile.model and profile.head == "vocabulary" and architecture in profile.architectures
    )


def _pad(name: str, path: Path, config: dict[str, Any], profile: Profile) -> tuple[str, int]:
    """The padding token: the tokenizer's own, or the configuration's, or the end of a sequence.

    A classifier finds its readout by looking for the last token that is not padding, so configuration and
    tokenizer must agree, and no prompt may end in the padding token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = cast(Any, AutoTokenizer).from_pretrained(path)
    except Exception as exc:  # transformers raises many unrelated types where files are missing or broken
        raise CheckpointError(f"{name}: its tokenizer cannot be loaded ({str(exc).splitlines()[0]})") from exc
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = config.get("pad_token_id")
    if pad is None:
        pad = tokenizer.eos_token_id
    if pad is None:
        raise CheckpointError(f"{name}: neither tokenizer nor config.json has a pad or eos token; padding needs one")
    fields = {"query": "q", "instruction": "", "passage": "p"}
    prompt = "".join(piece.format(**fields) for piece in profile.template)
    if tokenizer(prompt, add_special_tokens=profile.add_special_tokens).input_ids[-1] == pad:
        raise CheckpointError(
            f"{name}: prompts end in the padding token {tokenizer.convert_ids_to_tokens(pad)!r}; "
            "a classifier would read the token before it"
        )
    return str(tokenizer.convert_ids_to_tokens(int(pad))), int(pad)


def _head(name: str, config: dict[str, Any], tensors: StoredTensors) -> str:
    """The tensor that the language model multiplies for its logits."""
    for tensor in tensors.names():
        if not tensor.startswith("model.") and tensor not in (HEAD, HEAD_BIAS):
            raise CheckpointError(f"{name}: tensor {tensor} is none of a {config['architectures'][0]}")
        if not is_buffer(tensor):
            tensors.check_format(tensor)
    if HEAD_BIAS in tensors:
        raise CheckpointError(f"{name}: {HEAD_BIAS} is there; a classifier's score has no bias to put it into")
    head = HEAD if HEAD in tensors else EMBEDDING
    if head not in tensors:
        raise CheckpointError(f"{name}: neither {HEAD} nor {EMBEDDING} is there; expected the output embedding")
    if head == EMBEDDING and not config.get("tie_word_embeddings"):
        # transformers would fill the missing head with random numbers and only log it.
        raise CheckpointError(f"{name}: {HEAD} is missing and config.json does not tie it to the embedding")
    shape = (config.get("vocab_size"), config.get("hidden_size"))
    if tensors.weights[head].shape != shape:
        raise CheckpointError(f"{name}: {head} has the shape {tensors.weights[head].shape}; config.json says {shape}")
    return head
