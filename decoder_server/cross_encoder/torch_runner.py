"""One padded pass of a transformers model in torch. Does not know texts or batching policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from checkpoint.compute import dtype_name
from decoder_server.cross_encoder.batching import pad
from decoder_server.cross_encoder.heads import RowHead
from decoder_server.cross_encoder.profiles import Padding
from decoder_server.cross_encoder.texts import TextPair


class ClassifierRunner:
    """An encoder with the classification head it was trained with."""

    def __init__(
        self, model: Any, device: torch.device, dtype: torch.dtype, *, side: Padding, pad_id: int, typed: bool
    ) -> None:
        self.dtype_name, self.device_name = dtype_name(dtype), str(device)
        self._model, self._device = model, device
        self._side, self._pad_id, self._typed = side, pad_id, typed

    @torch.inference_mode()
    def margins(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        batch = pad([p.ids for p in pairs], [p.type_ids for p in pairs], side=self._side, pad_id=self._pad_id)
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if self._typed:
            inputs["token_type_ids"] = batch.type_ids
        logits = self._model(**{k: torch.from_numpy(v).to(self._device) for k, v in inputs.items()}).logits.float()
        margins = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]  # (batch,)
        result: NDArray[np.float32] = margins.cpu().numpy()
        return result


class LastTokenRunner:
    """A decoder whose last token is read out through a row or two."""

    def __init__(self, model: Any, head: RowHead, device: torch.device, dtype: torch.dtype, *, pad_id: int) -> None:
        self.dtype_name, self.device_name = dtype_name(dtype), str(device)
        self._model, self._device = model, device
        self._head = RowHead(head.rows.to(device), head.softcap)
        self._pad_id = pad_id

    @torch.inference_mode()
    def margins(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        # Left padding with a mask and positions: the last column is every row's last token, whatever pads them.
        batch = pad([p.ids for p in pairs], [None] * len(pairs), side="left", pad_id=self._pad_id)
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
        tensors = {k: torch.from_numpy(v).to(self._device) for k, v in inputs.items()}
        hidden = self._model(**tensors, use_cache=False).last_hidden_state[:, -1]  # (batch, hidden)
        result: NDArray[np.float32] = self._head(hidden).cpu().numpy()
        return result
