"""Index throughput: the real job into the embedded store, beside transformers one passage at a time.

    python -m benchmarks.indexing [--passages 60] [--repeats 3]

Nano-shaped random weights over abstracts of examples/scifact (the random checkpoint's tokenizer makes
them about four times as long as Gemma's would). Both ways take turns. Operations are counted from the
shapes and held against the matrix-product rate of the same run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import T5Gemma2ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from benchmarks.common import matmul_peak, nano_checkpoint, report, start
from cache.store import open_store
from checkpoint import Checkpoint
from checkpoint.compute import DTYPES
from encoder_worker.indexing import index
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.report import IndexReport
from encoder_worker.sources import Passage, Source

EXAMPLE = Path(__file__).parent.parent / "examples" / "scifact"
LAYERS, DIM, INNER, HEADS, KV, HEAD, REACH = 18, 640, 2048, 4, 1, 256, 512


def operations(num_tokens: int) -> float:
    """Multiply-adds times two to encode one passage of Nano; attention as far as the window reaches."""
    dense = DIM * (HEADS + 2 * KV) * HEAD + HEADS * HEAD * DIM + 3 * DIM * INNER
    keys = (5 * min(num_tokens, REACH) + num_tokens) / 6  # five sliding layers to a full one
    return 2 * LAYERS * num_tokens * (dense + 2 * keys * HEADS * HEAD)


def index_once(encoder: PassageEncoder, passages: list[Passage]) -> IndexReport:
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"faiss:{folder}/store")
        result = index(iter(passages), encoder, store, "bench")
        store.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    start()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    directory = nano_checkpoint()
    encoder = PassageEncoder.load(str(directory), device="cpu", dtype=args.dtype)
    plain = T5Gemma2ForConditionalGeneration.from_pretrained(directory, dtype=DTYPES[args.dtype]).eval().get_encoder()
    items = Source([str(EXAMPLE)])
    passages = list(itertools.islice((item for item in items if isinstance(item, Passage)), args.passages))
    text = Checkpoint.open(directory).text
    ids = [passage.ids for passage in text.passages([passage.text for passage in passages])]
    num_tokens, work = sum(map(len, ids)), sum(operations(len(row)) for row in ids)

    def one_at_a_time() -> None:
        for row in ids:
            plain(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long))

    times: dict[str, list[float]] = {"transformers, one at a time": [], "preread index": []}
    peaks, padding = [], 0.0
    for _ in range(args.repeats):
        peaks.append(matmul_peak(DTYPES[args.dtype]))
        begin = time.perf_counter()
        one_at_a_time()
        times["transformers, one at a time"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        done = index_once(encoder, passages)
        times["preread index"].append(time.perf_counter() - begin)
        assert done.num_stored == len(passages)
        padding = done.num_padding_tokens / (done.num_tokens + done.num_padding_tokens)
    peak = statistics.median(peaks)
    rows = []
    for way, seconds in times.items():
        each = statistics.median(seconds)
        rows.append([way, len(passages) / each, num_tokens / each, work / each / peak])
    columns = ["way", "passages/s", "tokens/s", "share of peak"]
    report(
        "indexing",
        columns,
        rows,
        dtype=args.dtype,
        passages=len(passages),
        mean_tokens=round(num_tokens / len(passages)),
        padding_share=round(padding, 4),
        peak_gops=round(peak / 1e9),
    )


if __name__ == "__main__":
    main()
