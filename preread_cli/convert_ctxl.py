"""`preread convert-ctxl`: a ctxl language model as a classifier with one score, proven before it is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preread_cli.failures import BAD_ITEMS
from preread_cli.options import option

if TYPE_CHECKING:
    from tuning.health.parity import ParityRow

RECORD = "conversion.json"


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@option(
    "--pairs",
    "pairs_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines with query, passage and maybe instruction.  [default: 100 built-in pairs]",
)
@option(
    "--parity",
    "formats",
    type=click.Choice(["both", "float32", "bfloat16"]),
    default="both",
    help="Number formats to compare in; float32 needs 4 bytes of memory a parameter.",
)
@option(
    "--threads",
    type=click.IntRange(min=1),
    help="Processor threads. Without it, torch's choice, and no more than a container's quota pays for.",
)
@click.pass_context
def command(
    ctx: click.Context, source: str, target: Path, pairs_file: Path | None, formats: str, threads: int | None
) -> None:
    """Convert a ctxl reranker to a classifier.

    SRC is a directory or hub id of a Contextual AI reranker (Qwen3ForCausalLM or MistralForCausalLM), whose
    relevance is one column of the vocabulary. DST, a new directory, becomes the same model as a classifier
    with that one score. Then both score the same pairs: where they differ, DST is not made.

    \b
    Example:
      preread convert-ctxl ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b ./ctxl-1b

    \b
    Exit codes: 0 converted, 1 the scores differ and DST was not made, 2 bad input.
    """
    from checkpoint.compute import tune_process
    from decoder_server.models.cross_encoder.conversion import CausalSource, convert, staged
    from tuning.health.pairs import built_in_pairs, read_pairs
    from tuning.health.parity import parity
    from tuning.progress import TerminalProgress, counted

    tune_process(threads)
    pairs = read_pairs(pairs_file) if pairs_file is not None else built_in_pairs()
    opened = CausalSource.open(source)
    dtypes = ("float32", "bfloat16") if formats == "both" else (formats,)
    _introduce(opened)
    with staged(target) as folder:
        with TerminalProgress() as progress:
            with counted(progress, "convert", opened.num_tensors) as advance:
                convert(opened, folder, advance)
            rows = parity(opened, folder, pairs, dtypes, progress)
        _print(rows, pairs.name)
        if not all(row.passed for row in rows):
            click.echo(f"FAILED: the scores differ by more than rounding; {target} was not made", err=True)
            ctx.exit(BAD_ITEMS)  # raises, and so the folder goes
        record = {
            "source": source,
            "head": opened.head,
            "pairs": pairs.name,
            "parity": [row.as_json() for row in rows],
        }
        (folder / RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    click.echo(f"converted    {target}")
    if opened.profile.license:
        click.echo(f"licence      {opened.profile.license}, as the source's")


def _introduce(source: Any) -> None:
    tied = " (tied)" if source.tied else ""
    click.echo(f"source       {source.name}, {source.architecture} to {source.target}")
    click.echo(f"score        row 0 of {source.head}{tied}")
    click.echo(f"padding      left, with {source.pad_token!r} ({source.pad_token_id})")


def _print(rows: list[ParityRow], name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("parity", no_wrap=True)
    for heading in ("max |delta|", "allowed", "Kendall tau", "rank agreement", "result"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result = "[green]pass[/green]" if row.passed else "[bold red]FAIL[/bold red]"
        table.add_row(
            row.dtype, f"{row.max_delta:.2e}", f"{row.allowed_delta:.2e}", f"{row.tau:.4f}",
            f"{row.rank_agreement:.0%}", result,
        )  # fmt: skip
    console = Console()
    console.print(f"{rows[0].num_pairs} pairs ({name}), the original against the conversion, batch by batch")
    console.print(table)
