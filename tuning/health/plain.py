"""The plain way: transformers' own classes in float32, one unpadded pair a pass, the published readout written out.

Shares no code with what serves, but for the reading of the files: the tokenizer with its templates, and tensors, which
are all in the model or refused. Those say what is read, not how. Faults are computed here too, by doing the wrong thing
on purpose. Does not judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from checkpoint.tensors import StoredTensors
from decoder_server.cross_encoder.heads import answer_ids
from decoder_server.cross_encoder.profiles import Profile
from decoder_server.cross_encoder.texts import PairReader, TextPair
from decoder_server.cross_encoder.transformer import load_config, load_transformer, quiet
from tuning.health.compare import Margins
from tuning.health.pairs import TextTriple
from tuning.health.scorer import Advance, unheard


class PlainModel:
    """A checkpoint's own weights by the book. Not for listwise models, whose score is not a pair's."""

    def __init__(self, directory: Path, profile: Profile, device: str = "cpu", trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        kind = "AutoModelForCausalLM" if profile.head == "vocabulary" else "AutoModelForSequenceClassification"
        self.model: Any = load_transformer(
            StoredTensors(directory),
            load_config(directory, trust_remote_code=trust_remote_code),
            torch.float32,
            torch.device(device),
            kind=kind,
            trust_remote_code=trust_remote_code,
        )
        with quiet():
            loaded: Any = cast(Any, AutoTokenizer).from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
        self.profile = profile
        self.tokenizer = loaded.backend_tokenizer
        self.pad_id = self.model.config.pad_token_id or loaded.pad_token_id or 0
        self._device = device
        self._typed = "token_type_ids" in loaded.model_input_names
        self._answers = answer_ids(directory, self.tokenizer, profile) if profile.head == "vocabulary" else ()

    def read(self, pairs: Sequence[TextTriple], profile: Profile | None = None) -> list[TextPair]:
        """Token ids, by this model's profile or another one's template."""
        return PairReader(self.tokenizer, profile or self.profile).pairs([pair.fields() for pair in pairs])

    def margins(self, pairs: Sequence[TextPair], advance: Advance = unheard) -> Margins:
        """Margins (len(pairs),)."""
        found = []
        for pair in pairs:
            found.append(float(self.readout(self.forward(self.inputs(pair)))))
            advance(1)
        return np.array(found, dtype=np.float32)

    def inputs(self, pair: TextPair) -> dict[str, Tensor]:
        """One row: no padding, so no side to get wrong."""
        ids = torch.tensor([pair.ids], device=self._device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self._typed and pair.type_ids is not None:
            inputs["token_type_ids"] = torch.tensor([pair.type_ids], device=self._device)
        return inputs

    @torch.inference_mode()
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits of the row: (num_labels,), or (vocab,) at the last token."""
        logits: Tensor = self.model(**inputs).logits[0]
        return logits[-1] if logits.ndim == 2 else logits

    def readout(self, logits: Tensor) -> Tensor:
        """The margin of (num_labels,) or (vocab,) logits."""
        if self._answers:
            yes, *no = self._answers
            return logits[yes] - logits[no[0]] if no else logits[yes]
        return logits[0] if len(logits) == 1 else logits[1] - logits[0]

    @torch.inference_mode()
    def last_hidden(self, pair: TextPair) -> Tensor:
        """The hidden state that the head reads, (hidden,): the last token's of a decoder, else the first one's."""
        states = self.model.base_model(**self.inputs(pair)).last_hidden_state[0]  # (tokens, hidden)
        return cast(Tensor, states[-1] if self.profile.head in ("score", "vocabulary") else states[0])
