"""`preread index`: passages from files into a collection, once. The work is encoder_worker.indexing's."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encoder_worker.config import CollectionSettings, EncoderConfig, IndexOptions
from preread_cli import flags
from preread_cli.failures import BAD_INPUT, BAD_ITEMS, INTERRUPTED, UNAVAILABLE, CommandFailed
from preread_cli.flags import option
from preread_cli.models import compute_options, load_encoder, model_option
from preread_cli.passages import write_ids
from preread_cli.terminal import print_json, print_some, progress_bar
from preread_edge.outputs import human_bytes, is_stdout, open_output
from preread_edge.tables import Table, human_seconds, print_parts

if TYPE_CHECKING:
    from cache.store import Store
    from encoder_worker.indexing import IndexEstimate, IndexReport, Progress
    from encoder_worker.sources.files import Source

FORMATS = ("jsonl", "tsv", "csv", "parquet", "text", "beir")  # of encoder_worker.sources.files; `--help` loads no numpy
WARN_CLIPPED_SHARE = 0.01
FEW_TRAINING_STATES = 1000
ESTIMATE_SECONDS = 3.0  # of encoding, before the time that the input takes is told


@click.command()
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@flags.collection(required=True, help="The set of passages to write; created if it does not exist.")
@flags.store
@model_option
@option("--format", type=click.Choice(FORMATS), help="What the inputs are.  [default: by name]")
@option("--id-field", metavar="NAME", help="Field or column of the passage id.  [default: id or _id]")
@option("--text-field", metavar="NAME", help="Field or column of the text.  [default: text]")
@option("--title-field", metavar="NAME", default="title", help="Field or column put before the text; '' for none.")
@option(
    "--no-header",
    is_flag=True,
    help="CSV and TSV: the first line is a passage, and fields are column numbers.  [default: 1 the id, 2 the text]",
)
@option("--title-separator", metavar="TEXT", default=" ", help="What stands between title and text.")
@compute_options
@flags.knob_options(EncoderConfig, only=["max_passage_tokens", "max_batch_tokens", "allow_clipped"])
@flags.knob_options(IndexOptions, CollectionSettings)
@option("--dry-run", is_flag=True, help="Count tokens, bytes and time; store nothing.")
@option(
    "--report", type=flags.OUTPUT, help="Write counts and refused lines (JSON); - prints them instead of the summary."
)
@option(
    "--not-in-input",
    type=flags.OUTPUT,
    help="Write the ids of stored passages that the input lacks, for `preread collection remove`; - prints them.",
)
@option("--max-line-bytes", type=flags.COUNT, default=16 << 20, help="Longer lines are refused.")
@flags.as_json
@click.pass_context
def index(ctx: click.Context, /, **options: Any) -> None:
    """Read passages from files and store their states.

    \b
    INPUT is a file, a BEIR folder, or - for standard input (with --format); gzip and zstd are decompressed.
      .jsonl     {"id": ..., "text": ..., "title": ...} per line
      .tsv .csv  with a header line, or two columns: id and text (--no-header: others)
      .parquet   one passage per row
      .txt       one passage per line; the line number is its id

    Run it again after an interruption or a change: only what is missing or has another text is encoded.
    To rebuild in place of a collection in use, index into a new one and move the --alias; `preread collection
    rename` makes room for an alias that has the collection's own name.

    \b
    Exit codes: 0 all stored, 1 some items were refused (the report says which), 2 bad input,
    3 the store cannot be reached, or not any longer, 130 interrupted (what was encoded is stored).
    """
    from encoder_worker.sources import UnknownFormat

    report_file: Path | None = options["report"]
    files = {"--report": report_file, "--not-in-input": options["not_in_input"]}
    printed = [flag for flag, file in files.items() if file is not None and is_stdout(file)]
    if len(printed) + options["as_json"] > 1:
        both = " and ".join([*(f"{flag} -" for flag in printed), *(["--json"] if options["as_json"] else [])])
        raise click.UsageError(f"{both} both print to standard output: give one of them.")
    if options["store"].startswith("memory:"):
        raise click.BadParameter("memory: ends with this command; expected a store that stays", param_hint="--store")
    for flag, file in files.items():
        if file is not None and not file.parent.is_dir():
            raise click.BadParameter(f"{file.parent} is no directory", param_hint=flag)
    try:
        source = _source(options)
    except UnknownFormat as exc:
        raise click.UsageError(f"{exc}: give --format, one of {', '.join(FORMATS[:-1])}.") from exc
    ctx.exit(_index(options, source, report_file))


def _index(options: dict[str, Any], source: Source, report_file: Path | None) -> int:
    """The run and, however it ends, what became of the passages; returns the exit code."""
    from encoder_worker.indexing import IndexReport

    report, failure = IndexReport(options["collection"], columns=source.columns), None
    with stopping() as stop:
        try:
            estimate = _run(options, source, stop, report)
        except Exception as exc:
            shown = CommandFailed.of(exc, debug=False)
            if not report.num_read or (shown.exit_code != UNAVAILABLE and not report.num_stored):
                raise  # there is nothing to go on from
            estimate, failure, report.stopped_by = None, exc, shown.message
    if report_file is not None:
        _write(report, report_file, failure)
    if options["as_json"]:
        print_json(report.summary() | ({} if estimate is None else {"estimate": dataclasses.asdict(estimate)}))
    elif not any(map(is_stdout, filter(None, (report_file, options["not_in_input"])))):
        _show(report, estimate, report_file, options["not_in_input"])
    if failure is not None:
        num_left = report.num_read - report.num_stored - report.num_unchanged - report.num_refused
        print_parts(f"preread: {num_left:,} passages were read and not stored; run again to go on from here", err=True)
        raise failure
    if report.stopped_by is not None:
        print_parts(f"preread: error: stopped at {report.stopped_by}", err=True)
    if report.interrupted:
        print_parts("preread: interrupted; run again to go on from here", err=True)
    stopped = BAD_INPUT if report.stopped_by is not None else BAD_ITEMS if report.num_refused else 0
    return INTERRUPTED if report.interrupted else stopped


def _write(report: IndexReport, file: Path, failure: Exception | None) -> None:
    """The report; where that fails too, a run that has failed says so and keeps its own error."""
    try:
        report.write(file)
    except OSError as exc:
        if failure is None:
            raise
        print_parts(f"preread: warning: {file}: the report cannot be written ({exc.strerror})", err=True)


def _source(options: dict[str, Any]) -> Source:
    from encoder_worker.sources import Fields
    from encoder_worker.sources.files import Source

    fields = Fields(
        options["id_field"],
        options["text_field"],
        options["title_field"] or None,
        options["title_separator"],
        has_header=False if options["no_header"] else None,
        advice="--id-field and --text-field name others; --no-header takes the first line of CSV or TSV for a passage",
    )
    return Source(
        options["inputs"],
        format=options["format"],
        fields=fields,
        max_line_bytes=options["max_line_bytes"],
        on_columns=lambda columns: print_parts(str(columns), err=True),
    )


def _run(options: dict[str, Any], source: Source, stop: threading.Event, report: IndexReport) -> IndexEstimate | None:
    from cache.open import open_store
    from encoder_worker import indexing

    settings, how = flags.from_options(CollectionSettings, options), flags.from_options(IndexOptions, options)
    with closing(open_store(options["store"], read_budget_seconds=flags.BATCH_READ_SECONDS)) as store:
        job = (source, load_encoder(options), store, report.collection, settings, how)
        if options["dry_run"]:
            estimate = indexing.dry_run(*job, stop=stop, report=report)
            _write_ids(options["not_in_input"], store, report)
            return estimate
        told = False
        with progress_bar(report.collection, "passages") as update:

            def on_progress(now: Progress) -> None:
                nonlocal told
                if not told and now.eta_seconds is not None and now.seconds >= ESTIMATE_SECONDS:
                    left = human_seconds(now.eta_seconds)
                    told = True
                    print_parts(f"indexing {human_bytes(source.num_bytes or 0)}: about {left} left", err=True)
                known = {"share": now.fraction, "rate": now.passages_per_second, "seconds_left": now.eta_seconds}
                update(now.num_done, None, **known)  # how many there are is not known, only of how many bytes

            indexing.index(*job, stop=stop, on_progress=on_progress, report=report)
        _write_ids(options["not_in_input"], store, report)
        return None


def _write_ids(file: Path | None, store: Store, report: IndexReport) -> None:
    from encoder_worker.indexing import ids_not_in_input

    if file is None:
        return
    if not report.complete:  # ids of what was not read would look as if the input lacked them
        print_parts(f"{file}: not written, because the input was not read to its end", err=True)
        return
    with open_output(file) as out:
        write_ids(out, ids_not_in_input(store, report))


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """Set by the first SIGINT, SIGTERM or SIGHUP (unless ignored, as by nohup); a second one has its usual effect."""
    stop, said = threading.Event(), "stopping: what is encoded is being stored (once more to stop at once)"

    def tell(number: int, frame: object) -> None:
        stop.set()
        usual.close()
        with suppress(OSError):  # of a terminal that is gone
            try:
                print_parts(said, err=True)
            except RuntimeError:  # the signal came amid a write to this very stream
                os.write(sys.stderr.fileno(), f"{said}\n".encode())

    with ExitStack() as usual:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            usual.callback(signal.signal, number, signal.signal(number, tell))
        yield stop


def _show(report: IndexReport, estimate: IndexEstimate | None, report_file: Path | None, ids_file: Path | None) -> None:
    """The outcome of every line, on standard output."""
    lists_all = f"all of them in {report_file}" if report_file else "--report FILE lists them"
    refused = map(_place, report.refused)
    print_some("refused", refused, num_lines=report.num_refused, more=f"; {lists_all}")
    if estimate is not None:
        padding, speed = estimate.num_padding_tokens, f"{estimate.tokens_per_second:,.0f} tokens/s"
        sampled, time = estimate.num_sample_tokens, human_seconds(estimate.seconds)
        facts = {
            "would encode": f"{estimate.num_passages:,} passages; {report.num_unchanged:,} are stored already",
            "tokens": f"{estimate.num_tokens:,} and {padding:,} of padding",
            "in the store": f"{human_bytes(estimate.size_bytes)} for {estimate.num_states:,} states",
            "time": f"{time} at {speed}, measured on {sampled:,} tokens" if sampled else "",
        }
        print_parts(Table.facts(facts))
    else:
        print_parts(
            f"{report.collection}: {report.num_read:,} read, {report.num_stored:,} stored, "
            f"{report.num_unchanged:,} unchanged, {report.num_refused:,} refused"
        )
        if report.num_stored:
            speed = f"{report.passages_per_second:,.1f} passages/s, {report.tokens_per_second:,.0f} tokens/s"
            took = f"{report.num_tokens:,} tokens in {human_seconds(report.seconds)}"
            print_parts(f"{took}: {speed}, {report.padding_share:.2%} padding")
    _show_clipped(report)
    if report.num_truncated:  # with one example: a limit below the usual length would fill the screen
        example = "".join(f" ({_place(item)})" for item in islice(report.truncated, 1))
        print_parts(
            f"warning: {report.num_truncated:,} passages are over the token limit and are cut{example}",
            f"         --split reads them whole, in windows; {lists_all}",
        )
    if report.num_split:
        print_parts(f"{report.num_split:,} passages are over the token limit and are split into windows")
    if report.alias:
        before = f" (was {report.alias_was})" if report.alias_was else ""
        print_parts(f"alias {report.alias} -> {report.collection}{before}")
    if report.num_not_in_input:
        absent = "not in this input, or were refused in it" if report.num_refused else "not in this input"
        print_parts(f"{report.num_not_in_input:,} stored passages are {absent}; they stay")
        listed = "--not-in-input FILE lists those not in it; " if ids_file is None else ""
        removal = f"`preread collection remove {report.collection} --ids {ids_file or 'FILE'}` removes them"
        print_parts(f"{listed}{removal}")


def _show_clipped(report: IndexReport) -> None:
    """Numbers that a trained codec cuts off; the stored states do not show them."""
    from encoder_worker.sources import Reason

    if report.num_clipped:
        grave = "warning: " if report.clipped_share > WARN_CLIPPED_SHARE else ""
        outside = "passages lie outside what the codec was trained for, and are cut to it"
        share = f"{report.num_clipped:,} numbers ({report.clipped_share:.2%})"
        print_parts(f"{grave}{share} of {report.num_clipped_passages:,} {outside}")
    if num_refused := report.refused_by_reason[Reason.OUT_OF_RANGE]:
        print_parts(
            f"warning: {num_refused:,} passages were refused because the codec was trained on others: store them with "
            f"--allow-clipped, and train it on all with `preread collection reencode {report.collection}`; or index "
            "into a new collection with --codec B32,SQ8, which needs no training"
        )
    if 0 < (num_states := report.num_training_states) < FEW_TRAINING_STATES:
        advice = "passages unlike these will be clipped or refused. B32,SQ8 needs no training"
        print_parts(f"warning: the codec was trained on {num_states:,} states only; {advice}")


def _place(item: dict[str, Any]) -> str:
    passage = f" (id {item['passage_id']})" if item["passage_id"] is not None else ""
    return f"{item['source']}:{item['line']}{passage}: {item['message']}"
