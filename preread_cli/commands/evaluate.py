"""`preread evaluate`, `preread tune`: how well a checkpoint ranks a judged collection, at which ratio and codec."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from preread_cli.failures import BAD_INPUT, CommandFailed
from preread_cli.models import compute_options, model_option
from preread_cli.options import (
    BATCH_READ_SECONDS,
    FILE,
    collection_option,
    from_options,
    json_file_option,
    option,
    options_of,
    store_option,
)

if TYPE_CHECKING:
    from cache.collection import Collection
    from tuning.judged import JudgedCollection
    from tuning.sweep.report import Limits, SweepReport

MAX_SHOWN = 20
_NUMBER = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[a-zA-Z%]*)")


def _quantity(units: dict[str, float], example: str) -> Callable[[str], float]:
    """A number with one of some units, in the base unit."""

    def convert(text: str) -> float:
        match = _NUMBER.fullmatch(text.strip())
        if match is None or match["unit"].lower() not in units:
            raise click.BadParameter(f"{text!r}; expected {example}")
        return float(match["number"]) * units[match["unit"].lower()]

    return convert


_SHARE = _quantity({"%": 0.01}, "a percentage, such as 1%")
_SIZE = _quantity(
    {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "kib": 1024, "mib": 1024**2}, "a number of bytes, such as 8KiB or 8192"
)
_DURATION = _quantity({"us": 1e-6, "ms": 1e-3, "s": 1}, "a time with its unit, such as 50ms or 0.5s")


def _integers(text: str) -> tuple[int, ...]:
    """1,2,4 -> (1, 2, 4)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}; expected integers with commas between them, such as 1,4,16") from None


def _words(text: str) -> tuple[str, ...]:
    """`Flat SQ8 OPQ48,PQ48` -> those three: a FAISS factory string may hold commas, so blanks separate."""
    return tuple(text.split())


class _OutputFolder(click.Path):
    """A folder to write into; made where there is none."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) == "-":
            self.fail("-: several files are written; expected a folder", param, ctx)
        return super().convert(value, param, ctx)


_judged_options = options_of(
    click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path)),
    option("--corpus", type=FILE, help="Passages, instead of the folder's corpus.jsonl[.gz]."),
    option("--queries", type=FILE, help="Queries, instead of the folder's queries.jsonl[.gz]."),
    option("--qrels", type=FILE, help="Judgements (BEIR or TREC columns, or JSON lines), instead of the folder's."),
    option("--run", "run_file", type=FILE, help="Rerank the candidates of this TREC run file instead of BM25's."),
    option("--top-k", type=click.IntRange(min=1), default=50, help="Candidates per query."),
    option(
        "--queries-split", metavar="NAME", help="Only queries of qrels/NAME.tsv, or with this `split` in queries.jsonl."
    ),
    option("--max-queries", type=click.IntRange(min=1), help="Draw that many queries."),
    option("--min-grade", type=click.IntRange(min=1), default=1, help="Grade from which a passage counts as relevant."),
    option(
        "--split", is_flag=True, help="Read long passages in windows, instead of cutting them; the best window counts."
    ),
    option("--instruction", metavar="TEXT", help='Task instruction, instead of the checkpoint\'s own; "" for none.'),
    option("--seed", type=int, default=0, help="Of the drawn queries, training samples and the bootstrap."),
    store_option,
    model_option,
    compute_options,
    option("--run-out", metavar="DIR", type=_OutputFolder(), help="Write TREC run files."),
)


@click.command()
@_judged_options
@option(
    "--ratios",
    type=_integers,
    metavar="R,R,...",
    help="Compression ratios to score passages at. Without it, 1 (or the stored one) to 32.",
)
@option("--teacher", metavar="minilm", help="Also rank the same candidates with all-MiniLM-L6-v2 (preread[teacher]).")
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
    from preread_edge.outputs import is_stdout, write_output
    from tuning.evaluate import evaluate as run
    from tuning.report import EvaluationSettings

    tune_process(options["threads"])
    settings = from_options(EvaluationSettings, options)
    judged = _judged(options)
    json_file: Path | None = options["json_file"]
    _make_folders(options["run_out"], json_file.parent if json_file is not None else None)
    with _inputs(options, judged) as inputs:
        report = run(settings=settings, **inputs)
    if json_file is None or not is_stdout(json_file):
        report.print()
    if json_file is not None:
        write_output(json_file, report.to_json())
    if options["run_out"] is not None:
        report.write_runs(options["run_out"])


@click.command()
@_judged_options
@option("--ignore-qrels", is_flag=True, help="Take the ranking at r = 1 for the judgement, as where there are none.")
@collection_option(help="Take the passages of this indexed collection instead of a corpus.")
@option("--stored-ratios", type=_integers, metavar="R,R,...", help="Tokens per stored state.  [default: 1,2,4,8]")
@option(
    "--codecs",
    type=_words,
    metavar="CODEC ...",
    help="Codecs, blanks between them.  [default: Flat SQfp16 SQ8 B32,SQ4 and PQ at two sizes]",
)
@option(
    "--read-ratios",
    type=_integers,
    metavar="R,R,...",
    help="Ratios to score stored states at.  [default: 1,2,4,8,16,32]",
)
@option(
    "--cascades",
    type=_words,
    metavar="STAGES ...",
    help="Stages, blanks between cascades: 32:20,4 scores all at 32, and the best 20 at 4; none: no cascades.  "
    "[default: four shapes]",
)
@option("--overlap-k", type=click.IntRange(min=1), default=10, help="How many of the top are compared with r = 1's.")
@option(
    "--few-samples",
    type=click.Choice(["fallback", "refuse"]),
    default="fallback",
    help="For a codec with too few states to train on: SQfp16 as the fallback, with a note; or the run ends.",
)
@option("--max-loss", type=_SHARE, metavar="PERCENT", help="Choose: nDCG@10 lost against r = 1, at most. 1%")
@option("--sure", is_flag=True, help="The worse end of the loss's 95% interval must keep --max-loss, not its mean.")
@option("--max-bytes", type=_SIZE, metavar="BYTES", help="Choose: stored bytes of a passage in the mean, at most. 8KiB")
@option("--max-latency", type=_DURATION, metavar="TIME", help="Choose: p99 of a rerank of --top-k, at most. 50ms")
@option(
    "--prefer",
    type=click.Choice(["bytes", "latency", "quality"]),
    help="The criterion among configurations that keep the limits.  [default: bytes with --max-loss, else quality]",
)
@option("--timed-queries", type=click.IntRange(min=0), default=20, help="Queries to time; 0: time nothing.")
@option("--rounds", type=click.IntRange(min=1), default=3, help="How often each of them is timed.")
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
    from checkpoint.compute import tune_process
    from preread.values import parse_stages
    from tuning.sweep.page import check_available
    from tuning.sweep.report import Limits
    from tuning.sweep.settings import SweepSettings
    from tuning.sweep.tune import tune as run

    check_available()  # now, not after hours
    tune_process(options["threads"])
    cascades = options["cascades"]
    if cascades is not None:
        cascades = () if cascades == ("none",) else tuple(map(parse_stages, cascades))
    settings = from_options(SweepSettings, options, cascades=cascades)
    if options["max_latency"] is not None and not options["timed_queries"]:
        raise click.UsageError("--max-latency needs --timed-queries of at least 1.")
    limits = from_options(Limits, options, max_latency_seconds=options["max_latency"])
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
    for item in judged.refused[:MAX_SHOWN]:
        click.echo(f"refused: {item}", err=True)
    if len(judged.refused) > MAX_SHOWN:
        click.echo(f"refused: {len(judged.refused) - MAX_SHOWN:,} more", err=True)
    return judged


def _make_folders(*folders: Path | None) -> None:
    """Now, not after hours."""
    for folder in folders:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _inputs(options: Mapping[str, Any], judged: JudgedCollection) -> Iterator[dict[str, Any]]:
    """Arguments of both runs: queries with candidates and store, the model, where to compute, and a bar."""
    from tuning.evaluate import open_checkpoint
    from tuning.progress import TerminalProgress
    from tuning.trec import read_run

    candidates = read_run(options["run_file"]) if options["run_file"] is not None else None
    with _stored(options) as stored, TerminalProgress() as progress:
        yield {
            "judged": replace(judged, candidates=candidates, stored=stored),
            "model": open_checkpoint(options["model"], stored, read_control_tokens=options["read_control_tokens"]),
            "device": options["device"],
            "dtype": options["dtype"],
            "progress": progress,
        }


@contextmanager
def _stored(options: Mapping[str, Any]) -> Iterator[Collection | None]:
    from cache.collection import Collection
    from cache.open import open_store

    if options["collection"] is None:
        yield None
        return
    with closing(open_store(options["store"], read_budget_seconds=BATCH_READ_SECONDS)) as opened:
        yield Collection.open(opened, options["collection"])


def _show_sweep(report: SweepReport, limits: Limits, out: Path, model: str | None, options: Mapping[str, Any]) -> None:
    """The files, the table, and the choice."""
    from preread_edge.outputs import write_output
    from tuning.sweep.page import write_page

    choice = limits.choose(report.rows) if limits.given else None
    write_output(out / "tune.json", report.to_json(limits, choice))
    write_page(out, report, limits, choice)
    report.print(choice, show_all=options["show_all"])
    click.echo(f"Report: {out / 'report.html'}")
    config = out / "preread.toml"
    if choice is None or choice.broken:
        config.unlink(missing_ok=True)  # of an earlier run: it would not be this one's choice
    else:
        toml = report.config_toml(choice.row, model, control_tokens=options["read_control_tokens"])
        write_output(config, toml)
        click.echo(f"Chosen: {choice.row.configuration.name}; {config} is for preread index and serve --config.")
    if choice is not None and choice.broken:
        raise CommandFailed(
            f"no configuration keeps the limits; the nearest is {choice.row.configuration.name}: "
            f"{choice.explain(limits)}",
            BAD_INPUT,
        )
