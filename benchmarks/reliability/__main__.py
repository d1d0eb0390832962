"""Injects faults and counts what went wrong without being said; the counts stand in docs/reliability.md.

    python -m benchmarks.reliability [PART ...] [--count N] [--seed N]

A part is a module of this package with `run(count, seed)`; without PART all of them run. A run is reproducible: the
seed decides every fault. Each part writes benchmarks/results/reliability-PART.json; `python -m benchmarks --docs`
writes them into the page.
"""

from __future__ import annotations

import argparse
import importlib

from benchmarks.common import report

PARTS: dict[str, int] = {  # name: the count of a long run
    "checkpoints": 2500,
    "damage": 5000,
    "kills": 1000,
    "redis_damage": 3000,
    "redis_wire": 1100,
    "unicode": 1000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[*PARTS, []], help=", ".join(PARTS))
    parser.add_argument("--count", type=int, help="faults to inject (default: by part)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.parts or PARTS:
        part = importlib.import_module(f"benchmarks.reliability.{name}")
        rows = part.run(args.count or PARTS[name], args.seed)
        report(f"reliability-{name}", list(rows[0]), [list(row.values()) for row in rows], seed=args.seed)


if __name__ == "__main__":
    main()
