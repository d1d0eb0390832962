"""Odd checkpoints: a tensor or a configuration field is added or altered; transformers on the same files is the oracle.

The law: margins follow transformers' own with these files, or the model is refused and the error names the tensor or
field. "silent" counts what breaks it: other margins, or an added tensor or an unknown field that was passed over.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.synthetic import make_cross_encoder
from checkpoint import Checkpoint, CheckpointError
from checkpoint.synthetic import make_checkpoint
from decoder_server.models.cross_encoder.files import quiet
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair
from encoder_worker.encoder import Encoder

Margins = NDArray[np.float32]
Tensors = dict[str, torch.Tensor]
QUERY = "What is the capital of China?"
PASSAGES = ("The capital of China is Beijing.", "Gravity attracts bodies toward one another. " * 6)
TOLERANCE = 1e-3  # between two ways of computing the same float32 margin; faults move it by more
RATIO = 2
# Architecture -> profile that it is served by.
CROSS_ENCODERS = {
    "XLMRobertaForSequenceClassification": "generic",
    "BertForSequenceClassification": "generic",
    "ModernBertForSequenceClassification": "generic",
    "DebertaV2ForSequenceClassification": "generic",
    "Qwen3ForSequenceClassification": "sigridjineth/ctxl-rerank-v2-1b-seq-cls",
    "Qwen3ForCausalLM": "Qwen/Qwen3-Reranker-0.6B",
    "GemmaForCausalLM": "BAAI/bge-reranker-v2-gemma",
    "MistralForCausalLM": "ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b",
}
FBNL = "T5Gemma2ForConditionalGeneration"
# Fields that change the arithmetic of one family or another, with values that do.
FOREIGN: dict[str, list[Any]] = {
    "position_embedding_type": ["relative_key", "relative_key_query", "alibi"],
    "embedding_multiplier": [12.0],
    "residual_multiplier": [0.22],
    "attention_multiplier": [0.015],
    "logits_scaling": [8.0],
    "logit_scale": [0.0625],
    "lm_head_multiplier": [0.5],
    "attn_logit_softcapping": [50.0],
    "use_qk_norm": [True],
    "use_bidirectional_attention": [True],
    "parallel_attn": [True],
    "alibi": [True],
    "no_rope_layers": [[1]],
    "attention_chunk_size": [4],
    "scale_emb": [12],
    "query_key_norm": ["rms"],
    "mup_multiplier": [2.0],
    "num_experts": [4],
    "layer_norm_type": ["post"],
    "pooler_type": ["mean"],
    "quantization_config": [
        {"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"quant_method": "bitsandbytes"},
    ],
}  # fmt: skip
STRINGS = ("silu", "relu", "gelu", "gelu_pytorch_tanh", "mean", "cls", "full_attention", "none", "")


@dataclass(frozen=True)
class Change:
    """One fault: what it did, and the name that an error must say."""

    kind: str
    name: str
    unknown: bool  # nothing that this architecture has: passing it over is silent
    value: Any = None  # of a field


class Subject:
    """A checkpoint that both we and transformers can score."""

    def __init__(self, architecture: str, directory: Path) -> None:
        self.architecture, self.directory = architecture, directory
        if architecture == FBNL:
            make_checkpoint(directory)
        else:
            make_cross_encoder(directory, architecture)
        self.tensors: Tensors = load_file(directory / "model.safetensors")
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())

    def ours(self, directory: Path) -> Margins:
        """Raises CheckpointError where the model is refused."""
        if self.architecture == FBNL:
            return fbnl_margins(directory)
        profile = CROSS_ENCODERS[self.architecture]
        model = open_cross_encoder(directory, profile=profile, dtype="float32", device="cpu")
        return model.score_texts([(QUERY, None, passage) for passage in PASSAGES])

    def oracle(self, directory: Path) -> Margins:
        """transformers' own classes on these files; token ids are those of the untouched checkpoint."""
        with quiet():
            return oracle_fbnl(directory, self.directory) if self.architecture == FBNL else self._oracle(directory)

    def _oracle(self, directory: Path) -> Margins:
        import transformers

        causal = "CausalLM" in self.architecture
        kind: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
        model = kind.from_pretrained(directory, dtype=torch.float32).eval()
        source = open_cross_encoder(self.directory, profile=CROSS_ENCODERS[self.architecture], dtype="float32")
        tokenizer = source._reader.tokenizers.exact
        answers = source.profile.read_answers(tokenizer, self.directory) if causal else ()
        margins = []
        for passage in PASSAGES:
            (pair,) = source.read([(QUERY, None, passage)])
            inputs = {"input_ids": torch.tensor([pair.ids])}
            if pair.type_ids is not None and model.config.model_type == "bert":
                inputs["token_type_ids"] = torch.tensor([pair.type_ids])
            with torch.inference_mode():
                logits = model(**inputs).logits[0]
            if causal:
                read = logits[-1, list(answers)]
                margins.append(float(read[0] - read[1]) if len(read) == 2 else float(read[0]))
            else:
                margins.append(float(logits[0]))
        return np.array(margins, dtype=np.float32)


def fbnl_margins(directory: Path) -> Margins:
    checkpoint = Checkpoint.open(directory)
    encoder = Encoder(checkpoint, device="cpu", dtype="float32")
    backend = FbnlBackend(checkpoint, device="cpu", dtype="float32")
    states = encoder.encode([passage.ids for passage in checkpoint.text.passages(PASSAGES)], RATIO)
    return backend.score([StatePair(backend.prompt(QUERY), each) for each in states])


@torch.inference_mode()
def oracle_fbnl(directory: Path, untouched: Path) -> Margins:
    """The direct computation: whole model, a loop for pooling, one pair at a time."""
    from transformers import T5Gemma2ForConditionalGeneration

    model = T5Gemma2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    text = Checkpoint.open(untouched).text
    prompt = torch.tensor([text.prompt(QUERY).ids])
    margins = []
    for passage in text.passages(PASSAGES):
        states = model.get_encoder()(torch.tensor([passage.ids])).last_hidden_state[0]
        pooled = torch.stack([states[i : i + RATIO].mean(0) for i in range(0, len(states), RATIO)])[None]
        logits = model(
            decoder_input_ids=prompt,
            encoder_outputs=BaseModelOutput(last_hidden_state=pooled),
            attention_mask=torch.ones(pooled.shape[:2], dtype=torch.long),
        ).logits[0, -1]
        margins.append(float(logits[text.yes_id] - logits[text.no_id]))
    return np.array(margins, dtype=np.float32)


def add_tensor(tensors: Tensors, config: dict[str, Any], rng: random.Random) -> Change:
    """A tensor that the model has no use for: scales, packed weights, adapters, biases, layers, another head."""
    name = rng.choice([n for n in sorted(tensors) if n.endswith(".weight") and tensors[n].dim() == 2])
    module, rows = name.removesuffix(".weight"), tensors[name].shape[0]
    made = rng.choice([
        f"{module}.weight_scale", f"{module}.weight_scale_inv", f"{module}.weight_scale_2", f"{module}.input_scale",
        f"{module}.qweight", f"{module}.qzeros", f"{module}.scales", f"{module}.g_idx", f"{module}.weight_packed",
        f"{module}.weight.absmax", f"{module}.weight.quant_map", f"{module}.weight.quant_state.bitsandbytes__nf4",
        f"{module}.pre_quant_scale", f"{module}.SCB", f"{module}.lora_A.weight", f"{module}.lora_B.default.weight",
        f"{module}.extra_gain", f"extra.{name}", "dense_head.linear.weight", "model.extra_norm.weight",
    ])  # fmt: skip
    if rng.random() < 0.3:
        layers = [n for n in sorted(tensors) if ".layers." in n or ".layer." in n]
        found = rng.choice(layers)
        parts = found.split(".")
        at = next(i for i, part in enumerate(parts) if part.isdecimal())
        made = ".".join([*parts[:at], "97", *parts[at + 1 :]])
    size = (rows,) if rng.random() < 0.5 else (rows, 4)
    tensors[made] = torch.randn(size, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    return Change("tensor added", made, unknown=True)


def recast_tensor(tensors: Tensors, config: dict[str, Any], rng: random.Random) -> Change:
    """A weight in a format that means nothing without its scales."""
    name = rng.choice(sorted(tensors))
    dtype = rng.choice([torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
    tensors[name] = (tensors[name] * 7).to(dtype)
    return Change("tensor recast", name, unknown=True)


def rename_tensors(tensors: Tensors, config: dict[str, Any], rng: random.Random) -> Change:
    """One tensor or all of them under another prefix, or one of them gone, or an output embedding of another model."""
    name = rng.choice(sorted(tensors))
    what = rng.randrange(4)
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors[rng.choice(["model.", "module.", "base_model.model."]) + name] = tensors.pop(name)
    elif what == 2:
        prefix = name.split(".")[0] + "."
        for each in [each for each in tensors if each.startswith(prefix)]:
            tensors[each.removeprefix(prefix)] = tensors.pop(each)
        name = name.removeprefix(prefix)
    else:
        embedding = tensors[next(each for each in sorted(tensors) if "embed" in each and tensors[each].dim() == 2)]
        fbnl = "encoder" in config and isinstance(config["encoder"], dict)
        name = (
            rng.choice(["lm_head.out_proj.weight", "model.decoder.embed_tokens.weight"]) if fbnl else "lm_head.weight"
        )
        tensors[name] = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(rng.randrange(99))) / 8
    return Change("tensor renamed", name, unknown=False)


def alter_field(tensors: Tensors, config: dict[str, Any], rng: random.Random) -> Change:
    """A field that config.json has, with another value."""
    place = rng.choice([part for part in _objects(config) if part])
    key = rng.choice(sorted(place.keys() - {"encoder", "decoder"}))
    place[key] = _another(place[key], rng)
    return Change("field altered", key, unknown=False, value=place[key])


def add_field(tensors: Tensors, config: dict[str, Any], rng: random.Random) -> Change:
    """A field of another family."""
    place = rng.choice(list(_objects(config)))
    key = rng.choice([key for key in FOREIGN if key not in place])
    place[key] = rng.choice(FOREIGN[key])
    return Change("field added", key, unknown=key != "quantization_config" or place is config)


CHANGES: list[Callable[[Tensors, dict[str, Any], random.Random], Change]] = [
    add_tensor,
    recast_tensor,
    rename_tensors,
    alter_field,
    add_field,
]


def _objects(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a configuration that text is computed by: the vision tower is not."""
    encoder = config.get("encoder")
    return [config, encoder["text_config"], config["decoder"]] if isinstance(encoder, dict) else [config]


def _another(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value * 2, max(0, value - 1), value + 3])
    if isinstance(value, float):
        return rng.choice([value * 2, value * 1.5 + 0.1, value / 3])
    if isinstance(value, str):
        return rng.choice([each for each in STRINGS if each != value])
    if isinstance(value, list):
        return rng.choice([value[::-1], value[:-1], [*value, *value[:1]]])
    if isinstance(value, dict):
        return {k: _another(v, rng) if rng.random() < 0.5 else v for k, v in value.items()}
    return rng.choice([1, 0.5, 30.0, True])


def outcome(subject: Subject, change: Callable[..., Change], rng: random.Random, directory: Path) -> tuple[Change, str]:
    """Outcome of one fault: "refused", "refused, unnamed", "as transformers" or "silent"."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(subject.directory, directory)
    tensors, config = dict(subject.tensors), json.loads(json.dumps(subject.config))
    made = change(tensors, config, rng)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    try:
        ours = subject.ours(directory)
    except CheckpointError as exc:
        return made, "refused" if _named(made, str(exc)) else "refused, unnamed"
    if made.unknown:
        return made, "silent"
    try:
        expected = subject.oracle(directory)
    except Exception:  # transformers cannot load it, or cannot compute: no margins to follow, so the old ones stand
        expected = subject.oracle(subject.directory)
    same = np.allclose(ours, expected, atol=TOLERANCE, rtol=0, equal_nan=True)
    return made, "as transformers" if same else "silent"


def _named(change: Change, message: str) -> bool:
    """Whether an error says the name or the value that is wrong; sizes are found by their tensors."""
    name = change.name
    last = name.rpartition("encoder.")[2].rpartition("decoder.")[2]
    if isinstance(change.value, str) and repr(change.value) in message:
        return True
    said = (name, last, last.replace("_", " "), "has the shape", "would be random", "Imbalanced", "multiple of")
    return any(each in message for each in said)


def run(count: int, seed: int, show: Callable[[str, Change, str], None] | None = None) -> list[dict[str, Any]]:
    """Counts by architecture and kind of fault.

    Args:
        count: faults in all.
        show: told of each.
    """
    rng = random.Random(seed)
    counts: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        names = [FBNL, *CROSS_ENCODERS]
        subjects = {name: Subject(name, Path(folder) / name) for name in names}
        for number in range(count):
            # Half of them are for the halves that we compute ourselves.
            subject = subjects[FBNL if number % 2 else names[1 + number // 2 % len(CROSS_ENCODERS)]]
            made, what = outcome(subject, CHANGES[rng.randrange(len(CHANGES))], rng, Path(folder) / "changed")
            counts["fbnl" if subject.architecture == FBNL else "cross-encoder", made.kind, what] += 1
            if show is not None:
                show(subject.architecture, made, what)
    rows = []
    for model in ("fbnl", "cross-encoder"):
        for kind in ("tensor added", "tensor recast", "tensor renamed", "field altered", "field added"):
            found = {
                what: counts[model, kind, what] for what in ("refused", "refused, unnamed", "as transformers", "silent")
            }
            if total := sum(found.values()):
                rows.append({"model": model, "fault": kind, "injected": total, **found})
    return rows
