"""`preread index`: passages from files into a collection, once. The work is encoder_worker.indexing's."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encoder_worker.config import CollectionSettings, EncoderConfig, IndexOptions
from preread_cli.config_file import config_option
from preread_cli.failures import BAD_INPUT, BAD_ITEMS, INTERRUPTED
from preread_cli.models import compute_options, load_encoder, model_option
from preread_cli.options import (
    BATCH_READ_SECONDS,
    collection_option,
    from_options,
    json_option,
    knob_options,
    option,
    store_option,
)
from preread_cli.terminal import human_bytes, print_json, print_some

if TYPE_CHECKING:
    from encoder_worker.indexing import IndexEstimate, IndexReport, Progress
    from encoder_worker.sources.files import Source

FORMATS = ("jsonl", "tsv", "csv", "parquet", "text", "beir")  # of encoder_worker.sources, which loads pyarrow
LINE_SECONDS = 10.0
WARN_CLIPPED_SHARE = 0.01
FEW_TRAINING_STATES = 1000


@click.command()
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@config_option
@collection_option(required=True, help="The set of passages to write; made when it does not exist.")
@store_option
@model_option
@option("--format", type=click.Choice(FORMATS), help="What the inputs are.  [default: by name]")
@option("--id-field", metavar="NAME", help="Field or column of the passage id.  [default: id or _id]")
@option("--text-field", metavar="NAME", default="text", help="Field or column of the text.")
@option("--title-field", metavar="NAME", default="title", help="Field or column put before the text; '' for none.")
@option("--title-separator", metavar="TEXT", default=" ", help="What stands between title and text.")
@compute_options
@knob_options(EncoderConfig, only=["max_passage_tokens", "max_batch_tokens", "allow_clipped"])
@knob_options(IndexOptions, CollectionSettings)
@option("--dry-run", is_flag=True, help="Count tokens, bytes and time; store nothing.")
@option(
    "--report",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write counts and every refused line (JSON); - prints them instead of the summary.",
)
@option("--max-line-bytes", type=click.IntRange(min=1), default=16 << 20, help="Longer lines are refused.")
@json_option
@click.pass_context
def index(ctx: click.Context, /, **options: Any) -> None:
    """Read passages from files and store their states.

    \b
    INPUT is a file, a BEIR folder, or - for standard input (with --format); gzip and zstd are seen through.
      .jsonl     {"id": ..., "text": ..., "title": ...} per line
      .tsv .csv  with a header line, or two columns: id and text
      .parquet   one passage per row
      .txt       one passage per line; the line number is its id

    Run it again after an interruption or a change: only what is missing or has another text is encoded.
    To rebuild in place of a collection in use, index into a new one and move the --alias.

    \b
    Exit codes: 0 all stored, 1 some items were refused (the report says which), 2 bad input,
    3 the store cannot be reached, 130 interrupted (what was encoded is stored).
    """
    from encoder_worker.sources import Fields
    from encoder_worker.sources.files import Source
    from preread_edge.outputs import is_stdout

    report_file: Path | None = options["report"]
    if options["as_json"] and report_file is not None and is_stdout(report_file):
        raise click.UsageError("--report - and --json both print to standard output: give one of them.")
    if options["store"].startswith("memory:"):
        raise click.BadParameter("memory: ends with this command; expected a store that stays", param_hint="--store")
    if report_file is not None and not report_file.parent.is_dir():
        raise click.BadParameter(f"{report_file.parent} is no directory", param_hint="--report")
    fields = Fields(
        id=options["id_field"],
        text=options["text_field"],
        title=options["title_field"] or None,
        title_separator=options["title_separator"],
    )
    source = Source(
        options["inputs"], format=options["format"], fields=fields, max_line_bytes=options["max_line_bytes"]
    )
    with stopping() as stop:
        report, estimate = _run(options, source, stop)
    if report_file is not None:
        report.write(report_file)
    if options["as_json"]:
        print_json(report.summary() | ({} if estimate is None else {"estimate": dataclasses.asdict(estimate)}))
    elif report_file is None or not is_stdout(report_file):
        _show(report, estimate, report_file)
    stopped = BAD_INPUT if report.stopped_by is not None else BAD_ITEMS if report.num_refused else 0
    ctx.exit(INTERRUPTED if report.interrupted else stopped)


def _run(options: dict[str, Any], source: Source, stop: threading.Event) -> tuple[IndexReport, IndexEstimate | None]:
    """The report, and with --dry-run the estimate."""
    from cache.open import open_store
    from encoder_worker import indexing

    name = options["collection"]
    settings, how = from_options(CollectionSettings, options), from_options(IndexOptions, options)
    report = indexing.IndexReport(name)
    with closing(open_store(options["store"], read_budget_seconds=BATCH_READ_SECONDS)) as store:
        job = (source, load_encoder(options), store, name, settings, how)
        if options["dry_run"]:
            return report, indexing.dry_run(*job, stop=stop, report=report)
        with _shown_progress(name) as on_progress:
            try:
                indexing.index(*job, stop=stop, on_progress=on_progress, report=report)
            except Exception:
                if report.num_stored:
                    click.echo(f"{report.num_stored:,} passages were stored; run again to go on from there", err=True)
                raise
        return report, None


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; a second one has its usual effect."""
    stop = threading.Event()
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def tell(number: int, frame: object) -> None:
        stop.set()
        click.echo("stopping: what is encoded is being stored (once more to stop at once)", err=True)
        restore()

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    for number in usual:
        signal.signal(number, tell)
    try:
        yield stop
    finally:
        restore()


@contextmanager
def _shown_progress(label: str) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, a line now and then elsewhere; both on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}"))
    last = time.monotonic()
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=None, numbers="")

        def update(now: Progress) -> None:
            nonlocal last
            total = None if now.fraction is None else 1.0
            bar.update(task, completed=now.fraction or 0.0, total=total, numbers=_numbers(now))
            if not console.is_terminal and time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                click.echo(_numbers(now), err=True)

        yield update


def _numbers(now: Progress) -> str:
    share = "" if now.fraction is None else f" ({now.fraction:.0%})"
    left = "" if now.eta_seconds is None else f", {_duration(now.eta_seconds)} left"
    return f"{now.num_done:,} passages{share}, {now.passages_per_second:,.1f} passages/s{left}"


def _show(report: IndexReport, estimate: IndexEstimate | None, report_file: Path | None) -> None:
    """The outcome of every line, on standard output."""
    lists_all = f"all of them in {report_file}" if report_file else "--report FILE lists them"
    refused = map(_place, report.refused)
    print_some("refused", refused, num_lines=report.num_refused, more=f"; {lists_all}")
    if estimate is not None:
        _show_estimate(estimate, report)
    else:
        click.echo(
            f"{report.collection}: {report.num_read:,} read, {report.num_stored:,} stored, "
            f"{report.num_unchanged:,} unchanged, {report.num_refused:,} refused"
        )
        if report.num_stored:
            click.echo(
                f"{report.num_tokens:,} tokens in {_duration(report.seconds)}: "
                f"{report.passages_per_second:,.1f} passages/s, {report.tokens_per_second:,.0f} tokens/s, "
                f"{report.padding_share:.2%} padding"
            )
    _show_clipped(report)
    if report.num_truncated:  # with one example: a limit below the usual length would fill the screen
        example = "".join(f" ({_place(item)})" for item in islice(report.truncated, 1))
        click.echo(f"warning: {report.num_truncated:,} passages are over the token limit and are cut{example}")
        click.echo(f"         --split reads them whole, in windows; {lists_all}")
    if report.num_split:
        click.echo(f"{report.num_split:,} passages are over the token limit and are split into windows")
    if report.alias:
        click.echo(f"alias {report.alias} -> {report.collection}")
    if report.stopped_by is not None:
        click.echo(f"preread: error: stopped at {report.stopped_by}", err=True)
    if report.interrupted:
        click.echo("preread: interrupted; run again to go on from here", err=True)


def _show_clipped(report: IndexReport) -> None:
    """Numbers that a trained codec cuts off; the stored states do not show them."""
    from encoder_worker.sources import Reason

    if report.num_clipped:
        grave = "warning: " if report.clipped_share > WARN_CLIPPED_SHARE else ""
        click.echo(
            f"{grave}{report.num_clipped:,} numbers ({report.clipped_share:.2%}) of {report.num_clipped_passages:,} "
            "passages lie outside what the codec was trained for, and are cut to it"
        )
    if report.reasons[Reason.OUT_OF_RANGE]:
        click.echo(
            f"warning: {report.reasons[Reason.OUT_OF_RANGE]:,} passages were refused because the codec was trained on "
            f"others: store them with --allow-clipped, and train it on all with `preread collection reencode "
            f"{report.collection}`; or index into a new collection with --codec B32,SQ8, which needs no training"
        )
    if 0 < report.num_training_states < FEW_TRAINING_STATES:
        click.echo(
            f"warning: the codec was trained on {report.num_training_states:,} states only; passages unlike these will "
            "be clipped or refused. B32,SQ8 needs no training"
        )


def _show_estimate(estimate: IndexEstimate, report: IndexReport) -> None:
    click.echo(f"would encode     {estimate.num_passages:,} passages; {report.num_unchanged:,} are stored already")
    click.echo(f"tokens           {estimate.num_tokens:,} and {estimate.num_padding_tokens:,} of padding")
    click.echo(f"in the store     {human_bytes(estimate.size_bytes)} for {estimate.num_states:,} states")
    if estimate.num_sample_tokens:
        click.echo(
            f"time             {_duration(estimate.seconds)} at {estimate.tokens_per_second:,.0f} tokens/s, "
            f"measured on {estimate.num_sample_tokens:,} tokens"
        )


def _place(item: dict[str, Any]) -> str:
    passage = f" (id {item['passage_id']})" if item["passage_id"] is not None else ""
    return f"{item['source']}:{item['line']}{passage}: {item['message']}"


def _duration(seconds: float) -> str:
    """75 -> 1 min 15 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
