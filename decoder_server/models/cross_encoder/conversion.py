"""A causal language model that answers in one column of its vocabulary, rewritten as a classifier with one score.

    source = CausalSource.open("ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b")
    with staged(Path("ctxl-1b")) as folder:
        source.convert(folder)

The classifier computes 1 row of the output embedding where the language model computes all of them. A source whose
classifier would have a meaningless score is rejected before its weights are read; weights are read a tensor at a time
and written in shards of at most SHARD_BYTES. Neither model runs here: tuning.health.parity compares them.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from checkpoint.files import CheckpointError, read_json, resolve
from checkpoint.tensors import StoredTensors
from decoder_server.models.cross_encoder.files import load_config
from decoder_server.models.cross_encoder.profiles import FILE_NAME as PROFILE_FILE
from decoder_server.models.cross_encoder.profiles import Profile, builtin_profiles, named_profile

TARGETS = {
    "Qwen3ForCausalLM": "Qwen3ForSequenceClassification",
    "MistralForCausalLM": "MistralForSequenceClassification",
}
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
EMBEDDING = "model.embed_tokens.weight"
SCORE = "score.weight"
LABEL = "SCORE"
COLUMN = 0  # of the vocabulary: the answer that ctxl models were trained to give there
SHARD_BYTES = 1 << 30
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# The source's licence, notices that it wants passed on, and its card, which names the licence.
_PAPERS = ("LICENSE*", "LICENCE*", "NOTICE*", "README.md")


@dataclass(frozen=True)
class CausalSource:
    """A checked causal language model."""

    name: str
    path: Path
    config: dict[str, Any]
    profile: Profile  # the language model's recipe
    tensors: StoredTensors
    head: str  # the tensor whose first row becomes the score
    pad_token: str
    pad_token_id: int

    @classmethod
    def open(cls, name: str) -> CausalSource:
        """A directory or hub id."""
        path = resolve(name)
        config = read_json(path / "config.json")
        found = [str(item) for item in config.get("architectures") or []]
        if any(one in TARGETS.values() for one in found):
            raise CheckpointError(f"{name}: is a {found[0]} already; serve it as it is")
        if len(found) != 1 or found[0] not in TARGETS:
            given = " ".join(found) or "none"
            raise CheckpointError(
                f"{name}: config.json names the architecture {given}; expected {' or '.join(TARGETS)}"
            )
        # A checkpoint of no known name goes by ctxl's recipe for its architecture.
        usual = (row for row in builtin_profiles().values() if "ctxl" in row.model and row.head == "vocabulary")
        profile = named_profile(name, directory=path) or next(row for row in usual if found[0] in row.architectures)
        if profile.head != "vocabulary" or profile.yes != COLUMN or profile.no is not None:
            raise CheckpointError(
                f"{name}: its profile {profile.model!r} reads more than column {COLUMN} of the vocabulary; "
                "expected a ctxl reranker, whose relevance is that one column"
            )
        load_config(path, profile)
        pad_token, pad_token_id = _pad(name, path, config, profile)
        tensors = StoredTensors(path)
        return cls(name, path, config, profile, tensors, _head(name, config, tensors), pad_token, pad_token_id)

    @property
    def target(self) -> str:
        """The class that the converted checkpoint is of."""
        return TARGETS[self.config["architectures"][0]]

    @property
    def num_tensors(self) -> int:
        """Of the result."""
        return len(self._sizes())

    @property
    def tied(self) -> bool:
        """Whether the head is the token embedding itself."""
        return self.head == EMBEDDING

    def convert(self, folder: Path, advance: Callable[[int], None] = lambda num: None) -> None:
        """Fills `folder` with the converted checkpoint: weights, configuration, tokenizer, profile, licence.

        Args:
            advance: called with the number of tensors written since the last call.
        """
        split = split_state_dict_into_shards_factory(
            self._sizes(),
            get_storage_size=lambda num_bytes: num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=SHARD_BYTES,
        )
        num_bytes, free = split.metadata["total_size"], shutil.disk_usage(folder).free
        if free < num_bytes:
            raise CheckpointError(f"{folder.parent}: {free:,} bytes are free; the result takes {num_bytes:,}")
        for file, names in split.filename_to_tensors.items():
            save_file(dict(self._read(names, advance)), folder / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(folder / "model.safetensors.index.json", index)
        _write_json(folder / "config.json", self._config())
        for name in _TOKENIZER_FILES:
            if (self.path / name).exists():
                shutil.copyfile(self.path / name, folder / name)
        path = folder / "tokenizer_config.json"
        _write_json(path, read_json(path, optional=True) | {"pad_token": self.pad_token, "padding_side": "left"})
        (folder / PROFILE_FILE).write_text(self._profile_row(), encoding="utf-8")
        for path in (path for pattern in _PAPERS for path in self.path.glob(pattern)):
            # The card describes the language model: next to the weights, but not as their own.
            shutil.copyfile(path, folder / (f"SOURCE-{path.name}" if path.name == "README.md" else path.name))

    def _sizes(self) -> dict[str, int]:
        """Bytes of the result's tensors by name, in the source's order."""
        sizes = {SCORE: 8 * int(self.config["hidden_size"])}
        for name, weight in self.tensors.weights.items():
            if name != HEAD:
                item = _ITEM_BYTES["F32"] if weight.quantized else _ITEM_BYTES.get(weight.values.dtype, 8)
                sizes[name] = math.prod(weight.shape) * item
        return sizes

    def _read(self, names: list[str], advance: Callable[[int], None]) -> Iterator[tuple[str, torch.Tensor]]:
        """One after the other; quantized ones become float32, which holds the product with their scales."""
        for name in names:
            weight = self.tensors.weights[self.head if name == SCORE else name]
            if name == SCORE:
                row = weight.rows(COLUMN, COLUMN + 1)  # (1, hidden)
                if not row.isfinite().all() or not row.any():
                    raise CheckpointError(
                        f"{weight.values.path}: row {COLUMN} of {self.head} is zero or not finite: no score"
                    )
                yield name, row.clone()
            elif weight.quantized:
                yield name, self.tensors.read(name)
            else:
                yield name, weight.all_rows()
            advance(1)

    def _config(self) -> dict[str, Any]:
        config = self.config | {
            "architectures": [self.target],
            "num_labels": 1,
            "id2label": {"0": LABEL},
            "label2id": {LABEL: 0},
            "pad_token_id": self.pad_token_id,
            "tie_word_embeddings": False,  # no output embedding is left to tie
            # One label makes sentence-transformers take a sigmoid unless told otherwise; the score is the logit.
            "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
        }
        config.pop("auto_map", None)
        if self.tensors.quantized:  # the result holds plain numbers
            for key in ("quantization_config", "compression_config", "torch_dtype"):
                config.pop(key, None)
            config["dtype"] = "float32"
        return config

    def _profile_row(self) -> str:
        """The recipe that the result carries: the source's template and limits with the new head."""
        kept = ("template", "instruction_format", "add_special_tokens", "strip")
        rows: dict[str, object] = {
            "models": [f"{self.name.rstrip('/')} (as a classifier)"],
            "architectures": [self.target],
            "head": "score",
            **{key: getattr(self.profile, key) for key in kept},
            "padding": "left",
            "max_tokens": self.profile.max_tokens,
            "license": self.profile.license,
            "note": f"row {COLUMN} of {self.head} of {self.name}",
        }
        # JSON's strings, numbers, booleans and lists are TOML's too.
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in rows.items()]
        return "# This checkpoint's recipe; written by `preread convert-ctxl`.\n[[profile]]\n" + "\n".join(lines) + "\n"


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
    candidates = (tokenizer.pad_token_id, config.get("pad_token_id"), tokenizer.eos_token_id)
    pad = next((id_ for id_ in candidates if id_ is not None), None)
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
    for tensor in sorted(tensors.weights):
        if not tensor.startswith("model.") and tensor not in (HEAD, HEAD_BIAS):
            raise CheckpointError(f"{name}: tensor {tensor} is none of a {config['architectures'][0]}")
    tensors.check_formats()
    if HEAD_BIAS in tensors:
        raise CheckpointError(f"{name}: {HEAD_BIAS} is there; a classifier's score has no bias to put it into")
    head = HEAD if HEAD in tensors else EMBEDDING
    if head not in tensors:
        raise CheckpointError(f"{name}: neither {HEAD} nor {EMBEDDING} is there; expected the output embedding")
    if head == EMBEDDING and not config.get("tie_word_embeddings"):
        # transformers would fill the missing head with random numbers and only log it.
        raise CheckpointError(f"{name}: {HEAD} is missing and config.json does not tie it to the embedding")
    tensors.check({head: (config.get("vocab_size", 0), config.get("hidden_size", 0))})
    return head


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty folder next to `target`, which becomes `target` when the block ends well, and else is removed.

    Leftovers of a killed process are removed by the next one; two at a time are an error.

    Raises:
        CheckpointError: `target` is taken, cannot be written, or is being written by another process.
    """
    target = Path(os.path.abspath(target))
    folder = target.parent / f".{target.name}.converting"
    busy = CheckpointError(f"{target}: another process is converting into it")
    _check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise CheckpointError(f"{target}: cannot be written ({exc.strerror})") from exc
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise busy from exc
        # Between our mkdir and our lock the other may have finished: then what is locked is its result.
        if not folder.exists() or folder.stat().st_ino != os.fstat(lock).st_ino:
            raise busy
        try:
            for path in folder.iterdir():
                path.unlink()
            yield folder
            for path in folder.iterdir():
                _sync(path)
            _sync(folder)
            _check_free(target)
            folder.rename(target)  # over an empty folder too
            _sync(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _check_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists and is not empty; expected a new directory")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
