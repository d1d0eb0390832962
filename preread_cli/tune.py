"""`preread tune`: which stored ratio, codec and read ratio, measured on one's own passages and queries."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from preread_cli.failures import BAD_INPUT, CommandFailed
from preread_cli.options import (
    DURATION,
    SHARE,
    SIZE,
    Integers,
    OutputFolder,
    Words,
    collection_option,
    compute_options,
    control_tokens_option,
    model_option,
    option,
    store_option,
)

if TYPE_CHECKING:
    from tuning.sweep.report import Limits, SweepReport
    from tuning.sweep.settings import SweepSettings

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
READ_SECONDS = 30.0  # nobody waits for one answer: a slow store is better than one given up on


@click.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@option("--corpus", type=FILE, help="Passages, instead of the folder's corpus.jsonl[.gz].")
@option("--queries", type=FILE, help="Queries, instead of the folder's queries.jsonl[.gz].")
@option("--qrels", type=FILE, help="Judgements (BEIR or TREC columns, or JSON lines), instead of the folder's qrels.")
@option("--ignore-qrels", is_flag=True, help="Take the ranking at r = 1 for the judgement, as where there are none.")
@collection_option(required=False, help="Take the passages of this indexed collection instead of a corpus.")
@store_option
@option("--run", "run_file", type=FILE, help="Rerank the candidates of this TREC run file instead of BM25's.")
@option("--top-k", type=click.IntRange(min=1), default=50, help="Candidates per query.")
@option(
    "--queries-split", metavar="NAME", help="Only queries of qrels/NAME.tsv, or with this `split` in queries.jsonl."
)
@option("--max-queries", type=click.IntRange(min=1), help="Draw that many queries.")
@option("--min-grade", type=click.IntRange(min=1), default=1, help="Grade from which a passage counts as relevant.")
@option("--stored-ratios", type=Integers(), help="Tokens per stored state.  [default: 1,2,4,8]")
@option(
    "--codecs",
    type=Words(),
    help="Codecs, blanks between them.  [default: Flat SQfp16 SQ8 B32,SQ4 and PQ at two sizes]",
)
@option("--read-ratios", type=Integers(), help="Ratios to read stored states at.  [default: 1,2,4,8,16,32]")
@option(
    "--cascades",
    type=Words(),
    metavar="STAGES ...",
    help="Stages, blanks between cascades: 32:20,4 reads all at 32, and the best 20 at 4; none: no cascades.  "
    "[default: four shapes]",
)
@option("--overlap-k", type=click.IntRange(min=1), default=10, help="How many of the top are compared with r = 1's.")
@option(
    "--few-samples",
    type=click.Choice(["fallback", "refuse"]),
    default="fallback",
    help="For a codec with too few states to train on SQfp16 stands in, with a note; or the run ends.",
)
@option("--split", is_flag=True, help="Read long passages in windows, instead of cutting them; the best window counts.")
@option("--instruction", metavar="TEXT", help='Task instruction, instead of the checkpoint\'s own; "" for none.')
@option("--max-loss", type=SHARE, metavar="PERCENT", help="Choose: nDCG@10 lost against r = 1, at most. 1%")
@option("--sure", is_flag=True, help="The worse end of the loss's 95% interval must keep --max-loss, not its mean.")
@option("--max-bytes", type=SIZE, metavar="BYTES", help="Choose: stored bytes of a passage in the mean, at most. 8KiB")
@option("--max-latency", type=DURATION, metavar="TIME", help="Choose: p99 of a rerank of --top-k, at most. 50ms")
@option(
    "--prefer",
    type=click.Choice(["bytes", "latency", "quality"]),
    help="What decides among those that keep the limits.  [default: bytes with --max-loss, else quality]",
)
@option("--timed-queries", type=click.IntRange(min=0), default=20, help="Queries to time; 0: time nothing.")
@option("--rounds", type=click.IntRange(min=1), default=3, help="How often each of them is timed.")
@option("--seed", type=int, default=0, help="Of the drawn queries, the codecs' training samples and the bootstrap.")
@model_option
@control_tokens_option
@compute_options
@option(
    "--out",
    metavar="DIR",
    type=OutputFolder(),
    default=Path("preread-tune"),
    help="Where report.html, tune.json, plots and the chosen preread.toml go.",
)
@option(
    "--work-dir",
    metavar="DIR",
    type=OutputFolder(),
    help="Where states and margins are kept, for a run that goes on.  [default: work/ in --out]",
)
@option("--run-out", metavar="DIR", type=OutputFolder(), help="Write TREC run files.")
@option("--all", "show_all", is_flag=True, help="Show every configuration in the terminal, not the best ones alone.")
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Choose stored ratio, codec and read ratio by measuring them.

    FOLDER is in BEIR's layout: corpus.jsonl, queries.jsonl, and qrels.tsv or qrels/test.tsv; .gz will do.
    Passages are encoded once; their states are pooled, coded and read in every combination. Without
    judgements the ranking at r = 1, uncompressed, is what the others are compared with.

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
    from cache.collection import Collection
    from cache.open import open_store
    from checkpoint.compute import tune_process
    from preread_cli.inputs import tell_refused
    from tuning.evaluate import open_checkpoint
    from tuning.judged import read_judged
    from tuning.progress import TerminalProgress
    from tuning.sweep.page import check_available
    from tuning.sweep.tune import tune
    from tuning.trec import read_run

    check_available()  # now, not after hours
    tune_process(options["threads"])
    settings, limits = _settings(options), _limits(options)
    judged = read_judged(
        options["folder"],
        corpus=options["corpus"],
        queries=options["queries"],
        qrels=options["qrels"],
        split=options["queries_split"],
        need_corpus=options["collection"] is None,
        need_qrels=False,
    )
    tell_refused(judged.refused)
    if options["ignore_qrels"]:
        judged = judged.without_judgements()
    out: Path = options["out"]
    for folder in filter(None, (out, options["run_out"])):  # now, not after hours
        folder.mkdir(parents=True, exist_ok=True)
    candidates = read_run(options["run_file"]) if options["run_file"] is not None else None
    with ExitStack() as stack:
        stored = None
        if options["collection"] is not None:
            opened = open_store(options["store"], read_budget_seconds=READ_SECONDS)
            stack.callback(opened.close)
            stored = Collection.open(opened, options["collection"])
        report = tune(
            judged,
            open_checkpoint(options["model"], stored, read_control_tokens=options["read_control_tokens"]),
            settings,
            work_dir=options["work_dir"] or out / "work",
            candidates=candidates,
            stored=stored,
            device=options["device"],
            dtype=options["dtype"],
            progress=stack.enter_context(TerminalProgress()),
        )
    if options["run_out"] is not None:
        report.write_runs(options["run_out"])
    named = ctx.get_parameter_source("model") is not ParameterSource.DEFAULT
    model = options["model"] if named else None
    control_tokens = options["read_control_tokens"]
    _show(report, limits, out, model=model, control_tokens=control_tokens, show_all=options["show_all"])


def _settings(options: dict[str, Any]) -> SweepSettings:
    from preread.types import parse_stages
    from tuning.sweep.settings import SweepSettings

    same = (
        "stored_ratios", "codecs", "read_ratios", "top_k", "overlap_k", "few_samples", "split", "instruction",
        "max_queries", "min_grade", "seed", "timed_queries", "rounds",
    )  # fmt: skip
    cascades = options["cascades"]
    if cascades is not None:
        cascades = () if cascades == ("none",) else tuple(map(parse_stages, cascades))
    return SweepSettings(cascades=cascades, **{name: options[name] for name in same})


def _limits(options: dict[str, Any]) -> Limits:
    from tuning.sweep.report import Limits

    if options["max_latency"] is not None and not options["timed_queries"]:
        raise click.UsageError("--max-latency needs --timed-queries of at least 1.")
    return Limits(
        max_loss=options["max_loss"],
        sure=options["sure"],
        max_bytes=options["max_bytes"],
        max_latency_seconds=options["max_latency"],
        prefer=options["prefer"],
    )


def _show(
    report: SweepReport, limits: Limits, out: Path, *, model: str | None, control_tokens: bool, show_all: bool
) -> None:
    """The files, the table, and the choice."""
    from preread_edge.outputs import write_output
    from tuning.sweep.page import write_page
    from tuning.sweep.report import print_sweep

    choice = limits.choose(report.rows) if limits.given else None
    write_output(out / "tune.json", report.to_json(limits, choice))
    write_page(out, report, limits, choice)
    print_sweep(report, choice, show_all=show_all)
    click.echo(f"Report: {out / 'report.html'}")
    config = out / "preread.toml"
    if choice is None or choice.broken:
        config.unlink(missing_ok=True)  # of an earlier run: it would not be this one's choice
    else:
        write_output(config, report.config_toml(choice.row, model, control_tokens=control_tokens))
        click.echo(f"Chosen: {choice.row.configuration.name}; {config} is for preread index and serve --config.")
    if choice is not None and choice.broken:
        raise CommandFailed(
            f"no configuration keeps the limits; the nearest is {choice.row.configuration.name}: "
            f"{choice.explain(limits)}",
            BAD_INPUT,
        )
