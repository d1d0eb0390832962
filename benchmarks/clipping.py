"""What a table that was trained on few or odd passages cuts off, and what that does to margins.

    python -m benchmarks.clipping [--checkpoint DIR] [--collection DIR] [--ratios 1,4,32]

Codecs are trained on the states of 100 passages of the collection, and on those of 12 uniform passages (one word,
repeated); then other passages go through them. `outside` is the share of numbers that Codec.count_outside counts,
`noise` the mean absolute change of a margin over the standard deviation of a query's margins.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.codecs import compare
from benchmarks.codecs_workload import Sizes, Workload
from benchmarks.common import CACHE, report, start
from cache.codecs import Codec
from encoder_worker.passage_encoder import PassageEncoder
from preread_cli.terminal import ProgressDisplay

CODECS = ("SQ8", "SQ4", "PQ96")
WORDS = ("cat", "moon", "cell", "the", "protein", "tree", "risk", "blue", "one", "mouse", "gene", "water")
NUM_TRAINING = 100


def uniform(checkpoint: str, ratio: int) -> NDArray[np.float32]:
    """States of passages that repeat one word, (num_states, dim)."""
    encoder = PassageEncoder.load(checkpoint, dtype="float32")
    return np.concatenate([encoder.encode_one(" ".join([word] * 200), ratio).states for word in WORDS])


def measure(args: argparse.Namespace) -> None:
    start()
    rows = []
    with ProgressDisplay() as progress:
        sizes = Sizes(args.queries, args.candidates, NUM_TRAINING)
        workload = Workload(args.checkpoint, args.collection, sizes, args.work, progress)
        advance = progress.begin("codecs", len(args.ratios) * 2 * len(CODECS), "codecs")
        for ratio in args.ratios:
            reference = workload.margins("reference", ratio, lambda states: states)
            others = np.concatenate([states.states for _, states in workload.states(workload.scored, ratio)])
            samples = {
                f"{NUM_TRAINING} passages": workload.sample(ratio, 1 << 20),
                f"{len(WORDS)} uniform passages": uniform(args.checkpoint, ratio),
            }
            for trained_on, sample in samples.items():
                for name in CODECS:
                    advance(1)
                    codec = Codec(name, workload.dim)
                    if len(sample) < codec.min_training_states:  # it cannot be trained on so few
                        continue
                    codec.train(sample)
                    outside = codec.count_outside(others, codec.encode(others)).sum() / others.size
                    key = f"{name}-{trained_on}".replace(" ", "-")
                    margins = workload.margins(key, ratio, lambda states, c=codec: c.decode(c.encode(states)))
                    _, _, noise, tau, top, *_ = compare(workload, reference, reference, margins)
                    rows.append([trained_on, name, ratio, f"{outside:.2%}", noise, tau, top])
    columns = ["trained on", "codec", "r", "outside", "noise", "tau", "top 10"]
    report("clipping", columns, rows, queries=args.queries, candidates=args.candidates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="preread/models/preread-mini")
    parser.add_argument("--collection", type=Path, default=Path("examples/scifact"), help="a BEIR folder")
    parser.add_argument("--queries", type=int, default=6)
    parser.add_argument("--candidates", type=int, default=20, help="of each query")
    parser.add_argument("--ratios", type=lambda text: [int(r) for r in text.split(",")], default=[1, 4, 32])
    parser.add_argument("--work", type=Path, default=CACHE / "codecs", help="states and margins are kept here")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
