"""`preread index`: passages from files into a collection, once. Knows flags, signals and exit codes; the work is
encoder_worker.indexing's."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preread_cli.config_file import config_option
from preread_cli.failures import BAD_INPUT, BAD_ITEMS, INTERRUPTED
from preread_cli.options import (
    allow_clipped_option,
    codec_option,
    collection_option,
    compute_options,
    control_tokens_option,
    json_option,
    model_option,
    option,
    store_option,
)

if TYPE_CHECKING:
    from encoder_worker.indexing import IndexOptions
    from encoder_worker.report import IndexReport
    from encoder_worker.sources.source import Source

# A writer is in no hurry: a slow store is better than one given up on.
READ_SECONDS = 30.0
FORMATS = ("jsonl", "tsv", "csv", "parquet", "text", "beir")


@click.command()
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@config_option
@collection_option(help="The set of passages to write; made when it does not exist.")
@option("--alias", metavar="NAME", help="Point this name at the collection when everything was read.")
@store_option
@model_option
@option("--format", type=click.Choice(FORMATS), help="What the inputs are.  [default: by name]")
@option("--id-field", metavar="NAME", help="Field or column of the passage id.  [default: id or _id]")
@option("--text-field", metavar="NAME", default="text", help="Field or column of the text.")
@option("--title-field", metavar="NAME", default="title", help="Field or column put before the text; '' for none.")
@option("--title-separator", metavar="TEXT", default=" ", help="What stands between title and text.")
@control_tokens_option
@option("--max-passage-tokens", type=click.IntRange(min=1), help="Passage limit.  [default: the checkpoint's]")
@option("--split", is_flag=True, help="Split longer passages into windows instead of cutting them.")
@option("--compression-ratio", type=click.IntRange(min=1), help="Tokens per stored state.  [default: the checkpoint's]")
@codec_option
@option("--store-text/--no-store-text", default=None, help="Keep texts beside the states.  [default: keep]")
@option("--strict", is_flag=True, help="Stop at the first item that would be refused.")
@allow_clipped_option
@option("--force", is_flag=True, help="Encode also what is stored with the same text.")
@option("--dry-run", is_flag=True, help="Count tokens, bytes and time; store nothing.")
@option(
    "--report",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write counts and every refused line (JSON); - prints them instead of the summary.",
)
@option("--max-line-bytes", type=click.IntRange(min=1), default=16 << 20, help="Longer lines are refused.")
@option("--max-batch-tokens", type=click.IntRange(min=1), help="Tokens per forward pass.  [default: by device]")
@compute_options
@json_option
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
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
    from preread_cli.index_view import show_json, show_report
    from preread_edge.outputs import is_stdout

    if options["as_json"] and options["report"] is not None and is_stdout(options["report"]):
        raise click.UsageError("--report - and --json both print to standard output: give one of them.")
    if options["store"].startswith("memory:"):
        raise click.BadParameter("memory: ends with this command; expected a store that stays", param_hint="--store")
    if options["report"] is not None and not options["report"].parent.is_dir():
        raise click.BadParameter(f"{options['report'].parent} is no directory", param_hint="--report")
    source = _source(options)
    settings, how = _settings(options)
    with stopping() as stop:
        report, estimate = _run(options, source, settings, how, stop)
    if options["report"] is not None:
        report.write(options["report"])
    if options["report"] is not None and is_stdout(options["report"]):
        pass  # it is all there
    elif options["as_json"]:
        show_json(report, estimate)
    else:
        show_report(report, estimate, report_file=options["report"])
    ctx.exit(_exit_code(report))


def _run(
    options: dict[str, Any], source: Source, settings: Any, how: IndexOptions, stop: threading.Event
) -> tuple[IndexReport, Any]:
    """The report, and with --dry-run the estimate."""
    import torch

    from cache.open import open_store
    from checkpoint.compute import tune_process
    from encoder_worker.indexing import dry_run, index
    from encoder_worker.passage_encoder import PassageEncoder
    from encoder_worker.report import IndexReport
    from preread_cli.index_view import shown_progress

    tune_process(options["threads"])
    torch.set_flush_denormal(True)  # a setting of the thread, and this is the one that computes
    with closing(open_store(options["store"], read_budget_seconds=READ_SECONDS)) as store:
        encoder = PassageEncoder.load(
            options["model"],
            device=options["device"],
            dtype=options["dtype"],
            max_passage_tokens=options["max_passage_tokens"],
            read_control_tokens=options["read_control_tokens"],
            max_batch_tokens=options["max_batch_tokens"],
        )
        report = IndexReport(options["collection"])
        arguments = (source, encoder, store, options["collection"], settings, how)
        if options["dry_run"]:
            return report, dry_run(*arguments, stop=stop, report=report)
        with shown_progress(options["collection"]) as on_progress:
            try:
                index(*arguments, stop=stop, on_progress=on_progress, report=report)
            except Exception:
                if report.num_stored:
                    click.echo(f"{report.num_stored:,} passages were stored; run again to go on from there", err=True)
                raise
        return report, None


def _source(options: dict[str, Any]) -> Source:
    from encoder_worker.sources import Fields
    from encoder_worker.sources.source import Source

    fields = Fields(
        id=options["id_field"],
        text=options["text_field"],
        title=options["title_field"] or None,
        title_separator=options["title_separator"],
    )
    return Source(options["inputs"], format=options["format"], fields=fields, max_line_bytes=options["max_line_bytes"])


def _settings(options: dict[str, Any]) -> tuple[Any, IndexOptions]:
    from encoder_worker.indexing import IndexOptions
    from encoder_worker.writing import CollectionSettings

    settings = CollectionSettings(options["compression_ratio"], options["codec"], options["store_text"])
    return settings, IndexOptions(
        split=options["split"],
        strict=options["strict"],
        force=options["force"],
        alias=options["alias"],
        allow_clipped=options["allow_clipped"],
    )


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


def _exit_code(report: IndexReport) -> int:
    if report.interrupted:
        return INTERRUPTED
    if report.stopped_by is not None:
        return BAD_INPUT
    return BAD_ITEMS if report.num_refused else 0
