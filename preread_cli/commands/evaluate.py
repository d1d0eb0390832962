"""`preread evaluate`, `preread tune`: how well a checkpoint ranks a judged collection, at which ratio and codec."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from preread_cli.failures import CommandFailed
from preread_cli.models import compute_options, model_option
from preread_cli.options import (
    BATCH_READ_SECONDS,
    FILE,
    F,
    collection_option,
    from_options,
    json_file_option,
    knob_options,
    option,
    options_of,
    store_option,
)
from preread_cli.terminal import print_report, print_some
from tuning.config import EvaluationSettings, GridSettings, Limits, MeasuringSettings

if TYPE_CHECKING:
    from tuning.judged import JudgedCollection
    from tuning.sweep.report import SweepReport


class _OutputFolder(click.Path):
    """A folder to write into; made where there is none."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) == "-":
            self.fail("-: several files are written; expected a folder", param, ctx)
        return super().convert(value, param, ctx)


def _judged_options(settings: type[MeasuringSettings]) -> Callable[[F], F]:
    return options_of(
        click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path)),
        option("--corpus", type=FILE, help="Passages, instead of the folder's corpus.jsonl[.gz]."),
        option("--queries", type=FILE, help="Queries, instead of the folder's queries.jsonl[.gz]."),
        option("--qrels", type=FILE, help="Judgements (BEIR or TREC columns, or JSON lines), instead of the folder's."),
        option("--run", "run_file", type=FILE, help="Rerank the candidates of this TREC run file instead of BM25's."),
        option(
            "--queries-split",
            metavar="NAME",
            help="Only queries of qrels/NAME.tsv, or with this `split` in queries.jsonl.",
        ),
        knob_options(settings),
        store_option,
        model_option,
        compute_options,
        option("--run-out", metavar="DIR", type=_OutputFolder(), help="Write TREC run files."),
    )


@click.command()
@_judged_options(EvaluationSettings)
@collection_option(help="Read states from this indexed collection instead of encoding the passages.")
@json_file_option
def evaluate(**options: Any) -> None:
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
    from checkpoint.compute import tune_process
    from tuning.evaluate import evaluate as run

    tune_process(options["threads"])
    settings = from_options(EvaluationSettings, options)
    judged = _judged(options)
    json_file: Path | None = options["json_file"]
    _make_folders(options["run_out"], json_file.parent if json_file is not None else None)
    with _inputs(options, judged) as inputs:
        report = run(settings=settings, **inputs)
    print_report(report, json_file)
    if options["run_out"] is not None:
        report.write_runs(options["run_out"])


@click.command()
@_judged_options(GridSettings)
@option("--ignore-qrels", is_flag=True, help="Take the ranking at r = 1 for the judgement, as where there are none.")
@collection_option(help="Take the passages of this indexed collection instead of a corpus.")
@knob_options(Limits)
@option(
    "--out",
    metavar="DIR",
    type=_OutputFolder(),
    default=Path("preread-tune"),
    help="Where report.html, tune.json, plots and the chosen preread.toml go.",
)
@option(
    "--work-dir",
    metavar="DIR",
    type=_OutputFolder(),
    help="Where states and margins are kept, for a run that goes on.  [default: work/ in --out]",
)
@option("--all", "show_all", is_flag=True, help="Show every configuration in the terminal, not the best ones alone.")
@click.pass_context
def tune(ctx: click.Context, /, **options: Any) -> None:
    """Choose stored ratio, codec and read ratio by measuring them.

    FOLDER is in BEIR's layout: corpus.jsonl, queries.jsonl, and qrels.tsv or qrels/test.tsv; .gz will do.
    Passages are encoded once; their states are pooled, coded and scored in every combination. Without
    judgements the ranking at r = 1, uncompressed, is the reference for the others.

    \b
    Examples:
      preread tune scifact/ --max-loss 1%
      preread tune --collection docs --queries queries.jsonl --max-bytes 8KiB --max-latency 50ms
      preread tune scifact/ --stored-ratios 4 --codecs "SQ8 B32,SQ4" --cascades "32:20,4"
    \b
    and then, with what it chose:
      preread index passages.jsonl --collection docs --config preread-tune/preread.toml
      preread serve --config preread-tune/preread.toml
    """
    import tuning.sweep.page  # noqa: F401 - packages that it lacks show now, not after hours
    from checkpoint.compute import tune_process
    from tuning.sweep.settings import SweepSettings
    from tuning.sweep.tune import tune as run

    tune_process(options["threads"])
    settings = from_options(SweepSettings, options)
    limits = from_options(Limits, options)
    if limits.max_latency_seconds is not None and not settings.timed_queries:
        raise click.UsageError("--max-latency needs --timed-queries of at least 1.")
    judged = _judged(options, need_qrels=False)
    if options["ignore_qrels"]:
        judged = judged.without_judgements()
    out: Path = options["out"]
    _make_folders(out, options["run_out"])
    with _inputs(options, judged) as inputs:
        report = run(settings=settings, work_dir=options["work_dir"] or out / "work", **inputs)
    if options["run_out"] is not None:
        report.write_runs(options["run_out"])
    named = ctx.get_parameter_source("model") is not ParameterSource.DEFAULT
    _show_sweep(report, limits, out, options["model"] if named else None, options)


def _judged(options: Mapping[str, Any], *, need_qrels: bool = True) -> JudgedCollection:
    """Passages, queries and judgements; lines that are left out are said on standard error."""
    from tuning.judged import read_judged

    judged = read_judged(
        options["folder"],
        corpus=options["corpus"],
        queries=options["queries"],
        qrels=options["qrels"],
        split=options["queries_split"],
        need_corpus=options["collection"] is None,
        need_qrels=need_qrels,
    )
    print_some("refused", judged.refused, err=True)
    return judged


def _make_folders(*folders: Path | None) -> None:
    """Now, not after hours."""
    for folder in folders:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _inputs(options: Mapping[str, Any], judged: JudgedCollection) -> Iterator[dict[str, Any]]:
    """Arguments of both runs: queries with candidates and store, the model, where to compute, and a bar."""
    from cache.collection import Collection
    from cache.open import open_store
    from tuning.evaluate import open_checkpoint
    from tuning.progress import TerminalProgress
    from tuning.trec import read_run

    candidates = read_run(options["run_file"]) if options["run_file"] is not None else None
    with ExitStack() as stack:
        stored = None
        if options["collection"] is not None:
            store = stack.enter_context(closing(open_store(options["store"], read_budget_seconds=BATCH_READ_SECONDS)))
            stored = Collection.open(store, options["collection"])
        yield {
            "judged": replace(judged, candidates=candidates, stored=stored),
            "model": open_checkpoint(options["model"], stored, read_control_tokens=options["read_control_tokens"]),
            "device": options["device"],
            "dtype": options["dtype"],
            "progress": stack.enter_context(TerminalProgress()),
        }


def _show_sweep(report: SweepReport, limits: Limits, out: Path, model: str | None, options: Mapping[str, Any]) -> None:
    """The files, the table, and the choice."""
    from preread_edge.outputs import write_output
    from tuning.sweep.page import write_page
    from tuning.sweep.report import Choice

    choice = Choice.among(limits, report.rows) if limits.given else None
    write_output(out / "tune.json", report.to_json(limits, choice))
    write_page(out, report, limits, choice)
    report.print(choice, show_all=options["show_all"])
    click.echo(f"Report: {out / 'report.html'}")
    config = out / "preread.toml"
    if choice is not None and not choice.broken:
        toml = report.config_toml(choice.row, model, control_tokens=options["read_control_tokens"])
        write_output(config, toml)
        click.echo(f"Chosen: {choice.row.configuration.name}; {config} is for preread index and serve --config.")
        return
    config.unlink(missing_ok=True)  # of an earlier run: it would not be this one's choice
    if choice is not None:
        nearest = f"{choice.row.configuration.name}: {choice.explanation}"
        raise CommandFailed(f"no configuration keeps the limits; the nearest is {nearest}")
