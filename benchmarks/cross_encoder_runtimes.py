"""Cross-encoders by runtime: time for a pair, and how far scores are from torch in float32, on random weights.

python -m benchmarks.cross_encoder_runtimes                  time, on two shapes people serve
python -m benchmarks.cross_encoder_runtimes --architectures  distance alone, tiny models of every architecture
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from benchmarks.common import CACHE, median_seconds, report, start
from benchmarks.synthetic import Size, make_cross_encoder
from decoder_server.models.cross_encoder.loading import open_cross_encoder

RUNTIMES = (("torch", "float32"), ("torch", "bfloat16"), ("onnx", None), ("onnx-int8", None))
TINY = {
    "XLMRobertaForSequenceClassification": "BAAI/bge-reranker-v2-m3",
    "BertForSequenceClassification": "cross-encoder/ms-marco-MiniLM-L6-v2",
    "ModernBertForSequenceClassification": "ibm-granite/granite-embedding-reranker-english-r2",
    "DebertaV2ForSequenceClassification": "mixedbread-ai/mxbai-rerank-base-v1",
    "Qwen3ForSequenceClassification": "sigridjineth/ctxl-rerank-v2-1b-seq-cls",
    "Qwen3ForCausalLM": "Qwen/Qwen3-Reranker-0.6B",
    "Qwen2ForCausalLM": "mixedbread-ai/mxbai-rerank-base-v2",
    "GemmaForCausalLM": "BAAI/bge-reranker-v2-gemma",
    "MistralForCausalLM": "ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b",
}
# The vocabulary is small: its rows are looked up, not multiplied.
SHAPES = {
    "bge-reranker-base": ("XLMRobertaForSequenceClassification", "BAAI/bge-reranker-base", Size(768, 3072, 12, 12, 12)),
    "Qwen3-Reranker-0.6B, 7 of 28 layers": (
        "Qwen3ForCausalLM",
        "Qwen/Qwen3-Reranker-0.6B",
        Size(1024, 3072, 7, 16, 8, positions=2048),
    ),
}
Texts = list[tuple[str, str | None, str]]
SENTENCE = "The capital of China is Beijing and gravity attracts bodies toward one another what query passage"


def texts(num: int, num_words: int) -> Texts:
    rng = random.Random(0)
    return [
        ("What is the capital of China?", None, " ".join(rng.choices(SENTENCE.split(), k=num_words)))
        for _ in range(num)
    ]


def made(architecture: str, size: Size) -> Path:
    """A random checkpoint, made once and kept."""
    directory = CACHE / f"cross-{architecture}-{size.hidden}-{size.layers}"
    if not (directory / "config.json").exists():
        make_cross_encoder(directory, architecture, size)
    return directory


def distance(margins: NDArray[np.float32], exact: NDArray[np.float32]) -> tuple[float, float, float]:
    """Largest difference, in standard deviations of the exact margins too, and Kendall's tau."""
    worst = float(np.abs(margins - exact).max())
    return worst, worst / float(exact.std()), float(kendalltau(margins, exact).statistic)


def measure(directory: Path, profile: str, asked: Texts, *, timed: bool) -> Iterator[list[object]]:
    """Rows of one model: runtime, milliseconds a pair where `timed`, distances from the first runtime."""
    exact: NDArray[np.float32] | None = None
    for runtime, dtype in RUNTIMES:
        model = open_cross_encoder(
            directory, device="cpu", profile=profile, runtime=runtime, dtype=dtype, cache_dir=CACHE / "onnx"
        )
        margins = model.score_texts(asked)
        exact = margins if exact is None else exact
        row: list[object] = [f"torch, {model.dtype_name}" if runtime == "torch" else runtime]
        if timed:
            score = functools.partial(model.score_texts, asked)
            row.append(1000 * median_seconds(score, repeats=3) / len(asked))
        num_tokens = int(np.mean([pair.num_tokens for pair in model.read(asked)]))
        yield [num_tokens, *row, *distance(margins, exact)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", action="store_true", help="distances of every architecture, no times")
    parser.add_argument("--pairs", type=int, help="pairs scored (default 12; 100 for --architectures)")
    parser.add_argument("--words", type=int, help="words of a passage (default 40; 30 for --architectures)")
    arguments = parser.parse_args()
    start()
    if arguments.architectures:
        cases = {
            name.removesuffix("ForSequenceClassification"): (name, profile, Size()) for name, profile in TINY.items()
        }
        asked = texts(arguments.pairs or 100, arguments.words or 30)
    else:
        cases = SHAPES
        asked = texts(arguments.pairs or 12, arguments.words or 40)
    columns = ["model", "tokens a pair", "runtime", "max |difference|", "in standard deviations", "tau"]
    if not arguments.architectures:
        columns.insert(3, "ms a pair")
    rows: list[list[object]] = []
    for name, (architecture, profile, size) in cases.items():
        for row in measure(made(architecture, size), profile, asked, timed=not arguments.architectures):
            rows.append([name, *row])
            print(rows[-1], flush=True)
    suffix = "_architectures" if arguments.architectures else ""
    report(f"cross_encoder_runtimes{suffix}", columns, rows, pairs=len(asked))


if __name__ == "__main__":
    main()
