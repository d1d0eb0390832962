"""How fast states come back from a store, and into a batch, by codec.

    python -m benchmarks.store_read [--store faiss|redis] [--passages 1000] [--tokens 344]

Nano-shaped passages: 344 tokens (`--tokens`) at r = 4, 86 states of 640 numbers, in random order, the page cache
warm; checksums are verified. Redis, where asked for, is a redis-server started here on a free port.

    ms              one `get_many` of all passages, decoded to float32
    read            the same as a server does it, nothing decoded
    batch           what was read, ten passages at a time, into bfloat16 as a pass takes it (batch_states)
    decoded first   a get_many, and the same batches out of it, concatenated and converted
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.common import median_seconds, report, start
from benchmarks.redis_server import redis_url
from cache.codecs import Codec
from cache.collection import Collection, StoredPassage
from cache.manifest import Manifest
from cache.open import open_store
from cache.states import EncodedPassage, PassageStates, text_digest
from checkpoint import TokenizedPrompt
from decoder_server.models.fbnl.kv_cache import StatePair, batch_states

CODECS = ("Flat", "SQfp16", "SQbf16", "SQ8", "B32,SQ8", "Z,B32,SQ8", "SQ4", "Z,B32,SQ4", "PQ80")
DIM, PASSAGE_TOKENS, RATIO = 640, 344, 4


BATCH_PASSAGES = 10
PROMPT = TokenizedPrompt([1], 1, query_truncated=False)


@dataclass(frozen=True)
class Seconds:
    """Medians, of all passages."""

    decoded: float
    read: float
    batch: float
    decoded_first: float


def read_seconds(
    url: str, codec_name: str, states: np.ndarray, num_passages: int, num_tokens: int = PASSAGE_TOKENS
) -> tuple[Seconds, int]:
    """How long it takes, and bytes a state takes at rest."""
    codec = Codec(codec_name, DIM)
    if codec.needs_training:
        codec.train(states.reshape(-1, DIM)[:20_000])
    store = open_store(url)
    name = codec_name.lower().replace(",", "-")
    manifest = Manifest(
        collection=name,
        fingerprint="0" * 64,
        checkpoint="benchmark",
        dim=DIM,
        max_passage_tokens=8192,
        passage_template="{passage}",
        pooling_version=1,
        compression_ratio=RATIO,
        codec=codec_name,
        codec_table=codec.table(),
        stores_text=False,
    )
    collection = Collection.create(store, manifest)
    passages = [
        StoredPassage(str(i), PassageStates(states[i % len(states)], (num_tokens,), RATIO, False, text_digest(str(i))))
        for i in range(num_passages)
    ]
    for first in range(0, num_passages, 100):
        collection.put_many(passages[first : first + 100])
    ids = [str(i) for i in range(num_passages)]
    random.Random(0).shuffle(ids)

    encoded = [
        StatePair(PROMPT, one.states) for one in collection.get_encoded_many(ids) if isinstance(one, EncodedPassage)
    ]
    numbers = [one.states for one in collection.get_many(ids) if isinstance(one, PassageStates)]
    assert len(encoded) == len(numbers) == num_passages
    firsts = range(0, num_passages, BATCH_PASSAGES)

    def batch() -> None:
        for first in firsts:
            batch_states(encoded[first : first + BATCH_PASSAGES], torch.device("cpu"), torch.bfloat16)

    def convert() -> None:
        for first in firsts:
            torch.from_numpy(np.concatenate(numbers[first : first + BATCH_PASSAGES])).to(torch.bfloat16)

    decoded, read, batched, converted = (
        median_seconds(call, repeats=7, warm_up=2)
        for call in (lambda: collection.get_many(ids), lambda: collection.get_encoded_many(ids), batch, convert)
    )
    seconds = Seconds(decoded, read, batched, decoded + converted)
    store.drop_collection(name)
    store.close()
    return seconds, codec.code_size_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="faiss,redis")
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=PASSAGE_TOKENS, help="of a passage")
    parser.add_argument("--codecs", type=lambda text: text.split(";"), default=list(CODECS), help="separated by ';'")
    args = parser.parse_args()
    start()
    num_states = -(-args.tokens // RATIO)
    states = np.random.default_rng(0).standard_normal((50, num_states, DIM), dtype=np.float32)
    rows = []
    for kind in args.store.split(","):
        with tempfile.TemporaryDirectory() as folder, redis_url() if kind == "redis" else no_server(folder) as url:
            for codec_name in args.codecs:
                seconds, state_bytes = read_seconds(url, codec_name, states, args.passages, args.tokens)
                decoded = args.passages * num_states * DIM * 4
                rows.append(
                    [
                        kind,
                        codec_name,
                        state_bytes,
                        args.passages * num_states * state_bytes / 2**20,
                        seconds.decoded * 1e3,
                        args.passages / seconds.decoded,
                        decoded / seconds.decoded / 2**30,
                        seconds.read * 1e3,
                        seconds.batch * 1e3,
                        seconds.decoded_first * 1e3,
                    ]
                )
    columns = ["store", "codec", "bytes a state", "MiB read", "ms", "passages/s", "decoded GiB/s"]
    columns += ["read, ms", "batch, ms", "decoded first, ms"]
    report("store_read", columns, rows, passages=args.passages, states_per_passage=num_states, dim=DIM)


@contextmanager
def no_server(folder: str) -> Iterator[str]:
    yield f"faiss:{folder}/store"


if __name__ == "__main__":
    main()
