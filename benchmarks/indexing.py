"""Index throughput: the real job into the embedded store, beside transformers one passage at a time.

    python -m benchmarks.indexing [--passages 32] [--slow-passages 4] [--seconds 45]

Nano-shaped random weights over abstracts of examples/scifact, each cut to its first quarter: the random
checkpoint's tokenizer makes texts about four times as long as Gemma's would. The variants take turns until
the time is up, at least once. What a variant executes is counted from the shapes (operations.py) and held
against the matrix-product rate of the same run.

    transformers    one passage a pass, the first few passages only
    forward alone   our passes, in the batches an index run makes of these passages
    index           the same with reading, tokenizing, pooling, codec and a durable store around it

Padding is what a padded batch of the same passages would have had; on a CPU nothing is padded.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import T5Gemma2ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from benchmarks.common import matmul_peak, nano_checkpoint, report, start, tiny_checkpoint
from benchmarks.operations import Operations
from cache.open import open_store
from checkpoint import Checkpoint
from checkpoint.compute import DTYPES
from encoder_worker.indexing import IndexReport, index
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.sources import SourcePassage
from encoder_worker.sources.files import Source

EXAMPLE = Path(__file__).parent.parent / "examples" / "scifact"
RATIO = 4


def index_once(encoder: PassageEncoder, passages: Sequence[SourcePassage]) -> IndexReport:
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"faiss:{folder}/store")
        result = index(iter(passages), encoder, store, "bench")
        store.close()
    return result


def quarters(num_passages: int) -> list[SourcePassage]:
    """The first quarter of each of so many abstracts."""
    items = (item for item in Source([str(EXAMPLE)]) if isinstance(item, SourcePassage))
    return [replace(item, text=item.text[: len(item.text) // 4]) for item in itertools.islice(items, num_passages)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--slow-passages", type=int, default=4, help="of them, what transformers encodes")
    parser.add_argument("--seconds", type=float, default=45.0, help="begin no further round after that")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="a tiny model: tries the command, measures nothing")
    args = parser.parse_args()
    start()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    directory = tiny_checkpoint() if args.quick else nano_checkpoint()
    checkpoint = Checkpoint.open(directory)
    encoder = PassageEncoder.load(str(directory), device="cpu", dtype=args.dtype)
    plain = T5Gemma2ForConditionalGeneration.from_pretrained(directory, dtype=DTYPES[args.dtype]).eval().get_encoder()
    passages = quarters(args.passages)
    ids = [list(one.windows[0]) for one in encoder.tokenize([passage.text for passage in passages])]
    batches = encoder.limits.plan([len(row) for row in ids])
    num_slow = min(args.slow_passages, len(ids))
    done: list[IndexReport] = []

    def one_at_a_time() -> None:
        for row in ids[:num_slow]:
            plain(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long))

    def forward_alone() -> None:
        for batch in batches:
            encoder.encode([ids[i] for i in batch], RATIO)

    def operations(num_tokens: int) -> Operations:
        return Operations(checkpoint.encoder_config, checkpoint.decoder_config, num_tokens, RATIO)

    plain_work = sum(operations(len(row)).plain_encoding() for row in ids[:num_slow])
    work = sum(operations(len(row)).encoding() for row in ids)
    variants: dict[str, tuple[Callable[[], object], int, int]] = {
        "transformers, one at a time": (one_at_a_time, num_slow, plain_work),
        "forward alone": (forward_alone, len(ids), work),
        "index": (lambda: done.append(index_once(encoder, passages)), len(ids), work),
    }
    index_once(encoder, passages[:8])  # compiles what is compiled, and prepares products
    times: dict[str, list[float]] = {name: [] for name in variants}
    peaks: list[float] = []
    begun = time.perf_counter()
    while not peaks or time.perf_counter() - begun < args.seconds:
        peaks.append(matmul_peak(DTYPES[args.dtype]))
        for name, (call, _, _) in variants.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
        print(f"round {len(peaks)}: {time.perf_counter() - begun:.0f} s", flush=True)
    assert all(one.num_stored == len(passages) for one in done)
    peak = statistics.median(peaks)
    rows = []
    for name, (_, num_passages, num_operations) in variants.items():
        each, num_tokens = statistics.median(times[name]), sum(map(len, ids[:num_passages]))
        rows.append([name, num_passages, num_passages / each, num_tokens / each, num_operations / each / peak])
    report(
        "indexing",
        ["variant", "passages", "passages/s", "tokens/s", "share of peak"],
        rows,
        quick=args.quick,
        dtype=args.dtype,
        rounds=len(peaks),
        mean_tokens=round(sum(map(len, ids)) / len(ids)),
        batches=len(batches),
        padding_share=round(done[0].padding_share, 4),
        peak_gops=round(peak / 1e9),
    )


if __name__ == "__main__":
    main()
