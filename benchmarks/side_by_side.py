"""Milliseconds a candidate: the straightforward way, a joint cross-encoder, and cached states, side by side.

    python -m benchmarks.side_by_side [--candidates 100] [--slow-candidates 10] [--passage-tokens 344] [--repeats 3]

All on the same Nano-shaped random weights, in one run, in turns (a round measures every way once, so
that a noisy neighbour hits all alike). transformers' ways score the first few candidates only; their
cost is per candidate. Operations are counted from the shapes, and each way is held against the
machine's own matrix-product rate, measured in the same run.

    straightforward     transformers: encode and decode per call, full vocabulary at every position
    joint               a cross-encoder of like size: the 18-layer text encoder over prompt + passage
    cached, full vocab  transformers' decoder over cached states, full vocabulary
    preread             cached states, our decoder pass
    preread, keys       the same with every layer's passage keys and values kept
    preread, prefix     the same with the constant beginning of the prompt kept per passage as well
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import T5Gemma2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from benchmarks.common import matmul_peak, nano_checkpoint, report, start
from checkpoint import Checkpoint, TokenizedPrompt
from checkpoint.compute import DTYPES
from decoder_server.backend import Pair
from decoder_server.decoder import KeysValues
from decoder_server.fbnl import FbnlBackend
from decoder_server.layout import Layout
from encoder_worker.encoder import Encoder

PROMPT_TOKENS = 72  # KaLM's template around a query of 19 tokens
PREFIX_TOKENS = 53  # of them before the query: template and instruction
BATCH = 10  # candidates a batch; every way gets the same


class Ways:
    """Every way to score the same candidates, on the same weights."""

    def __init__(self, dtype: str, num_candidates: int, num_slow: int, passage_tokens: int, ratio: int) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        directory = nano_checkpoint()
        checkpoint = Checkpoint.open(directory)
        self.ratio = ratio
        self.backend = FbnlBackend.load(checkpoint, device="cpu", dtype=dtype)
        self.encoder = Encoder.load(checkpoint, device="cpu", dtype=dtype)
        self.whole = T5Gemma2ForConditionalGeneration.from_pretrained(directory, dtype=DTYPES[dtype]).eval()
        rng = np.random.default_rng(0)
        vocab = checkpoint.text.vocab_size
        self.passages = [rng.integers(300, vocab, passage_tokens).tolist() for _ in range(num_slow)]
        self.prompt = TokenizedPrompt(rng.integers(300, vocab, PROMPT_TOKENS).tolist(), 19, query_truncated=False)
        # The first passages' states again and again: no time depends on their values.
        encoded = self.encoder.encode(self.passages, ratio)
        self.states = [encoded[i % num_slow] for i in range(num_candidates)]
        self.num_slow = num_slow
        self.pairs = [Pair(self.prompt, states) for states in self.states]
        self.decoder = self.backend._decoder  # contexts are kept by whoever serves, not by the backend
        self.keys = [list(self.decoder.passage_kv(torch.from_numpy(s).to(DTYPES[dtype]))) for s in self.states]
        beginning = torch.tensor(self.prompt.ids[:PREFIX_TOKENS])
        self.prefixed: list[list[KeysValues]] = []
        for states, keys in zip(self.states, self.keys, strict=True):
            layout = Layout([PREFIX_TOKENS], [len(states)], beginning.device)
            self.prefixed.append(packed([self.decoder.prompt_kv(beginning, keys, layout), keys]))

    def straightforward(self) -> None:
        for first in range(0, self.num_slow, BATCH):
            ids = torch.tensor(self.passages[first : min(first + BATCH, self.num_slow)])
            states = self.whole.get_encoder()(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            batch, length, dim = states.shape
            self._decode(states.view(batch, length // self.ratio, self.ratio, dim).mean(2))

    def cached_full_vocabulary(self) -> None:
        for first in range(0, self.num_slow, BATCH):
            states = np.stack(self.states[first : min(first + BATCH, self.num_slow)])
            self._decode(torch.from_numpy(states).to(self.whole.dtype))

    def joint(self) -> None:
        model = self.whole.get_encoder().text_model
        for first in range(0, self.num_slow, BATCH):
            passages = self.passages[first : min(first + BATCH, self.num_slow)]
            ids = torch.tensor([self.prompt.ids + passage for passage in passages])
            model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, -1].sum(1)

    def preread(self) -> NDArray[np.float32]:
        return np.concatenate([self.backend.score(self.pairs[i : i + BATCH]) for i in range(0, len(self.pairs), BATCH)])

    def preread_keys(self) -> NDArray[np.float32]:
        return self._continued(self.keys, 0)

    def preread_prefix(self) -> NDArray[np.float32]:
        return self._continued(self.prefixed, PREFIX_TOKENS)

    def _continued(self, contexts: list[list[KeysValues]], begin: int) -> NDArray[np.float32]:
        margins = []
        for first in range(0, len(contexts), BATCH):
            parts = contexts[first : first + BATCH]
            ids = torch.tensor(self.prompt.ids[begin:] * len(parts))
            counts = [len(states) for states in self.states[first : first + BATCH]]
            layout = Layout([len(self.prompt.ids) - begin] * len(parts), counts, ids.device, [begin] * len(parts))
            margins.append(self.decoder.margins(ids, packed(parts), layout, 4, 5).numpy())
        return np.concatenate(margins)

    def _decode(self, states: torch.Tensor) -> None:
        prompts = torch.tensor([self.prompt.ids] * len(states))
        self.whole(
            decoder_input_ids=prompts,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
        )


def packed(contexts: list[list[KeysValues]]) -> list[KeysValues]:
    """Contexts end to end, layer by layer."""
    return [(torch.cat([k for k, _ in rows]), torch.cat([v for _, v in rows])) for rows in zip(*contexts, strict=True)]


def operations(way: str, prompt: int, passage: int, ratio: int) -> float:
    """Multiply-adds times two for one candidate, from the shapes of Nano; norms and softmax left out."""
    dim, inner, heads, kv, head, layers, vocab = 640, 2048, 4, 1, 256, 18, 262_144
    token = dim * (heads + 2 * kv) * head + heads * head * dim + 3 * dim * inner  # dense work of one token and layer
    states = -(-passage // ratio)

    def stack(tokens: int, keys: int) -> float:
        return layers * (tokens * token + 2 * tokens * keys * heads * head)

    def read_out(tokens: int) -> float:
        """Our pass over that many of the prompt's tokens: the last layer's rows but one are left out."""
        last = (tokens - 1) * (token - dim * 2 * kv * head + 2 * (prompt + states) * heads * head)
        return stack(tokens, prompt + states) - last

    cross = layers * states * dim * 2 * kv * head
    decode = stack(prompt, prompt + states) + cross
    total = {
        "straightforward": stack(passage, passage) + decode + prompt * dim * vocab,
        "joint": stack(prompt + passage, prompt + passage),
        "cached, full vocabulary": decode + prompt * dim * vocab,
        "preread": read_out(prompt) + cross,
        "preread, keys": read_out(prompt),
        "preread, prefix": read_out(prompt - PREFIX_TOKENS),
    }
    return 2 * total[way]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--slow-candidates", type=int, default=10, help="of them, what transformers' ways score")
    parser.add_argument("--passage-tokens", type=int, default=344)
    parser.add_argument("--ratio", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    args = parser.parse_args()
    start()
    rows: list[list[object]] = []
    for dtype in args.dtypes.split(","):
        ways = Ways(dtype, args.candidates, args.slow_candidates, args.passage_tokens, args.ratio)
        calls: dict[str, Callable[[], object]] = {
            "straightforward": ways.straightforward,
            "joint": ways.joint,
            "cached, full vocabulary": ways.cached_full_vocabulary,
            "preread": ways.preread,
            "preread, keys": ways.preread_keys,
            "preread, prefix": ways.preread_prefix,
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        peaks: list[float] = []
        for round_ in range(args.repeats + 1):
            peaks.append(matmul_peak(DTYPES[dtype]))
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                if round_ > 0:  # the first round warms up
                    times[name].append(time.perf_counter() - begin)
        peak = statistics.median(peaks[1:])
        scored = {name: args.candidates if name.startswith("preread") else args.slow_candidates for name in times}
        slowest = statistics.median(times["straightforward"]) / args.slow_candidates
        for name, seconds in times.items():
            each = statistics.median(seconds) / scored[name]
            work = operations(name, len(ways.prompt.ids), args.passage_tokens, args.ratio)
            rows.append([dtype, name, each * 1e3, slowest / each, work / 1e9, work / each / peak])
        rows.append([dtype, "matrix-product peak, Gop/s", "", "", peak / 1e9, 1.0])
    report(
        "side_by_side",
        ["dtype", "way", "ms a candidate", "times faster", "Gop a candidate", "share of peak"],
        rows,
        candidates=args.candidates,
        passage_tokens=args.passage_tokens,
        prompt_tokens=len(ways.prompt.ids),
        ratio=args.ratio,
        batch=BATCH,
    )


if __name__ == "__main__":
    main()
