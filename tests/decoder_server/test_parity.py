"""Float32 margins equal transformers' own T5Gemma 2 forward on the same weights, on every shape that has a border."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import T5Gemma2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from checkpoint import Checkpoint
from checkpoint.synthetic import SHAPES, Shape, make_checkpoint
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair
from encoder_worker.encoder import Encoder

TOLERANCE = 1e-4  # against transformers, float32
MATES_TOLERANCE = 1e-5  # against other batch-mates, float32
WINDOW = 512

SENTENCE = "The pooled states of its tokens are kept, and the decoder attends over them. "


class Oracle:
    """The straightforward way: transformers end to end, a Python loop for pooling, one pair at a time."""

    def __init__(self, directory: Path) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.model = T5Gemma2ForConditionalGeneration.from_pretrained(directory).eval()

    @torch.inference_mode()
    def states(self, ids: list[int]) -> torch.Tensor:
        real = torch.ones(1, len(ids), dtype=torch.long)
        states: torch.Tensor = self.model.get_encoder()(torch.tensor([ids]), attention_mask=real).last_hidden_state[0]
        return states

    @torch.inference_mode()
    def margin(self, prompt: list[int], states: torch.Tensor, ratio: int, yes_id: int, no_id: int) -> float:
        pooled = torch.stack([states[i : i + ratio].mean(0) for i in range(0, len(states), ratio)])[None]
        logits = self.model(
            decoder_input_ids=torch.tensor([prompt]),
            encoder_outputs=BaseModelOutput(last_hidden_state=pooled),
            attention_mask=torch.ones(pooled.shape[:2], dtype=torch.long),
        ).logits[0, -1]
        return float(logits[yes_id] - logits[no_id])


class Halves:
    """Both halves of one checkpoint and the oracle beside them."""

    def __init__(self, directory: Path) -> None:
        self.checkpoint = Checkpoint.open(directory)
        self.encoder = Encoder(self.checkpoint, device="cpu", dtype="float32")
        self.backend = FbnlBackend(self.checkpoint, device="cpu", dtype="float32")
        self.oracle = Oracle(directory)

    def expected(self, prompts: list[list[int]], passages: list[list[int]], ratio: int) -> NDArray[np.float32]:
        text = self.checkpoint.text
        states = [self.oracle.states(ids) for ids in passages]
        return np.array(
            [self.oracle.margin(p, s, ratio, text.yes_id, text.no_id) for p in prompts for s in states],
            dtype=np.float32,
        )

    def pairs(self, queries: list[str], passages: list[list[int]], ratio: int) -> list[StatePair]:
        states = self.encoder.encode(passages, ratio)
        return [StatePair(self.backend.prompt(query), s) for query in queries for s in states]

    def assert_parity(self, queries: list[str], passages: list[list[int]], ratio: int) -> None:
        pairs = self.pairs(queries, passages, ratio)
        batched = self.backend.score(pairs)
        prompts = [self.backend.prompt(query).ids for query in queries]
        np.testing.assert_allclose(batched, self.expected(prompts, passages, ratio), atol=TOLERANCE, rtol=0)
        single = np.concatenate([self.backend.score([pair]) for pair in pairs])
        np.testing.assert_allclose(batched, single, atol=MATES_TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | Shape], Halves]:
    made: dict[str | Shape, Halves] = {}

    def load(shape: str | Shape) -> Halves:
        if shape not in made:
            made[shape] = Halves(make_checkpoint(tmp_path_factory.mktemp("parity"), shape))
        return made[shape]

    return load


def passage_of(halves: Halves, num_tokens: int) -> list[int]:
    """A real tokenized passage of exactly that many tokens."""
    ids = halves.checkpoint.text.passages([SENTENCE * (num_tokens // 8 + 1)])[0].ids
    assert len(ids) >= num_tokens
    return ids[:num_tokens]


QUERIES = [
    "What is the capital of China?",
    "gravity",
    "Which states does the decoder attend over, and why are they kept? " * 3,
]


@pytest.mark.parametrize("ratio", range(1, 33))
def test_margins_equal_transformers_at_every_ratio(load: Callable[[str | Shape], Halves], ratio: int) -> None:
    halves = load("tiny")
    lengths = sorted({1, 2, 7, 8, 9, max(1, ratio - 1), ratio, ratio + 1, 2 * ratio, 65})
    halves.assert_parity(QUERIES[:2], [passage_of(halves, n) for n in lengths], ratio)


@pytest.mark.parametrize("ratio", [1, 4, 32])
def test_passages_around_and_over_the_published_window(load: Callable[[str | Shape], Halves], ratio: int) -> None:
    halves = load(replace(SHAPES["tiny"], sliding_window=WINDOW))
    lengths = [WINDOW // 2 - 1, WINDOW // 2 + 1, WINDOW - 1, WINDOW, WINDOW + 1, 800, 1024]
    halves.assert_parity(QUERIES, [passage_of(halves, n) for n in lengths], ratio)


@pytest.mark.parametrize("shape", ["one kv head", "as many kv heads as heads", "full layers only", "six layers"])
def test_other_head_and_layer_layouts(load: Callable[[str | Shape], Halves], shape: str) -> None:
    tiny = SHAPES["tiny"]
    shapes = {
        "one kv head": replace(tiny, num_key_value_heads=1),
        "as many kv heads as heads": replace(tiny, num_key_value_heads=4),
        "full layers only": replace(tiny, layer_types=("full_attention",) * 3),
        "six layers": replace(
            tiny, num_hidden_layers=7, layer_types=None
        ),  # the default pattern, one full layer in six
    }
    halves = load(shapes[shape])
    halves.assert_parity(QUERIES, [passage_of(halves, n) for n in (1, 5, 33)], 4)


# Widths and heads of the published sizes; layers, vocabulary and the MLP's inner width are few, so that it stays cheap.
WIDE = ("sliding_attention", "full_attention")
WIDTHS = {
    "Nano": Shape(512, 640, 2048, 2, 4, 1, 256, 512, WIDE),
    "Small": Shape(512, 1152, 1024, 2, 4, 1, 256, 512, WIDE),
    "Large": Shape(512, 2560, 512, 2, 8, 4, 256, 512, WIDE),
}


@pytest.mark.parametrize("window", [64, 512])
@pytest.mark.parametrize("size", WIDTHS)
def test_long_documents_at_the_published_widths(load: Callable[[str | Shape], Halves], size: str, window: int) -> None:
    halves = load(replace(WIDTHS[size], sliding_window=window))
    halves.assert_parity(QUERIES[1:], [passage_of(halves, n) for n in (63, 65, 1024)], 4)


def test_queries_up_to_and_over_the_limit(load: Callable[[str | Shape], Halves]) -> None:
    halves = load("tiny")
    limit = halves.checkpoint.settings.max_query_tokens
    word = " decoder"
    tokens_each = halves.backend.prompt(word * 10).num_query_tokens - halves.backend.prompt(word * 9).num_query_tokens
    around = [word * (limit // tokens_each + extra) for extra in (-1, 0, 1, 90)]
    prompts = [halves.backend.prompt(query) for query in around]
    assert [p.query_truncated for p in prompts] == [False, False, True, True]
    assert prompts[3].num_query_tokens == limit
    assert len(prompts[3].ids) < limit + 80  # only the query is cut, the prompt around it stands
    assert prompts[3].ids[-1] == prompts[0].ids[-1]
    halves.assert_parity([around[0], around[3], "short"], [passage_of(halves, n) for n in (3, 40)], 4)


def test_final_logit_softcapping_is_applied(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["decoder"]["final_logit_softcapping"] = 0.5
    (directory / "config.json").write_text(json.dumps(config))
    halves = Halves(directory)
    halves.assert_parity(QUERIES, [passage_of(halves, 20)], 2)


def test_non_finite_states_give_nan_for_their_pair_alone(load: Callable[[str | Shape], Halves]) -> None:
    halves = load("tiny")
    good, bad = halves.pairs(["gravity"], [passage_of(halves, 9), passage_of(halves, 12)], 4)
    broken = StatePair(bad.prompt, np.full_like(bad.states, np.nan))
    margins = halves.backend.score([good, broken, good])
    assert np.isnan(margins[1])
    np.testing.assert_allclose(margins[[0, 2]], np.repeat(halves.backend.score([good]), 2), atol=MATES_TOLERANCE)


def test_bfloat16_stays_near_float32(load: Callable[[str | Shape], Halves]) -> None:
    halves = load("tiny")
    pairs = halves.pairs(QUERIES, [passage_of(halves, n) for n in (3, 40, 100)], 4)
    narrow = FbnlBackend(halves.checkpoint, device="cpu", dtype="bfloat16")
    np.testing.assert_allclose(narrow.score(pairs), halves.backend.score(pairs), atol=0.2)


KALM = "PREREAD_KALM_CHECKPOINT"


@pytest.mark.skipif(
    KALM not in os.environ, reason=f"{KALM} names no KaLM-Reranker-V1-Nano checkpoint: published margins NOT checked"
)
@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (None, [8.78125, -14.1875]),
        ("Given a web search query, retrieve passages that answer the query.", [5.90625, -14.34375]),
    ],
)
def test_published_margins_of_kalm_nano(instruction: str | None, expected: list[float]) -> None:
    """Source: KaLM-Reranker-V1-Nano, bf16, r = 4; the second row is logit(P(yes)) of .9972850 and 5.896418e-07."""
    checkpoint = Checkpoint.open(os.environ[KALM])
    encoder = Encoder(checkpoint, dtype="float32")
    backend = FbnlBackend(checkpoint, dtype="float32")
    texts = ["The capital of China is Beijing.", "Gravity attracts bodies toward one another."]
    states = encoder.encode([p.ids for p in checkpoint.text.passages(texts)], 4)
    prompt = backend.prompt("What is the capital of China?", instruction)
    # The reference's own spread between batch sizes in bf16 is about 0.06.
    np.testing.assert_allclose(backend.score([StatePair(prompt, s) for s in states]), expected, atol=0.1)
