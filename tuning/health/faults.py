"""The plain model, and known ways to serve a model wrongly, with the scores they give.

The plain model is transformers' classes in float32, one unpadded pair a pass; with the serving path it shares only the
readers of files. A pattern in the numbers suggests a fault; doing the same to the plain model and getting the served
numbers proves it. Whether there is a fault is for tolerances to decide.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoder_server.models.backend import sigmoid
from decoder_server.models.cross_encoder.files import load_transformer, quiet
from decoder_server.models.cross_encoder.profiles import Profile
from decoder_server.models.cross_encoder.templates import PairReader, TextPair
from tuning.health.checks import BATCH, SWAP, saturation, spread_ratio
from tuning.health.report import Section
from tuning.health.scorers import Margins, TextTriple
from tuning.metrics import kendall_tau
from tuning.progress import Advance, ignore


class PlainModel:
    """A checkpoint's own weights, computed plainly. Not for listwise models, whose score is not a pair's."""

    def __init__(self, directory: Path, profile: Profile, device: str = "cpu", trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        kind = "AutoModelForCausalLM" if profile.head == "vocabulary" else "AutoModelForSequenceClassification"
        options: Any = {"trust_remote_code": trust_remote_code}
        open_tokenizer: Any = AutoTokenizer.from_pretrained
        self.model: Any = load_transformer(directory, torch.float32, torch.device(device), kind=kind, **options)
        with quiet():
            loaded = open_tokenizer(directory, local_files_only=True, **options)
        self.profile = profile
        self.tokenizer = loaded.backend_tokenizer
        self.pad_id = self.model.config.pad_token_id or loaded.pad_token_id or 0
        self._device = device
        self._typed = "token_type_ids" in loaded.model_input_names
        self._answers = profile.read_answers(self.tokenizer, directory) if profile.head == "vocabulary" else ()

    def margins(
        self, pairs: Sequence[TextTriple], advance: Advance = ignore, profile: Profile | None = None
    ) -> Margins:
        """Margins (len(pairs),), by this model's profile, or by another that has another template."""
        margins = np.empty(len(pairs), dtype=np.float32)
        for row, pair in enumerate(PairReader(self.tokenizer, profile or self.profile).read(pairs)):
            margins[row] = self.margin(self.inputs(pair))
            advance(1)
        return margins

    def inputs(self, pair: TextPair) -> dict[str, Tensor]:
        """One row: no padding, so no side to get wrong."""
        ids = torch.tensor([pair.ids], device=self._device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self._typed and pair.type_ids is not None:
            inputs["token_type_ids"] = torch.tensor([pair.type_ids], device=self._device)
        return inputs

    @torch.inference_mode()
    def margin(self, inputs: dict[str, Tensor]) -> float:
        """Of one row, read from its (num_labels,) logits, or from (vocab,) of the last token."""
        logits: Tensor = self.model(**inputs).logits[0]
        logits = logits[-1] if logits.ndim == 2 else logits
        if self._answers:
            yes, *no = self._answers
            return float(logits[yes] - logits[no[0]] if no else logits[yes])
        return float(logits[0] if len(logits) == 1 else logits[1] - logits[0])


_SOFTMAX_OVER_HIDDEN = (
    "softmax over the hidden vector, as when a runtime finds no head and takes the hidden size for labels; load one"
)
_DOUBLE_SIGMOID = (
    "double sigmoid: one of scores that were probabilities already, so all lie between sigmoid(0) = 0.50 and "
    "sigmoid(1) = 0.73; make the runtime return logits, or the activation identity"
)
_SIGMOID_FOR_LOGIT = "sigmoid where the logit is expected, which the runtime applies itself: make it return logits"
_MISSING_TEMPLATE = (
    "missing template: the model reads bare texts, not the prompt it was trained with; use its profile's template"
)
_WRONG_PADDING = (
    "wrong padding side or a missing attention mask: pairs score right alone and wrong batched with longer ones; "
    "encoders that read their first token need padding on the right, decoders that read their last need it on the left"
)
_DROPPED_POOLER = (
    "dropped pooler: the head is applied without the dense layer and tanh before it; convert again with the pooler"
)
_QUERY_CUT = (
    "the query is cut off: the passage stands first and truncation takes the prompt's end; cut the passage instead"
)
_LOST_SPREAD = "the order is kept, the spread is not: usually another template, none, or an activation in the runtime"
_NOT_FINITE = "some scores are not finite: float16 overflows most of these models; use bfloat16 or float32"
NONE_FINITE = (
    "the scores are not finite, not one of them: weights that are NaN or infinite, or a number format that overflows; "
    "compare the weights with the published ones, and use bfloat16 or float32"
)
_CONSTANT = "every pair has the same score: the head does not see the texts"
UNPUBLISHED = "these are not the published weights, or not the published template: a plain pass gives other scores, too"
UNKNOWN = "no known fault gives these numbers: compare weights, template and readout with the published ones"

# A fault proves itself where it gives the served margins but for rounding (root mean square, in its spreads),
# and gives them better than the right way does.
_PROOF_SPREADS = 0.1
_PROOF_GAIN = 0.5
_SAME_ORDER = 0.95


@dataclass(frozen=True)
class Evidence:
    """Everything known once a line failed."""

    pairs: Sequence[TextTriple]
    margins: Margins  # as served
    scores: Margins  # as published from them
    reference: Margins | None  # of the plain model
    alone: Section  # about the model alone
    compare_failed: bool
    alone_agrees: bool | None = None  # whether unpadded passes give the reference's margins

    def causes(self, plain: PlainModel | None) -> list[str]:
        """Likely causes in words, the surest first; where there is a plain model, faults are tried out on it."""
        good = np.isfinite(self.margins) & np.isfinite(self.scores)
        if not good.any():
            return [NONE_FINITE]
        causes = [_QUERY_CUT] if self.alone.failed_in(SWAP) else []
        if not good.all():
            return [_NOT_FINITE, *causes]
        first = self._first(plain)
        return [first, *causes] if first else causes or [UNKNOWN]

    def _first(self, plain: PlainModel | None) -> str | None:
        marks = (saturation(self.margins), saturation(self.scores))
        # Marks that no other fault leaves.
        if np.ptp(self.margins) == 0:
            return _CONSTANT
        if "tiny" in marks:
            return _SOFTMAX_OVER_HIDDEN
        if self.alone.failed_in(BATCH) and self.alone_agrees is not False:
            return _WRONG_PADDING
        reference = self.reference if self.compare_failed else None
        if reference is not None and not np.isfinite(reference).all():  # proves nothing
            reference = None
        if reference is not None and plain is not None:
            apart = _rms(self.margins - reference)
            for words, margins in _attempts(plain, self.pairs, reference):
                spread, off = float(margins.std()), _rms(self.margins - margins)
                if spread > 0 and off <= _PROOF_SPREADS * spread and off <= _PROOF_GAIN * apart:
                    return _DOUBLE_SIGMOID if words is _SIGMOID_FOR_LOGIT and marks[1] == "doubled" else words
        # Marks that several faults leave: the likeliest of them.
        if "doubled" in marks:
            return _DOUBLE_SIGMOID
        if reference is None:
            return None
        kept = kendall_tau(self.margins, reference) >= _SAME_ORDER
        return _LOST_SPREAD if kept and not 0.8 <= spread_ratio(self.margins, reference) <= 1.25 else None


def _rms(values: Margins) -> float:
    return float(np.sqrt(np.square(values.astype(np.float64)).mean()))


def _attempts(plain: PlainModel, pairs: Sequence[TextTriple], reference: Margins) -> Iterator[tuple[str, Margins]]:
    """Each fault, in words, with the margins that the plain model gives when it is made to commit it."""
    yield _SIGMOID_FOR_LOGIT, sigmoid(reference)
    read = PairReader(plain.tokenizer, plain.profile).read(pairs)
    token = -1 if plain.profile.head in ("score", "vocabulary") else 0  # whose hidden state the head reads
    with torch.inference_mode():
        hidden = [plain.model.base_model(**plain.inputs(pair)).last_hidden_state[0, token] for pair in read]
    for index in (0, 1):  # the first label's share, or the second's as of two labels
        shares = [float(row.float().softmax(-1)[index]) for row in hidden]
        yield _SOFTMAX_OVER_HIDDEN, np.array(shares, dtype=np.float32)
    if (hook := _without_pooler(plain.model)) is not None:
        with hook:  # removes it at the end
            margins = plain.margins(pairs)
        yield _DROPPED_POOLER, margins
    # The texts alone, in the ways that runtimes join them; of a model that has no template, without its pair.
    bare = dataclasses.replace(plain.profile, instruction_format="", default_instruction="")
    joined = [("{query} {passage}",), ("{passage} {query}",), ("{query}\n{passage}",)]
    for template in ([()] if plain.profile.template else []) + joined:
        yield _MISSING_TEMPLATE, plain.margins(pairs, profile=dataclasses.replace(bare, template=template))
    # Every pair padded to the longest on the other side, without a mask or position for it.
    longest = max(len(pair.ids) for pair in read)
    padded, pad, fill = [], torch.nn.functional.pad, {"input_ids": plain.pad_id}
    for pair in read:
        extra = longest - len(pair.ids)
        sides = (extra, 0) if plain.profile.padding == "right" else (0, extra)
        inputs = plain.inputs(pair).items()
        padded.append(plain.margin({name: pad(value, sides, value=fill.get(name, 0)) for name, value in inputs}))
    yield _WRONG_PADDING, np.array(padded, dtype=np.float32)


def _without_pooler(model: Any) -> Any:
    """A hook that skips dense and activation between first token and last layer until it is removed; None: has none."""
    # (batch, tokens, hidden) -> (batch, hidden), of BERT or of DeBERTa
    pooler: Any = getattr(model.base_model, "pooler", None) or getattr(model, "pooler", None)
    classifier: Any = getattr(model, "classifier", None)
    if pooler is not None:
        return pooler.register_forward_hook(lambda _, inputs, __: inputs[0][:, 0])
    if hasattr(classifier, "dense") and hasattr(classifier, "out_proj"):  # RoBERTa
        return classifier.register_forward_hook(lambda head, inputs, _: head.out_proj(inputs[0][:, 0]))
    if getattr(model, "head", None) is not None and classifier is not None:  # ModernBERT
        return model.head.register_forward_hook(lambda _, inputs, __: inputs[0])
    return None
