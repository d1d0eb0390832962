"""Quality and cost of cascades against single ratios, through a real `preread serve`.

    python -m benchmarks.cascade --collections DIR --names scifact,vaswani [--queries 100] [--depth 100]

Every query's BM25 candidates are indexed at ratio 1 with `--model` (default: the one that ships) and
reranked once under each plan, one request at a time: what a request costs is its own. Quality is
nDCG@10 with the paired 95% bootstrap interval of its difference to ratio 1; cost is how many
pairs and states a query took, and the time in the model and of the whole request. `--store DIR` keeps the
indexed candidates for the next run.

DIR/NAME holds corpus.jsonl.gz, queries.jsonl.gz and qrels.tsv, as BEIR lays them out. Where queries
carry a split, those of `--split` are asked.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import report, start
from benchmarks.servers import serving
from cache.collection import Collection, StoredPassage
from cache.errors import CollectionNotFound
from cache.manifest import Manifest
from cache.open import open_store
from cache.store import Store
from checkpoint import Checkpoint, EncoderIdentity
from encoder_worker.passage_encoder import PassageEncoder
from preread import Client
from preread_cli.commands.rerank import run_rows
from preread_cli.models import SHIPPED_MODEL
from tuning.baselines import search
from tuning.judged import JudgedCollection, read_judged
from tuning.metrics import HEADLINE, Bootstrap, per_query
from tuning.rerank import EncodedStates
from tuning.trec import Run, rank

SEED = 20260101
RATIOS = (1, 4, 8, 16, 32)
CASCADES = ("32:50,1", "32:20,1", "16:20,1", "8:20,1", "32:20,4", "32:50,4:20,1")
BASELINE = 0  # of RATIOS: the finest
CANDIDATES = "first stage"


def index(
    store: Store, judged: JudgedCollection, found: Run, checkpoint: Checkpoint, dtype: str | None, name: str
) -> None:
    """Adds the candidates' states at ratio 1 that are not there yet."""
    wanted = sorted({passage_id for ranking in found.values() for passage_id, _ in ranking})
    identity = checkpoint.identity
    try:
        collection = Collection.open(store, name, fingerprint=identity.fingerprint)
    except CollectionNotFound:
        collection = Collection.create(store, _manifest(name, identity))
    missing = [
        passage_id for passage_id, there in zip(wanted, collection.digests(wanted), strict=True) if there is None
    ]
    if missing:
        encoder = PassageEncoder.load(str(checkpoint.path), dtype=dtype)
        for chunk in EncodedStates(encoder, judged.passages, 1).chunks(missing):
            collection.put_many([StoredPassage(passage_id, states, None) for passage_id, states in chunk.items()])


def _manifest(name: str, identity: EncoderIdentity) -> Manifest:
    return Manifest.of(identity, collection=name, compression_ratio=1, stores_text=False)


@dataclass
class Cost:
    """Of every query."""

    pairs: list[int] = field(default_factory=list)  # of prompt and passage that the model scored
    states: list[int] = field(default_factory=list)  # read for them
    compute: list[float] = field(default_factory=list)  # seconds in the model
    total: list[float] = field(default_factory=list)  # seconds of the request


def ask(client: Client, judged: JudgedCollection, found: Run, name: str, **plan: Any) -> tuple[Run, Cost]:
    """The ranking of every query, and what it cost."""
    run: Run = {}
    cost = Cost()
    for query_id, ranking in found.items():
        candidates = [passage_id for passage_id, _ in ranking]
        begin = time.perf_counter()
        answer = client.rerank(judged.queries[query_id], candidates, collection=name, timeout=600, **plan)
        cost.total.append(time.perf_counter() - begin)
        cost.compute.append(answer.summary.timings.compute_seconds)
        read = [one.num_states for result in answer for one in (result.stages or (result,)) if one.num_states]
        cost.pairs.append(len(read))
        cost.states.append(sum(read))
        rows = run_rows(answer)
        run[query_id] = rank([passage_id for passage_id, _ in rows], [margin for _, margin in rows])
    return run, cost


def plans() -> list[tuple[str, dict[str, Any]]]:
    return [(str(ratio), {"compression_ratio": ratio}) for ratio in RATIOS] + [(c, {"stages": c}) for c in CASCADES]


def measure(client: Client, judged: JudgedCollection, found: Run, name: str) -> list[list[object]]:
    """A row for the first stage and for each plan."""
    ask(client, judged, found, name, compression_ratio=RATIOS[-1])  # fills the read cache
    runs, costs = [found], [Cost([0], [0], [0.0], [0.0])]
    for _, plan in plans():
        run, cost = ask(client, judged, found, name, **plan)
        runs.append(run)
        costs.append(cost)
    values = np.stack([per_query(judged.qrels, run, 100)[HEADLINE] for run in runs], axis=1)
    bootstrap = Bootstrap(values, seed=SEED)
    finest = 1 + BASELINE
    rows: list[list[object]] = []
    for column, (plan_name, _) in enumerate([(CANDIDATES, {}), *plans()]):
        cost = costs[column]
        lost = bootstrap.difference(column, finest)
        interval = f"{lost.mean:+.3f} [{lost.low:+.3f}, {lost.high:+.3f}]" if column != finest else ""
        mean = round(float(values[:, column].mean()), 3)
        pairs, states = round(float(np.mean(cost.pairs))), round(float(np.mean(cost.states)))
        # Medians: one request that waited for the machine's other work would move a mean of fifty.
        share = round(float(np.median(cost.compute) / np.median(costs[finest].compute)), 3)
        milliseconds = [1e3 * float(x) for x in (np.median(cost.compute), *np.percentile(cost.total, (50, 99)))]
        rows.append([name, plan_name, mean, interval, pairs, states, share, *milliseconds])
    return rows


def draw(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """nDCG@10 against time in the model, one panel a collection. Needs matplotlib, of the tuning extra."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row[0] for row in rows))
    figure, panels = pyplot.subplots(1, len(names), figsize=(6 * len(names), 4.2), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        own = [row for row in rows if row[0] == name and row[1] != CANDIDATES]
        for is_cascade, label, mark in ((False, "one ratio", "o-"), (True, "cascade", "s")):
            points = [row for row in own if ("," in row[1]) is is_cascade]
            panel.plot([row[7] for row in points], [row[2] for row in points], mark, label=label)
            for row in points:
                panel.annotate(row[1], (row[7], row[2]), textcoords="offset points", xytext=(4, 4), fontsize=7)
        panel.set(title=name, xlabel="ms in the model, a query", ylabel=HEADLINE)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collections", type=Path, required=True, metavar="DIR")
    parser.add_argument("--names", default="scifact,vaswani")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--model", default=str(SHIPPED_MODEL), metavar="DIR|HUB_ID")
    parser.add_argument("--dtype", help="default: the server's own choice")
    parser.add_argument("--store", type=Path, metavar="DIR", help="keeps the indexed candidates")
    parser.add_argument("--output", default="cascade", metavar="NAME", help="results/NAME.json and docs/NAME.png")
    parser.add_argument("--index-only", action="store_true", help="fill --store and stop")
    args = parser.parse_args()
    start()
    checkpoint = Checkpoint.open(args.model)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        url = f"faiss:{args.store or folder}"
        asked: list[tuple[str, JudgedCollection, Run]] = []
        store = open_store(url)
        for name in args.names.split(","):
            judged = read_judged(args.collections / name)
            if judged.splits:
                judged = read_judged(args.collections / name, split=args.split)
            judged = judged.sample(args.queries, SEED)
            found = search(judged.passages, judged.queries, args.depth)
            index(store, judged, found, checkpoint, args.dtype, name)
            asked.append((name, judged, found))
        store.close()
        if args.index_only:
            return
        dtype = ["--dtype", args.dtype] if args.dtype else []
        cache = ["--cache-bytes", str(4 << 30)]
        with serving(Path(args.model), url, "--no-encoder", *cache, *dtype) as address, Client(address) as client:
            for name, judged, found in asked:
                rows += measure(client, judged, found, name)
                print(f"{name}: {len(found)} queries, {sum(map(len, found.values()))} candidates", flush=True)
    columns = [
        "collection", "read at", HEADLINE, "against ratio 1 [95%]", "pairs", "states", "time, of ratio 1's",
        "ms in the model", "ms p50", "ms p99",
    ]  # fmt: skip
    weights = hashlib.sha256((Path(args.model) / "model.safetensors").read_bytes()).hexdigest()[:12]
    model = f"{Path(args.model).name}, weights {weights}"
    report(args.output, columns, rows, model=model, depth=args.depth, queries=args.queries)
    draw(Path(__file__).parents[1] / "docs" / f"{args.output}.png", rows)


if __name__ == "__main__":
    main()
