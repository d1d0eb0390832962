"""A checkpoint directory as training sees it: T5Gemma2 weights, tokenizer, and preread.json.

Without preread.json the templates of KaLM-Reranker-V1 apply. Control-token text in a training file becomes the real
control token: training files are trusted input.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import T5Gemma2ForConditionalGeneration

from training.instructions import DEFAULT

KALM_PROMPT = (
    "<bos><start_of_turn>user\nJudge whether the Document meets the requirements"
    " based on the Query and the Instruct provided."
    ' Note that the answer can only be "yes" or "no".\n\n<Instruct>: {instruction}\n<Query>: {query}<end_of_turn>\n'
    "<start_of_turn>model\n\n\n\n"
)


@dataclass(frozen=True)
class Settings:
    """The fields of preread.json; the defaults are KaLM's."""

    format_version: int = 1
    passage_template: str = "<Document>: {passage}"
    prompt_template: str = KALM_PROMPT
    yes_token: str = "yes"
    no_token: str = "no"
    default_instruction: str = "Given a query, retrieve documents that answer the query."
    default_compression_ratio: int = 4
    max_passage_tokens: int = 1024
    max_query_tokens: int = 512


MINI = Settings(
    passage_template="{passage}",
    prompt_template="[CLS] {instruction} [SEP] {query} [SEP]",
    default_instruction=DEFAULT,
    max_passage_tokens=256,
    max_query_tokens=64,
)


@dataclass
class Checkpoint:
    model: Any  # T5Gemma2ForConditionalGeneration; its module tree is typed too loosely to follow
    tokenizer: Tokenizer
    settings: Settings

    @property
    def answers(self) -> tuple[int, int]:
        """Ids of the yes and the no token; ValueError where either is not one token."""
        ids = []
        for name in (self.settings.yes_token, self.settings.no_token):
            encoded = self.tokenizer.encode(name, add_special_tokens=False).ids
            if len(encoded) != 1:
                raise ValueError(f"answer token {name!r} is {len(encoded)} tokens, expected one")
            ids.append(encoded[0])
        return ids[0], ids[1]

    def passage_ids(self, passages: list[str]) -> list[list[int]]:
        """Token ids, cut right at max_passage_tokens."""
        ids: list[list[int]] = []
        for start in range(0, len(passages), 1024):
            texts = [
                self.settings.passage_template.replace("{passage}", passage)
                for passage in passages[start : start + 1024]
            ]
            ids += [
                e.ids[: self.settings.max_passage_tokens]
                for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)
            ]
        return ids

    def prompt_ids(self, queries: list[str], instructions: list[str]) -> list[list[int]]:
        """Token ids of rendered prompts; an empty instruction means the default one."""
        texts = []
        for query, instruction in zip(queries, instructions, strict=True):
            ids = self.tokenizer.encode(query, add_special_tokens=False).ids
            if len(ids) > self.settings.max_query_tokens:
                query = self.tokenizer.decode(ids[: self.settings.max_query_tokens])
            before, after = self.settings.prompt_template.split("{query}")
            fill = instruction or self.settings.default_instruction
            texts.append(before.replace("{instruction}", fill) + query + after.replace("{instruction}", fill))
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint in fp32. FileNotFoundError and ValueError name what is missing or wrong."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder}: no {name}, expected a T5Gemma2 checkpoint directory")
    settings = Settings()
    if (folder / "preread.json").exists():
        settings = Settings(**json.loads((folder / "preread.json").read_text(encoding="utf-8")))
    model = T5Gemma2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return Checkpoint(model, Tokenizer.from_file(str(folder / "tokenizer.json")), settings)


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write bf16 weights (the tied embedding once), config.json, tokenizer files and preread.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = set(checkpoint.model.all_tied_weights_keys)
    weights = {
        k: v.detach().to("cpu", torch.bfloat16).contiguous()
        for k, v in checkpoint.model.state_dict().items()
        if k not in tied
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config: Any = checkpoint.model.config
    config.architectures = [type(checkpoint.model).__name__]
    for part in (config.decoder, config.encoder, config.encoder.text_config, config.encoder.vision_config):
        part.dtype = None  # a part's own dtype would win over the one asked for at load
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    known = {k: v for k, v in names.items() if checkpoint.tokenizer.token_to_id(v) is not None}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.settings.max_passage_tokens,
        **known,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")
    (folder / "preread.json").write_text(
        json.dumps(asdict(checkpoint.settings), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
