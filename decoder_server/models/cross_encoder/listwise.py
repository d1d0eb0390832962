"""Listwise readout: all passages of a query in one sequence, each scored by the cosine of its marker and the query's.

A score depends on the other passages of its list; nothing here may be kept per pair. Longer lists are read in
blocks, and the query's vector is the mean over blocks, weighted by the score of each block's best passage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from checkpoint.compute import dtype_name
from checkpoint.files import CheckpointError
from decoder_server.models.cross_encoder.files import PROJECTOR, CheckpointFiles
from decoder_server.models.cross_encoder.templates import TextPair, TextPrompt


class ListwiseRunner:
    """A decoder with a projector over its marker tokens."""

    def __init__(self, source: CheckpointFiles, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype_name, self.device_name = dtype_name(dtype), str(device)
        self._reader, self._profile = source.reader, source.profile
        self._markers = [self._marker(token) for token in (source.profile.passage_token, source.profile.query_token)]
        # (hidden / 2, hidden), (dim, hidden / 2)
        self._projector = tuple(weight.to(device) for weight in _read_projector(source))
        self._model, self._device = source.load(device, dtype), device

    @torch.inference_mode()
    def margins(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        """Cosines (len(pairs),): the pairs of one prompt make one list."""
        lists: dict[TextPrompt, list[int]] = {}
        for i, pair in enumerate(pairs):
            lists.setdefault(pair.prompt, []).append(i)
        margins = np.empty(len(pairs), dtype=np.float32)
        for indices in lists.values():
            margins[indices] = self._one_list([pairs[i] for i in indices])
        return margins

    def _one_list(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        passages, queries, weights = [], [], []
        for block in self._blocks(pairs):
            projected = self._block(block)  # (passages + 1, dim), the query last
            passages.append(projected[:-1])
            queries.append(projected[-1])
            weights.append(((1 + _cosine(projected[:-1], projected[-1])) / 2).max())
        share = torch.stack(weights)
        query = (torch.stack(queries) * share[:, None]).sum(0) / share.sum()
        result: NDArray[np.float32] = _cosine(torch.cat(passages), query).cpu().numpy()
        return result

    def _block(self, pairs: Sequence[TextPair]) -> torch.Tensor:
        """Projected hidden states of the passages' markers and the query's, (len(pairs) + 1, dim)."""
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

    def _marker(self, token: str) -> int:
        ids = self._reader.tokenizers.exact.encode(token, add_special_tokens=False).ids
        if len(ids) != 1:
            raise CheckpointError(f"the tokenizer reads {token!r} as {len(ids)} tokens {ids}; expected exactly one")
        return int(ids[0])


def _read_projector(source: CheckpointFiles) -> tuple[torch.Tensor, torch.Tensor]:
    """The two layers of the projector, in float32."""
    directory, tensors, hidden = source.directory, source.tensors, source.config.hidden_size
    missing = [name for name in PROJECTOR if name not in tensors]
    if missing:
        raise CheckpointError(f"{directory}: {', '.join(missing)} is not in the checkpoint and would be random")
    first, second = (tensors.read(name) for name in PROJECTOR)
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != hidden or second.shape[1] != first.shape[0]:
        raise CheckpointError(
            f"{directory}: {' and '.join(PROJECTOR)} have the shapes {tuple(first.shape)} and {tuple(second.shape)}; "
            f"expected (a, {hidden}) and (b, a)"
        )
    return first, second


def _cosine(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """(rows, dim) and (dim,) -> (rows,)."""
    return torch.nn.functional.cosine_similarity(rows, vector[None], dim=-1)
