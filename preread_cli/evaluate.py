"""`preread evaluate`: how well a checkpoint ranks a judged collection, and how sure that is."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from preread_cli.options import (
    Integers,
    OutputFolder,
    collection_option,
    compute_options,
    control_tokens_option,
    model_option,
    option,
    store_option,
)

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
READ_SECONDS = 30.0  # nobody waits for one answer: a slow store is better than one given up on


@click.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@option("--corpus", type=FILE, help="Passages, instead of the folder's corpus.jsonl[.gz].")
@option("--queries", type=FILE, help="Queries, instead of the folder's queries.jsonl[.gz].")
@option("--qrels", type=FILE, help="Judgements (BEIR or TREC columns, or JSON lines), instead of the folder's.")
@option("--run", "run_file", type=FILE, help="Rerank the candidates of this TREC run file instead of BM25's.")
@option("--top-k", type=click.IntRange(min=1), default=50, help="Candidates per query.")
@option(
    "--ratios", type=Integers(), help="Compression ratios to read passages at. Without it, 1 (or the stored one) to 32."
)
@option("--split", is_flag=True, help="Read long passages in windows, instead of cutting them; the best window counts.")
@option("--instruction", metavar="TEXT", help='Task instruction, instead of the checkpoint\'s own; "" for none.')
@option("--teacher", metavar="minilm", help="Also rank the same candidates with all-MiniLM-L6-v2 (preread[teacher]).")
@option(
    "--queries-split", metavar="NAME", help="Only queries of qrels/NAME.tsv, or with this `split` in queries.jsonl."
)
@option("--max-queries", type=click.IntRange(min=1), help="Draw that many queries.")
@option("--min-grade", type=click.IntRange(min=1), default=1, help="Grade from which MRR and recall count a passage.")
@option("--seed", type=int, default=0, help="Of the drawn queries and the bootstrap.")
@collection_option(required=False, help="Read states from this indexed collection instead of encoding the passages.")
@store_option
@model_option
@control_tokens_option
@compute_options
@option(
    "--json-file",
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write everything to this file; - prints it instead of the table.",
)
@option("--run-out", metavar="DIR", type=OutputFolder(), help="Write TREC run files.")
def command(
    folder: Path | None,
    corpus: Path | None,
    queries: Path | None,
    qrels: Path | None,
    run_file: Path | None,
    top_k: int,
    ratios: tuple[int, ...] | None,
    split: bool,
    instruction: str | None,
    teacher: str | None,
    queries_split: str | None,
    max_queries: int | None,
    min_grade: int,
    seed: int,
    collection: str | None,
    store: str,
    model: str,
    read_control_tokens: bool,
    device: str,
    dtype: str,
    threads: int | None,
    json_file: Path | None,
    run_out: Path | None,
) -> None:
    """Measure how well a checkpoint reranks a judged collection.

    FOLDER is in BEIR's layout: corpus.jsonl, queries.jsonl, and qrels.tsv or qrels/test.tsv; .gz will do.
    BM25 finds candidates, the checkpoint reranks them at each compression ratio, and nDCG@10, MRR@10 and
    recall are shown with bootstrap intervals, against BM25 on the same queries.

    \b
    Examples:
      preread evaluate scifact/ --queries-split validation
      preread evaluate scifact/ --teacher minilm --ratios 1,4,16 --json scifact.json
      preread evaluate --corpus corpus.jsonl --queries queries.jsonl --qrels qrels.txt --run first-stage.run
      preread evaluate scifact/ --collection scifact --store redis://localhost
    """
    from cache.collection import Collection
    from cache.open import open_store
    from checkpoint.compute import tune_process
    from preread_cli.inputs import tell_refused
    from preread_edge.outputs import is_stdout, write_output
    from tuning.evaluate import evaluate, open_checkpoint
    from tuning.judged import read_judged
    from tuning.progress import TerminalProgress
    from tuning.report import EvaluationSettings, print_report
    from tuning.trec import read_run

    tune_process(threads)
    settings = EvaluationSettings(
        ratios=ratios,
        top_k=top_k,
        split=split,
        instruction=instruction,
        teacher=teacher,
        max_queries=max_queries,
        min_grade=min_grade,
        seed=seed,
    )
    judged = read_judged(
        folder, corpus=corpus, queries=queries, qrels=qrels, split=queries_split, need_corpus=collection is None
    )
    tell_refused(judged.refused)
    for folder_out in (run_out, json_file.parent if json_file is not None else None):
        if folder_out is not None:  # now, not after hours
            folder_out.mkdir(parents=True, exist_ok=True)
    candidates = read_run(run_file) if run_file is not None else None
    with ExitStack() as stack:
        stored = None
        if collection is not None:
            opened = open_store(store, read_budget_seconds=READ_SECONDS)
            stack.callback(opened.close)
            stored = Collection.open(opened, collection)
        progress = stack.enter_context(TerminalProgress())
        checkpoint = open_checkpoint(model, stored, read_control_tokens=read_control_tokens)
        report = evaluate(
            judged,
            checkpoint,
            settings,
            candidates=candidates,
            stored=stored,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    if json_file is None or not is_stdout(json_file):
        print_report(report)
    if json_file is not None:
        write_output(json_file, report.to_json())
    if run_out is not None:
        report.write_runs(run_out)
