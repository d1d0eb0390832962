"""Every benchmark in one place, with the minutes it takes on two cores.

python -m benchmarks              lists the commands
python -m benchmarks --docs       draws what was measured, and writes its tables into docs/
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.common import hardware_line, read_result, result_path, rows_table, table

DOCS = Path(__file__).parent.parent / "docs"
COMMANDS = {  # minutes
    "benchmarks.side_by_side": 3,
    "benchmarks.scaling": 7,
    "benchmarks.collection_size": 4,
    "benchmarks.clients --model nano": 2,
    "benchmarks.clients --model mini": 1,
    "benchmarks.online": 3,
    "benchmarks.memory": 2,
    "benchmarks.indexing": 1,
    "benchmarks.store_read": 1,
    "benchmarks.backends": 4,
    "benchmarks.bodies": 3,
    "benchmarks.many --model nano --candidates 12": 4,
    "benchmarks.many --model mini": 2,
    "benchmarks.lookup --model nano": 6,
    "benchmarks.lookup --model mini": 1,
    "benchmarks.trace": 7,
    "benchmarks.steps": 1,
}
OTHERS = "reliability, codecs, clipping, cascade, overload, keepalive, cross_encoder_runtimes, int8_products"
PLOTS = {  # under the table of which result: what draws it, where, and what it shows
    "scaling": ("benchmarks.scaling", "scaling.png", "cost by candidates, length and ratio"),
    "collection_size": ("benchmarks.collection_size", "collection-size.png", "reading 100 passages, and bytes"),
    "clients-mini": ("benchmarks.clients", "clients.png", "latency and throughput by concurrent clients"),
}
MARKED = re.compile(r"<!-- (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def block(match: re.Match[str]) -> str:
    """What a page says between the marks of one result."""
    name = match["name"]
    if not result_path(name).exists():
        return match[0]
    result = read_result(name)
    tables = getattr(importlib.import_module(f"benchmarks.{name.partition('-')[0]}"), "tables", rows_table)
    text = f"{tables(result)}\n\n{hardware_line(result['hardware'])}."
    if name in PLOTS:
        module, png, shows = PLOTS[name]
        subprocess.run([sys.executable, "-m", module, "--plot", str(DOCS / png)], check=True, cwd=DOCS.parent)
        text += f"\n\n![{shows}]({png})"
    return f"<!-- {name} -->\n\n{text}\n\n<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="draw what was measured and write its tables into docs/")
    args = parser.parse_args()
    if not args.docs:
        print(
            table(["command", "minutes"], [[f"python -m {command}", minutes] for command, minutes in COMMANDS.items()])
        )
        print(f"\nThe others take arguments; --help says which: {OTHERS}")
        return
    for name in ("benchmarks.md", "reliability.md"):
        page = DOCS / name
        page.write_text(MARKED.sub(block, page.read_text()))


if __name__ == "__main__":
    main()
