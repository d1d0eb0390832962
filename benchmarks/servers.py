"""Real servers for benchmarks, each a separate process on a free port, and the requests they get."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cache.collection import Collection, StoredPassage
from cache.manifest import Manifest
from cache.open import open_store
from cache.states import PassageStates, num_pooled, text_digest
from checkpoint import Checkpoint
from preread import Client

QUERY = "which passages does the decoder attend over"
TIER_BYTES = 1 << 30
TIERS = ["--keys-cache-bytes", str(TIER_BYTES), "--prefix-cache-bytes", str(TIER_BYTES)]  # hold whatever is asked here
SENTENCE = "The pooled states of its tokens are kept, and the decoder attends over them. "


@contextmanager
def started(model: Path | str, store: str, *flags: str) -> Iterator[dict[str, str]]:
    """A `preread serve`: the lines it says at its start, by their first word.

    Requests are repeated here to be computed again, so margins are not kept, unless a flag says otherwise.
    """
    command = [sys.executable, "-m", "preread", "serve", "--model", str(model), "--store", store]
    command += ["--port", "0", "--encoder-port", "0", "--log-level", "warning", "--no-check"]
    command += ["--score-cache-bytes", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith("ready"):
                break
        else:
            raise RuntimeError("the server did not start:\n" + "".join(seen))
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield {name: said.strip() for name, _, said in (line.partition(" ") for line in seen)}
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def serving(model: Path | str, store: str, *flags: str) -> Iterator[str]:
    """The address of a `preread serve`."""
    with started(model, store, *flags) as said:
        yield said["listening"].split()[0]


def indexed(texts: dict[str, str], model: Path | str, folder: Path) -> str:
    """The store, in a folder, of a collection `docs` that `preread index` made of texts by id, at r = 4."""
    passages, store = folder / "passages.jsonl", f"faiss:{folder}/store"
    passages.write_text("".join(json.dumps({"id": one, "text": text}) + "\n" for one, text in texts.items()))
    command = [sys.executable, "-m", "preread", "index", str(passages), "--collection", "docs", "--store", store]
    subprocess.run([*command, "--model", str(model), "--compression-ratio", "4"], check=True)
    return store


def metrics(url: str) -> dict[str, float]:
    """What Prometheus would read, by name and labels as they are written."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def time_requests(client: Client, repeats: int, **request: Any) -> tuple[float, float]:
    """Median seconds of a request, and of what the server spent in the model."""
    total, compute = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        answer = client.rerank(QUERY, timeout=600, **request)
        total.append(time.perf_counter() - begin)
        compute.append(answer.summary.timings.compute_seconds)
        assert answer.summary.num_scored == len(request["candidates"])
    return statistics.median(total), statistics.median(compute)


def texts_of(count_tokens: Callable[[str], int]) -> Callable[[int], str]:
    """Makes texts of about so many tokens, none of them twice."""
    each = count_tokens(SENTENCE * 11) - count_tokens(SENTENCE * 10)
    fresh = itertools.count()
    return lambda num_tokens: f"{next(fresh)} " + SENTENCE * max(1, round(num_tokens / each))


def fill(store_url: str, checkpoint: Checkpoint, lengths: list[int], num_passages: int, ratio: int) -> None:
    """A collection for each length, called t344 and so on. No time depends on the states' values: they are random."""
    identity = checkpoint.identity
    store = open_store(store_url)
    rng = np.random.default_rng(0)
    for length in lengths:
        manifest = Manifest.of(identity, collection=f"t{length}", compression_ratio=ratio, stores_text=False)
        states = rng.standard_normal((num_pooled(length, ratio), identity.dim), dtype=np.float32)
        Collection.create(store, manifest).put_many(
            [
                StoredPassage(f"p{i}", PassageStates(states, (length,), ratio, False, text_digest(str(i))))
                for i in range(num_passages)
            ]
        )
    store.close()
