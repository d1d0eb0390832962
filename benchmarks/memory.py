"""Peak memory of each part on a Nano-shaped random checkpoint: halves, passes and caches, each in a fresh process.

    python -m benchmarks.memory [--quick]

What modules and the tokenizer took before is subtracted; from a pass and a cache, also what was loaded
before them. `own` is what a part is meant to take: a half its weights, a cache its budget, which it is
offered half as much again as it holds. Passes are of one batch of benchmarks.side_by_side: ten
candidates of 344 tokens at r = 4.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path

from benchmarks.common import nano_checkpoint, report, tiny_checkpoint
from benchmarks.operations import PREFIX_TOKENS

TIER_BYTES = 128 << 20
PASSAGE_TOKENS, RATIO = 344, 4
COLUMNS = ["part", "dtype", "own MiB", "peak MiB", "peak / own"]


def high_water_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel reports no VmHWM")


@contextmanager
def printed_peak(own_bytes: int) -> Iterator[None]:
    """Prints `own_bytes` and how far memory rose meanwhile."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, and not seen
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark again
    before = high_water_bytes()
    yield
    print(own_bytes, high_water_bytes() - before)


def load(half: str, directory: Path, dtype: str) -> None:
    """One half, its first pass included."""
    import transformers.models.t5gemma2.modeling_t5gemma2  # noqa: F401

    from checkpoint import Checkpoint
    from decoder_server.models.fbnl.backend import FbnlBackend
    from encoder_worker.encoder import Encoder

    checkpoint = Checkpoint.open(directory)
    tokens = checkpoint.text.passages(["warm up"])[0].ids
    with printed_peak(weight_bytes(directory, dtype, half)):
        if half == "encoder":
            Encoder(checkpoint, device="cpu", dtype=dtype).encode([tokens], RATIO)
        else:
            FbnlBackend(checkpoint, device="cpu", dtype=dtype).warm_up()


def load_transformers(directory: Path, dtype: str) -> None:
    """Both halves as transformers loads them, with one embedding; its tensors come when they are read, in a pass."""
    import torch
    from transformers import T5Gemma2ForConditionalGeneration

    from checkpoint.compute import DTYPES

    tokens = torch.ones((1, 8), dtype=torch.long)
    own = weight_bytes(directory, dtype, "encoder", "decoder") - embedding_bytes(directory, dtype)
    with printed_peak(own), torch.inference_mode():
        whole = T5Gemma2ForConditionalGeneration.from_pretrained(directory, dtype=DTYPES[dtype])
        whole(input_ids=tokens, decoder_input_ids=tokens)


def run_pass(variant: str, directory: Path, dtype: str) -> None:
    """One batch, everything loaded before and run once on a single candidate."""
    from benchmarks.common import start
    from benchmarks.variants import BATCH, VARIANTS, Candidates, Models

    start()
    candidates = Candidates(Models(directory, dtype), PASSAGE_TOKENS, RATIO, BATCH)
    VARIANTS[variant].prepare(candidates, BATCH)
    VARIANTS[variant].score(candidates, 1)
    with printed_peak(0):
        VARIANTS[variant].score(candidates, BATCH)


def fill_states_tier(directory: Path, dtype: str) -> None:
    """The read cache."""
    import numpy as np

    from cache.collection import Collection, StoredPassage
    from cache.manifest import Manifest
    from cache.open import open_store
    from cache.read_cache import CachedStore
    from cache.states import PassageStates, text_digest
    from checkpoint import Checkpoint

    checkpoint = Checkpoint.open(directory)
    states = np.ones((-(-PASSAGE_TOKENS // RATIO), checkpoint.dim), dtype=np.float32)
    one = PassageStates(states, (PASSAGE_TOKENS,), RATIO, False, text_digest(""))
    manifest = Manifest.of(checkpoint.identity, collection="c", compression_ratio=RATIO, stores_text=False)
    collection = Collection.create(CachedStore(open_store("memory:"), max_bytes=TIER_BYTES), manifest)
    count = TIER_BYTES * 3 // 2 // (len(states) * collection.codec.code_size_bytes)
    batches = [range(first, min(first + 100, count)) for first in range(0, count, 100)]
    for some in batches:
        collection.put_many([StoredPassage(str(i), one) for i in some])
    with printed_peak(TIER_BYTES):
        for some in batches:
            collection.get_encoded_many([str(i) for i in some])


def fill_tier(name: str, directory: Path, dtype: str) -> None:
    """Of keys or prefixes. Keys and values are copies of one, so that only what is kept is seen."""
    import torch

    from checkpoint import Checkpoint
    from checkpoint.compute import DTYPES
    from decoder_server.models.fbnl.kv_cache import KVCache

    config = Checkpoint.open(directory).decoder_config
    rows = PREFIX_TOKENS if name == "prefixes" else -(-PASSAGE_TOKENS // RATIO)
    kv = torch.ones(config.num_hidden_layers, 2, rows, config.num_key_value_heads, config.head_dim, dtype=DTYPES[dtype])
    tier = KVCache(name, TIER_BYTES, "auto")
    with printed_peak(TIER_BYTES):
        for i in range(TIER_BYTES * 3 // 2 // kv.nbytes):
            tier.put(i, kv)


PARTS: dict[str, Callable[[Path, str], None]] = {
    "encoder": partial(load, "encoder"),
    "decoder": partial(load, "decoder"),
    "transformers, both halves": load_transformers,
    "pass: transformers": partial(run_pass, "transformers"),
    "pass: joint": partial(run_pass, "joint"),
    "pass: cached, full vocabulary": partial(run_pass, "cached, full vocabulary"),
    "pass: preread, texts": partial(run_pass, "preread, texts"),
    "pass: preread": partial(run_pass, "preread"),
    "pass: preread, prefix": partial(run_pass, "preread, prefix"),
    "tier: states": fill_states_tier,
    "tier: keys": partial(fill_tier, "keys"),
    "tier: prefixes": partial(fill_tier, "prefixes"),
}


def weight_bytes(directory: Path, dtype: str, *halves: str) -> int:
    from checkpoint import Checkpoint
    from checkpoint.compute import DTYPES
    from checkpoint.model import tensor_shapes

    checkpoint, own = Checkpoint.open(directory), 0
    for half in halves:
        config = checkpoint.encoder_config if half == "encoder" else checkpoint.decoder_config
        own += sum(prod(shape) for shape in tensor_shapes(half, config).values())
    return own * DTYPES[dtype].itemsize


def embedding_bytes(directory: Path, dtype: str) -> int:
    from checkpoint import Checkpoint
    from checkpoint.compute import DTYPES
    from checkpoint.model import tensor_shapes

    shapes = tensor_shapes("decoder", Checkpoint.open(directory).decoder_config)
    return sum(prod(shape) for name, shape in shapes.items() if "embed_tokens" in name) * DTYPES[dtype].itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the command")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    directory = tiny_checkpoint() if args.quick else nano_checkpoint()
    if args.part:
        PARTS[args.part](directory, args.dtype)
        return
    rows: list[list[object]] = []
    for part in PARTS:
        for dtype in ("bfloat16", "float32") if part in ("encoder", "decoder") else ("bfloat16",):
            command = [sys.executable, "-m", "benchmarks.memory", "--part", part, "--dtype", dtype]
            command += ["--quick"] if args.quick else []
            own, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
            ratio = peak / own if own else ""
            rows.append([part, dtype, round(own / 2**20) if own else "", round(peak / 2**20), ratio])
            print(*rows[-1], flush=True)
    report("memory", COLUMNS, rows, quick=args.quick)


if __name__ == "__main__":
    main()
