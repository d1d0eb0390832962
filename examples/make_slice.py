"""Cuts a small judged collection out of a large one: a split's queries, their relevant passages, distractors.

    python examples/make_slice.py DIR_IN DIR_OUT --split validation --num-passages 1200

Both directories are in BEIR's layout. Distractors are what BM25 finds for the queries, best first and in turn,
so that the slice is no easier for a first stage than the collection it comes from. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tuning.baselines import search
from tuning.judged import JudgedCollection, read_judged
from tuning.trec import JudgedFile


def choose(judged: JudgedCollection, num_passages: int) -> set[str]:
    """Ids of all relevant passages, filled up with BM25's best of every query, second best of every query, ..."""
    chosen = {passage_id for grades in judged.qrels.values() for passage_id in grades}
    run = search(judged.passages, judged.queries, top_k=num_passages)
    for rank in range(num_passages):
        for ranking in run.values():
            if len(chosen) >= num_passages:
                return chosen
            if rank < len(ranking):
                chosen.add(ranking[rank][0])
    return chosen


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, gzipped without name and time so that the bytes depend on the rows alone."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description="Cuts a small judged collection out of a large one.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--num-passages", type=int, default=1200)
    arguments = parser.parse_args()

    judged = read_judged(arguments.source, split=arguments.split)
    chosen = choose(judged, arguments.num_passages)
    arguments.target.mkdir(parents=True, exist_ok=True)
    corpus = (row for _, row in JudgedFile(arguments.source / "corpus.jsonl.gz").rows() if str(row["_id"]) in chosen)
    write_rows(arguments.target / "corpus.jsonl.gz", corpus)
    queries = ({"_id": query_id, "text": text} for query_id, text in judged.queries.items())
    write_rows(arguments.target / "queries.jsonl.gz", queries)
    with (arguments.target / "qrels.tsv").open("w", encoding="utf-8") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for query_id, grades in judged.qrels.items():
            file.writelines(f"{query_id}\t{passage_id}\t{grade}\n" for passage_id, grade in grades.items())
    print(f"{len(chosen)} passages, {len(judged.queries)} queries, {sum(map(len, judged.qrels.values()))} judgements")


if __name__ == "__main__":
    main()
