"""`preread evaluate`, `tune`, `check`: how well a checkpoint ranks, and whether its scores are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from encoder_worker.config import CollectionSettings
from preread_cli import flags
from preread_cli.failures import BAD_ITEMS, CommandFailed
from preread_cli.flags import option
from preread_cli.models import compute_options, model_argument, model_option
from preread_cli.terminal import ProgressDisplay, print_some
from preread_edge.outputs import is_stdout, write_output
from preread_edge.tables import print_parts
from tuning.config import EvaluationSettings, Limits, MeasuringSettings, SweepSettings

if TYPE_CHECKING:
    from tuning.health import HealthReport
    from tuning.judged import JudgedCollection
    from tuning.report import EvaluationReport
    from tuning.score import RunReport
    from tuning.sweep.report import SweepReport


def _folder(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    if str(path) == "-":
        raise click.BadParameter("-: several files are written; expected a folder", ctx, param)
    return path


_OF_MODELS = (
    "model", "device", "dtype", "read_control_tokens", "threads", "collection", "ratios", "teacher", "split",
    "instruction", "run_out",
)  # fmt: skip
_INTO: dict[str, Any] = {"metavar": "DIR", "type": click.Path(file_okay=False, path_type=Path), "callback": _folder}


def _judged_options(settings: type[MeasuringSettings]) -> Callable[[flags.F], flags.F]:
    return flags.options_of(
        click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path)),
        option("--corpus", type=flags.FILE, help="Passages, instead of the folder's corpus.jsonl[.gz]."),
        option("--queries", type=flags.FILE, help="Queries, instead of the folder's queries.jsonl[.gz]."),
        option("--qrels", type=flags.FILE, help="Judgements (BEIR or TREC columns, or JSON lines), not the folder's."),
        option("--run", "run_file", type=flags.FILE, help="Rerank the candidates of this TREC run instead of BM25's."),
        option("--queries-split", metavar="NAME", help="Only queries of qrels/NAME.tsv, or with this `split`."),
        flags.knob_options(settings),
        flags.store,
        model_option,
        compute_options,
        option("--run-out", **_INTO, help="Write TREC run files."),
    )


@click.command()
@_judged_options(EvaluationSettings)
@flags.collection(help="Read states from this indexed collection instead of encoding the passages.")
@option("--score-only", metavar="RUN", type=flags.FILE, help="Measure this finished TREC run; no model is loaded.")
@flags.as_json
@flags.json_file
@click.pass_context
def evaluate(ctx: click.Context, /, **options: Any) -> None:
    """Measure how well a checkpoint reranks a judged collection.

    FOLDER is in BEIR's layout: corpus.jsonl, queries.jsonl, and qrels.tsv or qrels/test.tsv; .gz will do.
    BM25 finds candidates, the checkpoint reranks them at each compression ratio, and nDCG@10, MRR@10 and
    recall are shown with bootstrap intervals, against BM25 on the same queries. --score-only measures a run
    that is there already, against that of --run if it is given; judgements will do for it, or FOLDER.

    \b
    Examples:
      preread evaluate scifact/ --queries-split validation
      preread evaluate scifact/ --teacher minilm --ratios 1,4,16 --json-file scifact.json
      preread evaluate --corpus corpus.jsonl --queries queries.jsonl --qrels qrels.txt --run first-stage.run
      preread evaluate scifact/ --collection scifact --store redis://localhost
      preread evaluate --qrels qrels.txt --score-only reranked.run --run bm25.run
    """
    settings, json_file = flags.from_options(EvaluationSettings, options), options["json_file"]
    if options["score_only"] is not None:
        _print_report(_scored(ctx, settings), options)
        return
    from tuning.evaluate import evaluate as run

    with _inputs(options, json_file.parent if json_file is not None else None) as inputs:
        report = run(settings=settings, **inputs)
    _print_report(report, options)
    if options["run_out"] is not None:
        report.write_runs(options["run_out"])


def _scored(ctx: click.Context, settings: EvaluationSettings) -> RunReport:
    """The report of --score-only. UsageError: a flag that is about a model."""
    from tuning.score import score_run
    from tuning.trec import read_run

    options = ctx.params
    if named := flags.typed(ctx).intersection(_OF_MODELS):
        raise click.UsageError(f"--score-only loads no model; --{min(named).replace('_', '-')} is about one.")
    judged = _judged(options, need_corpus=False, need_queries=False)
    if options["run_file"] is not None:
        judged = replace(judged, candidates=read_run(options["run_file"]))
    return score_run(judged, read_run(options["score_only"]), settings)


@click.command()
@_judged_options(SweepSettings)
@option("--ignore-qrels", is_flag=True, help="Judge by the ranking at r = 1, as is done without judgements.")
@flags.collection(help="Take the passages of this indexed collection instead of a corpus.")
@flags.knob_options(Limits)
@option(
    "--out", **_INTO, default=Path("preread-tune"), help="For report.html, tune.json, plots, the chosen preread.toml."
)
@option("--work-dir", **_INTO, help="Keeps states and margins: a killed run resumes.  [default: work/ in --out]")
@option("--all", "show_all", is_flag=True, help="Show every configuration in the terminal, not only the best.")
@flags.as_json
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
      preread index passages.jsonl --collection docs-2 --alias docs --config preread-tune/preread.toml
      preread serve --config preread-tune/preread.toml
    """
    import tuning.sweep.page  # noqa: F401 - packages that it lacks show now, not after hours
    from tuning.sweep.tune import tune as run

    settings, limits = flags.from_options(SweepSettings, options), flags.from_options(Limits, options)
    if limits.max_latency_seconds is not None and not settings.timed_queries:
        raise click.UsageError("--max-latency needs --timed-queries of at least 1.")
    out: Path = options["out"]
    with _inputs(options, out, need_qrels=False) as inputs:
        report = run(settings=settings, work_dir=options["work_dir"] or out / "work", **inputs)
    if options["run_out"] is not None:
        report.write_runs(options["run_out"])
    named = ctx.get_parameter_source("model") is not ParameterSource.DEFAULT
    _show_sweep(report, limits, out, options["model"] if named else None, options)


def _judged(options: Mapping[str, Any], **needs: bool) -> JudgedCollection:
    """Of the files that are named; says on standard error which of their lines are left out."""
    from tuning.judged import read_judged

    given: dict[str, Any] = {name: options[name] for name in ("corpus", "queries", "qrels")} | needs
    judged = read_judged(options["folder"], split=options["queries_split"], **given)
    print_some("refused", judged.refused, err=True)
    return judged


@contextmanager
def _inputs(options: Mapping[str, Any], out: Path | None, *, need_qrels: bool = True) -> Iterator[dict[str, Any]]:
    """Arguments of both runs; makes the folders."""
    from cache.collection import Collection
    from cache.open import open_store
    from checkpoint.compute import tune_process
    from tuning.evaluate import open_checkpoint
    from tuning.trec import read_run

    tune_process(options["threads"])
    judged = _judged(options, need_corpus=options["collection"] is None, need_qrels=need_qrels)
    if options.get("ignore_qrels"):
        judged = replace(judged, qrels={}, num_judgements_of_unknown_queries=0, unknown_queries=())
    for folder in (out, options["run_out"]):
        if folder is not None:  # now, not after hours
            folder.mkdir(parents=True, exist_ok=True)
    candidates = read_run(options["run_file"]) if options["run_file"] is not None else None
    with ExitStack() as stack:
        stored = None
        if options["collection"] is not None:
            opened = open_store(options["store"], read_budget_seconds=flags.BATCH_READ_SECONDS)
            stored = Collection.open(stack.enter_context(closing(opened)), options["collection"])
        yield {
            "judged": replace(judged, candidates=candidates, stored=stored),
            "model": open_checkpoint(options["model"], stored, read_control_tokens=options["read_control_tokens"]),
            "device": options["device"],
            "dtype": options["dtype"],
            "progress": stack.enter_context(ProgressDisplay()),
        }


def _show_sweep(report: SweepReport, limits: Limits, out: Path, model: str | None, options: Mapping[str, Any]) -> None:
    from tuning.sweep.outputs import config_toml, print_sweep, sweep_json
    from tuning.sweep.page import write_page
    from tuning.sweep.summary import Choice, SweepSummary

    choice = Choice.among(limits, report.rows) if limits.given else None
    summary = SweepSummary(report, limits, choice)
    document, as_json = sweep_json(summary), options["as_json"]
    write_output(out / "tune.json", document)
    write_page(out, summary)
    if as_json:
        click.echo(document, nl=False)
    else:
        print_sweep(summary, show_all=options["show_all"])
    print_parts(f"Report: {out / 'report.html'}", err=as_json)
    config = out / "preread.toml"
    if choice is not None and not choice.broken:
        text = config_toml(summary, choice.row, model, control_tokens=options["read_control_tokens"])
        write_output(config, text)
        print_parts(f"Configuration: {config}, for preread index --config and preread serve --config", err=as_json)
        return
    config.unlink(missing_ok=True)  # of an earlier run: it would not be this one's choice
    if choice is not None:
        nearest = f"{choice.row.configuration.name}: {choice.explanation}"
        raise CommandFailed(f"no configuration keeps the limits; the nearest is {nearest}")


@click.command()
@model_argument
@option(
    "--against",
    metavar="fp32|DIR|HUB_ID",
    default="fp32",
    help="Whose scores to expect: fp32, a plain float32 pass over the same weights; or another model.",
)
@flags.pairs
@flags.as_json
@flags.json_file
@option("--runtime", metavar="NAME", default="torch", help="Runtime of a cross-encoder, as in `preread serve`.")
@option("--profile", metavar="NAME|TOML", default="", help="A cross-encoder's profile, instead of its default one.")
@option("--max-tokens", type=flags.COUNT, help="A cross-encoder's limit, instead of its profile's.")
@option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint.")
@flags.knob_options(CollectionSettings, only=["codec"])
@option("--compression-ratio", type=flags.COUNT, help="fbnl: tokens per state.  [default: the checkpoint's]")
@compute_options
@click.pass_context
def check(ctx: click.Context, /, model: str, **options: Any) -> None:
    """Check whether a model's scores are the right ones.

    A model served in the wrong way usually still returns numbers. This compares them with a plain float32
    pass over the same weights and with published scores, looks for the marks of known faults, and names the
    likely cause. Without DIR, checks the checkpoint that comes with preread.

    \b
    Examples:
      preread check
      preread check BAAI/bge-reranker-v2-m3 --dtype bfloat16
      preread check ./ctxl-1b --against ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b
      preread check ./my-model --pairs pairs.jsonl --json-file health.json

    \b
    Exit codes: 0 healthy, 1 not, 2 bad input.
    """
    from checkpoint.compute import tune_process
    from decoder_server.config import ModelConfig
    from tuning import health

    limit, json_file = options["max_tokens"], options["json_file"]
    config = flags.from_options(ModelConfig, options, checkpoint=model, max_passage_tokens=limit)
    tune_process(options["threads"])
    pairs = health.PairSet.read(options["pairs"])
    if json_file is not None:  # now, not after minutes
        json_file.parent.mkdir(parents=True, exist_ok=True)
    how = {"against": options["against"], "codec": options["codec"], "ratio": options["compression_ratio"]}
    with ProgressDisplay() as progress:
        report = health.check(config, pairs=pairs, progress=progress, **how)
    _print_report(report, options)
    if not report.passed:
        ctx.exit(BAD_ITEMS)


def _print_report(report: EvaluationReport | RunReport | HealthReport, options: Mapping[str, Any]) -> None:
    """The report as tables, or with --json, or where --json-file is standard output, as JSON; and into that file."""
    files = [file for file in (Path("-") if options["as_json"] else None, options["json_file"]) if file is not None]
    if not any(map(is_stdout, files)):
        report.print()
    for file in dict.fromkeys(files):
        write_output(file, report.to_json())
