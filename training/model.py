"""The model in training's hands: a checkpoint directory, margins with gradients, and the loss on them.

A T5Gemma2 checkpoint is its weights, a tokenizer and preread.json; without preread.json the templates of
KaLM-Reranker-V1 apply. Control-token text in a training file becomes the real control token: training files are trusted
input.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from torch.nn.functional import pad as pad_right
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Gemma2ForConditionalGeneration

from checkpoint.settings import FILE_NAME, FORMAT_VERSION, CheckpointSettings
from checkpoint.text import single_token
from training.collections import DEFAULT

_PROMPT = "[CLS] {instruction} [SEP] {query} [SEP]"
MINI = CheckpointSettings(
    "{passage}", _PROMPT, default_instruction=DEFAULT, max_passage_tokens=256, max_query_tokens=64
)


def _pad(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask, int64. -> (batch, num_tokens) twice"""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).long()
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return ids.to(device), mask.to(device)


def _by_length(rows: list[list[int]], size: int) -> tuple[list[list[int]], torch.Tensor]:
    """Indices of rows in chunks of `size` of like length, and those that put what follows them back in order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[start : start + size] for start in range(0, len(order), size)], torch.argsort(torch.tensor(order))


def mean_pool(states: torch.Tensor, mask: torch.Tensor, ratio: int) -> tuple[torch.Tensor, torch.Tensor]:
    """MEP: the mean over the valid tokens of every group of `ratio`, aligned at token 0.

    (batch, num_tokens, dim), (batch, num_tokens) -> (batch, num_states, dim), (batch, num_states);
    a group with no valid token is masked out.
    """
    batch, num_tokens, dim = states.shape
    states, mask = pad_right(states, (0, 0, 0, -num_tokens % ratio)), pad_right(mask, (0, -num_tokens % ratio))
    count = mask.view(batch, -1, ratio).sum(2)  # (batch, num_states)
    total = (states * mask[..., None].to(states.dtype)).view(batch, -1, ratio, dim).sum(2)
    return total / count.clamp(min=1)[..., None].to(states.dtype), (count > 0).long()


@dataclass
class TrainableCheckpoint:
    model: Any  # T5Gemma2ForConditionalGeneration; its module tree is typed too loosely to follow
    tokenizer: Tokenizer
    settings: CheckpointSettings

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Self:
        """Read a checkpoint in fp32; the device `auto` is a GPU where there is one. Raises FileNotFoundError where a
        file is missing, ValueError where one has a wrong value."""
        for name in ("config.json", "tokenizer.json"):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder}: no {name}, expected a T5Gemma2 checkpoint directory")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = T5Gemma2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(model.to(device), tokenizer, CheckpointSettings.load(folder))

    @cached_property
    def answers(self) -> tuple[int, int]:
        """Ids of the yes and the no token; ValueError where either is not one token."""
        texts = self.settings.yes_token, self.settings.no_token
        yes, no = (single_token(self.tokenizer, text, "answer token") for text in texts)
        return yes, no

    def passage_ids(self, passages: list[str]) -> list[list[int]]:
        """Token ids, cut right at max_passage_tokens."""
        ids: list[list[int]] = []
        for start in range(0, len(passages), 1024):  # encodings are many times larger than ids
            texts = [self.settings.passage_template.format(passage=text) for text in passages[start : start + 1024]]
            encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            ids += [one.ids[: self.settings.max_passage_tokens] for one in encoded]
        return ids

    def prompt_ids(self, queries: list[str], instructions: list[str]) -> list[list[int]]:
        """Token ids of rendered prompts; an empty instruction means the default one."""
        settings, texts = self.settings, list[str]()
        for query, instruction in zip(queries, instructions, strict=True):
            ids = self.tokenizer.encode(query, add_special_tokens=False).ids
            if len(ids) > settings.max_query_tokens:
                query = self.tokenizer.decode(ids[: settings.max_query_tokens])
            fill = instruction or settings.default_instruction
            texts.append(settings.prompt_template.format(instruction=fill, query=query))
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def encode(self, rows: list[list[int]], chunk: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
        """Token states after the final norm, and their mask; passages of like length are encoded together.

        -> (num_passages, num_tokens, dim), (num_passages, num_tokens)
        """
        ids, mask = _pad(rows, self.model.device)
        chunks, back = _by_length(rows, chunk)
        states = []
        for part in chunks:
            width = len(rows[part[-1]])
            read = self.model.model.encoder.text_model(input_ids=ids[part, :width], attention_mask=mask[part, :width])
            states.append(pad_right(read.last_hidden_state, (0, 0, 0, ids.shape[1] - width)))
        return torch.cat(states)[back.to(ids.device)], mask

    def margins(self, prompts: list[list[int]], states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Yes-logit minus no-logit at the last token of prompts[i], which reads states[i]. -> (batch,) float32"""
        ids, prompt_mask = _pad(prompts, self.model.device)
        given = {"input_ids": ids, "attention_mask": prompt_mask, "encoder_hidden_states": states}
        hidden = self.model.model.decoder(**given, encoder_attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(prompts), device=hidden.device), prompt_mask.sum(1) - 1]  # (batch, dim)
        embedding, (yes, no) = self.model.model.encoder.text_model.embed_tokens.weight, self.answers
        margin: torch.Tensor = last @ (embedding[yes] - embedding[no]).to(last.dtype)
        return margin.float()

    def pair_margins(
        self, prompts: list[list[int]], rows: torch.Tensor, states: torch.Tensor, mask: torch.Tensor, chunk: int = 56
    ) -> torch.Tensor:
        """Margins of pairs (prompts[i], passage rows[i]); states (num_passages, num_states, dim) -> (num_pairs,)

        Pairs are scored in chunks of like prompt length: padding every prompt to the longest costs half as much again.
        """
        chunks, back = _by_length(prompts, chunk)
        margins = []
        for part in chunks:
            which = rows[torch.tensor(part, device=rows.device)]
            longest = int(mask[which].sum(1).max())
            margins.append(self.margins([prompts[i] for i in part], states[which, :longest], mask[which, :longest]))
        return torch.cat(margins)[back.to(rows.device)]

    def save(self, folder: Path) -> None:
        """Write bf16 weights (the tied embedding once), config.json, tokenizer files and preread.json."""
        folder.mkdir(parents=True, exist_ok=True)
        state, tied = self.model.state_dict(), set(self.model.all_tied_weights_keys)
        weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in state.items() if k not in tied}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config: Any = self.model.config
        config.architectures = [type(self.model).__name__]
        for part in (config.decoder, config.encoder, config.encoder.text_config, config.encoder.vision_config):
            part.dtype = None  # a part's own dtype would win over the one requested at load
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
        self.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        limit = self.settings.max_passage_tokens
        tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": limit}
        special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
        tokenizer_config |= {k: v for k, v in special.items() if self.tokenizer.token_to_id(v) is not None}
        settings = {"format_version": FORMAT_VERSION} | asdict(self.settings)
        for name, values in (("tokenizer_config.json", tokenizer_config), (FILE_NAME, settings)):
            (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def group_loss(
    margins: torch.Tensor, valid: torch.Tensor, teacher: torch.Tensor, distil: float, temperature: float, binary: float
) -> torch.Tensor:
    """Softmax over each query's candidates + distil * KL from the teacher + binary * yes/no cross-entropy.

    margins, valid, teacher: (num_queries, K), candidate 0 relevant. The KL compares the candidates the teacher scored,
    its softmax taken at `temperature`. The binary term ties margins to P(yes) across queries.
    """
    relevant = torch.zeros(len(margins), dtype=torch.long, device=margins.device)
    loss = functional.cross_entropy(margins.masked_fill(~valid, -1e4), relevant)
    if binary:
        target = functional.one_hot(relevant, margins.shape[1]).to(margins.dtype)
        loss = loss + binary * functional.binary_cross_entropy_with_logits(margins[valid], target[valid])
    known = valid & ~teacher.isnan()
    rows = known.sum(1) > 1
    if distil and bool(rows.any()):
        student = margins.masked_fill(~known, -1e4)[rows].log_softmax(1)
        wanted = (teacher.nan_to_num() / temperature).masked_fill(~known, -1e4)[rows].log_softmax(1)
        terms = functional.kl_div(student, wanted, log_target=True, reduction="none").masked_fill(~known[rows], 0)
        loss = loss + distil * terms.sum(1).mean()
    return loss
