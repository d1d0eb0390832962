"""A checkpoint in torch: the transformers model, and the head that turns its last hidden state into a margin.
A decoder's head is one or two rows of weights, in float32: the whole vocabulary is never multiplied.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from checkpoint.compute import dtype_name
from checkpoint.files import CheckpointError
from checkpoint.text import single_token
from decoder_server.models.cross_encoder.backend import pad
from decoder_server.models.cross_encoder.files import PROJECTOR, CheckpointFiles
from decoder_server.models.cross_encoder.templates import TextPair, TextPrompt

_cosine = partial(torch.nn.functional.cosine_similarity, dim=-1)  # (rows, dim) and (dim,) -> (rows,)
Head = Callable[[torch.Tensor], torch.Tensor]  # (batch, hidden or labels) -> margins (batch,), in float32


class TorchRunner:
    """One padded pass of an encoder with its own head, or of a decoder whose last token is read out."""

    def __init__(self, source: CheckpointFiles, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype_name, self.device_name = dtype_name(dtype), str(device)
        self._head = read_head(source, device)
        self.body = Body(source, device, dtype)
        if source.profile.head == "classifier":
            _keep_heads_in_float32(self.body.model)
        self._device, self._side, self._pad_id = device, source.profile.padding, source.pad_id

    @torch.inference_mode()
    def margins(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        # Left padding with a mask and positions: the last column is every row's last token, whatever pads them.
        batch = pad([p.ids for p in pairs], [p.type_ids for p in pairs], side=self._side, pad_id=self._pad_id)
        inputs = [torch.from_numpy(batch[name]).to(self._device) for name in self.body.names]
        return self._head(self.body(*inputs)).cpu().numpy()


class ListwiseRunner:
    """A decoder with a projector over its marker tokens: all passages of a query in one sequence.
    A passage's margin is the cosine of its marker and the query's, so it depends on the other passages; nothing here
    may be kept per pair. Longer lists are read in blocks, and the query's vector is the mean over blocks, weighted by
    the score of each block's best passage.
    """

    def __init__(self, source: CheckpointFiles, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype_name, self.device_name = dtype_name(dtype), str(device)
        self._reader, self._profile = source.reader, source.profile
        tokens = source.profile.passage_token, source.profile.query_token
        self._markers = [single_token(self._reader.tokenizers.exact, token, "the marker") for token in tokens]
        tensors, hidden = source.tensors, source.config.hidden_size
        tensors.refuse_missing(name for name in PROJECTOR if name not in tensors)
        self._projector = [tensors.read(name).to(device) for name in PROJECTOR]  # float32: (a, hidden), (b, a)
        first, second = (tuple(weight.shape) for weight in self._projector)
        if len(first) != 2 or len(second) != 2 or first[1] != hidden or second[1] != first[0]:
            raise CheckpointError(
                f"{source.directory}: {' and '.join(PROJECTOR)} have the shapes {first} and {second}; "
                f"expected (a, {hidden}) and (b, a)"
            )
        self._model, self._device = source.load(device, dtype), device

    @torch.inference_mode()
    def margins(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        """Cosines (len(pairs),): the pairs of one prompt make one list."""
        lists: dict[TextPrompt, list[int]] = {}
        for i, pair in enumerate(pairs):
            lists.setdefault(pair.prompt, []).append(i)
        margins = np.empty(len(pairs), dtype=np.float32)
        for indices in lists.values():
            blocks = [self._projected(block) for block in self._blocks([pairs[i] for i in indices])]
            weights = torch.stack([((1 + _cosine(block[:-1], block[-1])) / 2).max() for block in blocks])
            query = (torch.stack([block[-1] for block in blocks]) * weights[:, None]).sum(0) / weights.sum()
            margins[indices] = _cosine(torch.cat([block[:-1] for block in blocks]), query).cpu().numpy()
        return margins

    def _projected(self, pairs: Sequence[TextPair]) -> torch.Tensor:
        """Projected hidden states of the passages' markers and then the query's, (len(pairs) + 1, dim)."""
        ids = torch.tensor(self._reader.list_ids(pairs), device=self._device)
        hidden = self._model(input_ids=ids[None], use_cache=False).last_hidden_state[0]  # (length, hidden)
        passage, query = self._markers
        marked = hidden[torch.cat([(ids == passage).nonzero()[:, 0], (ids == query).nonzero()[:, 0]])].float()
        first, second = self._projector
        return torch.relu(marked @ first.T) @ second.T

    def _blocks(self, pairs: Sequence[TextPair]) -> Iterator[list[TextPair]]:
        """Consecutive passages that fit one sequence, as the reference splits them."""
        profile = self._profile
        most = profile.max_passage_tokens or profile.max_tokens
        room = start = profile.max_tokens - 2 * pairs[0].prompt.num_query_tokens  # the query stands in it twice
        block: list[TextPair] = []
        for pair in pairs:
            block.append(pair)
            room -= self._reader.count(pair.passage)
            if len(block) == profile.max_list_passages or room <= most:
                yield block
                block, room = [], start
        if block:
            yield block


class Body(torch.nn.Module):
    """Padded inputs, in the order of `names`, to a classifier's logits or a decoder's last hidden state."""

    def __init__(self, source: CheckpointFiles, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._last = source.profile.head in ("score", "vocabulary")
        typed = ["token_type_ids"] if source.typed else []
        self.names = ["input_ids", "attention_mask", *(["position_ids"] if self._last else typed)]
        self.model = source.load(device, dtype)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """(batch, labels) or (batch, hidden)."""
        fields: Any = dict(zip(self.names, inputs, strict=True))
        if self._last:
            return cast(torch.Tensor, self.model(**fields, use_cache=False).last_hidden_state[:, -1])
        return cast(torch.Tensor, self.model(**fields).logits)


def _keep_heads_in_float32(model: Any) -> None:
    """Everything but the base model computes in float32: its input is a vector per pair, its output is the score."""

    def widen(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)

    for name, child in model.named_children():
        if name != model.base_model_prefix:
            child.float()
            child.register_forward_pre_hook(widen)


@dataclass(frozen=True, slots=True)
class _RowHead:
    """Margin of a hidden state: the first row's logit, minus the second's where there is one."""

    rows: torch.Tensor  # (1 or 2, hidden), float32
    softcap: float | None = None  # logits are capped at +-softcap, as Gemma 2 does

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden.float() @ self.rows.T  # (batch, 1 or 2)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 0] - logits[:, 1]


def _label_margin(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


def read_head(source: CheckpointFiles, device: torch.device | None = None) -> Head:
    """The readout of a model's last layer; for a decoder's last token its rows, read without the rest of the matrix."""
    if source.profile.head == "classifier":
        return _label_margin
    directory, config, tensors = source.directory, source.config, source.tensors
    if source.profile.head == "score":
        if "score.weight" not in tensors:
            told = "score.weight is not in the checkpoint and would be random; convert the original first"
            raise CheckpointError(f"{directory}: {told}")
        tensors.check({"score.weight": (1, config.hidden_size)})
        return _RowHead(tensors.rows("score.weight", [0]).to(device))
    rows = source.profile.read_answers(source.tokenizer, directory)
    for key in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise CheckpointError(f"{directory}: config.json scales its logits by {key}, a readout not known here")
    name, tied = "lm_head.weight", "model.embed_tokens.weight"
    # transformers prefers a stored head to a tied one, too.
    if name not in tensors and config.tie_word_embeddings and tied in tensors:
        name = tied
    tensors.check({name: (config.vocab_size, config.hidden_size)})
    return _RowHead(tensors.rows(name, rows).to(device), getattr(config, "final_logit_softcapping", None))
