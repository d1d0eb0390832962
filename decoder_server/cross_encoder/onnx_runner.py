"""One pass of an ONNX graph on the CPU. Does not know how the graph was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from decoder_server.cross_encoder.batching import pad
from decoder_server.cross_encoder.heads import RowHead
from decoder_server.cross_encoder.profiles import Padding
from decoder_server.cross_encoder.texts import TextPair


class OnnxRunner:
    """A session, and the head that stands outside of a decoder's graph."""

    device_name = "cpu"

    def __init__(
        self, path: Path, head: RowHead | None, *, side: Padding, pad_id: int, quantized: bool, num_threads: int
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.enable_mem_pattern = False  # plans memory for one shape, and every batch has its own
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = {each.name for each in self._session.get_inputs()}  # the exporter drops what is not read
        self._head, self._side, self._pad_id = head, side, pad_id
        self._quantized = quantized
        self.dtype_name = "int8" if quantized else "float32"

    def margins(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        # Dynamic int8 takes one scale over all activations of a pass: pairs of one pass would change each other's
        # scores, and padding would too. So each is alone; on a CPU that costs little.
        groups = [[pair] for pair in pairs] if self._quantized else [list(pairs)]
        return np.concatenate([self._pass(group) for group in groups])

    def _pass(self, pairs: Sequence[TextPair]) -> NDArray[np.float32]:
        batch = pad([p.ids for p in pairs], [p.type_ids for p in pairs], side=self._side, pad_id=self._pad_id)
        values = {
            "input_ids": batch.ids,
            "attention_mask": batch.mask,
            "position_ids": batch.positions,
            "token_type_ids": batch.type_ids,
        }
        (output,) = self._session.run(None, {name: values[name] for name in self._inputs})  # (batch, hidden or labels)
        if self._head is not None:
            margins: NDArray[np.float32] = self._head(torch.from_numpy(output)).numpy()
            return margins
        logits: NDArray[np.float32] = output
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
