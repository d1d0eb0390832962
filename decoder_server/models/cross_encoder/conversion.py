"""A causal language model that answers in one column of its vocabulary, rewritten as a classifier with one score.
A source whose classifier would have a meaningless score is rejected before its weights are read; those are read a
tensor at a time and written in shards. Neither model runs here: tuning.health.parity does that.
"""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from checkpoint.files import CheckpointError, read_json, resolve
from checkpoint.model import HEAD
from decoder_server.models.cross_encoder.files import CheckpointFiles
from decoder_server.models.cross_encoder.profiles import FILE_NAME as PROFILE_FILE
from decoder_server.models.cross_encoder.profiles import Profile, builtin_profiles

TARGETS = {f"{family}ForCausalLM": f"{family}ForSequenceClassification" for family in ("Qwen3", "Mistral")}
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
    files: CheckpointFiles  # under the language model's recipe
    architecture: str
    target: str  # the classifier's architecture
    head: str  # the tensor whose first row becomes the score
    pad_token: str
    pad_token_id: int

    @classmethod
    def open(cls, name: str) -> Self:
        """A directory or hub id."""
        path = resolve(name)
        config = read_json(path / "config.json")
        found = [str(item) for item in config.get("architectures") or []]
        if any(one in TARGETS.values() for one in found):
            raise CheckpointError(f"{name}: is a {found[0]} already; serve it as it is")
        if len(found) != 1 or found[0] not in TARGETS:
            expected, given = " or ".join(TARGETS), " ".join(found) or "none"
            raise CheckpointError(f"{name}: config.json names the architecture {given}; expected {expected}")
        # A checkpoint of no known name goes by ctxl's recipe for its architecture.
        usual = (row for row in builtin_profiles().values() if "ctxl" in row.model and row.head == "vocabulary")
        profile = Profile.named(name, directory=path) or next(row for row in usual if found[0] in row.architectures)
        if profile.head != "vocabulary" or profile.yes != COLUMN or profile.no is not None:
            raise CheckpointError(
                f"{name}: its profile {profile.model!r} reads more than column {COLUMN} of the vocabulary; "
                "expected a ctxl reranker, whose relevance is that one column"
            )
        files = CheckpointFiles.open(path, config, profile, trust_remote_code=False)
        return cls(name, files, found[0], TARGETS[found[0]], _head(name, files), *_pad(name, files))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of the result's tensors by name, in the source's order."""
        sizes = {SCORE: 8 * int(self.files.raw["hidden_size"])}
        for name, weight in self.files.tensors.weights.items():
            if name != HEAD:
                item = _ITEM_BYTES["F32"] if weight.scale else _ITEM_BYTES.get(weight.values.dtype, 8)
                sizes[name] = math.prod(weight.shape) * item
        return sizes

    @property
    def tied(self) -> bool:
        return self.head == EMBEDDING

    def convert(self, folder: Path, advance: Callable[[int], None] = lambda num: None) -> None:
        """Fills `folder` with the converted checkpoint: weights, configuration, tokenizer, profile, licence.
        `advance` is called with the number of tensors written since the last call.
        """
        how: dict[str, Any] = {"filename_pattern": "model{suffix}.safetensors", "max_shard_size": SHARD_BYTES}
        split = split_state_dict_into_shards_factory(self.sizes, get_storage_size=lambda num_bytes: num_bytes, **how)
        num_bytes, free = split.metadata["total_size"], shutil.disk_usage(folder).free
        if free < num_bytes:
            raise CheckpointError(f"{folder.parent}: {free:,} bytes are free; the result takes {num_bytes:,}")
        for file, names in split.filename_to_tensors.items():
            save_file(dict(self._read(names, advance)), folder / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(folder / "model.safetensors.index.json", index)
        _write_json(folder / "config.json", self._config())
        source = self.files.directory
        for name in (name for name in _TOKENIZER_FILES if (source / name).exists()):
            shutil.copyfile(source / name, folder / name)
        path = folder / "tokenizer_config.json"
        _write_json(path, read_json(path, optional=True) | {"pad_token": self.pad_token, "padding_side": "left"})
        (folder / PROFILE_FILE).write_text(self._profile_row(), encoding="utf-8")
        for path in (path for pattern in _PAPERS for path in source.glob(pattern)):
            # The card describes the language model: next to the weights, but not as their own.
            shutil.copyfile(path, folder / (f"SOURCE-{path.name}" if path.name == "README.md" else path.name))

    def _read(self, names: list[str], advance: Callable[[int], None]) -> Iterator[tuple[str, torch.Tensor]]:
        """One after the other; quantized ones become float32, which holds the product with their scales."""
        for name in names:
            weight = self.files.tensors.weights[self.head if name == SCORE else name]
            if name == SCORE:
                row = weight.rows(COLUMN, COLUMN + 1)  # (1, hidden)
                if not row.isfinite().all() or not row.any():
                    told = f"row {COLUMN} of {self.head} is zero or not finite: no score"
                    raise CheckpointError(f"{weight.values.path}: {told}")
                yield name, row.clone()
            else:
                yield name, self.files.tensors.read(name) if weight.scale else weight.rows()
            advance(1)

    def _config(self) -> dict[str, Any]:
        # The result holds plain numbers.
        stale = {"quantization_config", "compression_config", "torch_dtype"} if self.files.tensors.quantized else set()
        kept = {key: value for key, value in self.files.raw.items() if key not in stale | {"auto_map"}}
        return kept | {
            "architectures": [self.target],
            "num_labels": 1,
            "id2label": {"0": LABEL},
            "label2id": {LABEL: 0},
            "pad_token_id": self.pad_token_id,
            "tie_word_embeddings": False,  # no output embedding is left to tie
            # One label makes sentence-transformers take a sigmoid unless told otherwise; the score is the logit.
            "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
            **({"dtype": "float32"} if stale else {}),
        }

    def _profile_row(self) -> str:
        kept = ("template", "instruction_format", "add_special_tokens", "strip", "max_tokens", "license")
        note, model = f"row {COLUMN} of {self.head} of {self.name}", f"{self.name.rstrip('/')} (as a classifier)"
        rows: dict[str, object] = {"models": [model], "architectures": [self.target], "head": "score", "note": note}
        rows |= {key: getattr(self.files.profile, key) for key in kept} | {"padding": "left"}
        # JSON's strings, numbers, booleans and lists are TOML's too.
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in rows.items()]
        return "# This checkpoint's recipe; written by `preread convert-ctxl`.\n[[profile]]\n" + "\n".join(lines) + "\n"


def _pad(name: str, files: CheckpointFiles) -> tuple[str, int]:
    """The padding token: the tokenizer's own, or the configuration's, or the end of a sequence.
    A classifier finds its readout by looking for the last token that is not padding, so configuration and tokenizer
    must agree, and no prompt may end in the padding token.
    """
    candidates = (files.loaded.pad_token_id, files.raw.get("pad_token_id"), files.loaded.eos_token_id)
    pad = next((int(id_) for id_ in candidates if id_ is not None), None)
    if pad is None:
        raise CheckpointError(f"{name}: neither tokenizer nor config.json has a pad or eos token; padding needs one")
    token = str(files.loaded.convert_ids_to_tokens(pad))
    if files.reader.read([("q", "", "p")])[0].ids[-1] == pad:
        told = f"prompts end in the padding token {token!r}; a classifier would read the token before it"
        raise CheckpointError(f"{name}: {told}")
    return token, pad


def _head(name: str, files: CheckpointFiles) -> str:
    tensors, config = files.tensors, files.raw
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
    Leftovers of a killed process are removed by the next one. Raises CheckpointError where `target` is taken, cannot be
    written, or is being written by another process.
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
            for path in (*folder.iterdir(), folder):
                _sync(path)
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
