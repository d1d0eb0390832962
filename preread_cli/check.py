"""`preread check`: whether a model's scores are the ones its weights mean. Knows options and exit codes."""

from __future__ import annotations

from pathlib import Path

import click

from preread_cli.failures import BAD_ITEMS
from preread_cli.options import codec_option, compute_options, control_tokens_option, option, shipped_model


@click.command()
@click.argument("model", metavar="[DIR|HUB_ID]", required=False)
@option(
    "--against",
    metavar="fp32|DIR|HUB_ID",
    default="fp32",
    help="Whose scores to expect: fp32, a plain float32 pass over the same weights; or another model.",
)
@option(
    "--pairs",
    "pairs_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines with query, passage and maybe instruction.  [default: 100 built-in pairs]",
)
@option(
    "--json-file",
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write everything to this file; - prints it instead of the table.",
)
@option("--runtime", metavar="NAME", default="torch", help="What computes a cross-encoder, as serve is told.")
@option("--profile", metavar="NAME|TOML", help="A cross-encoder's recipe, instead of the one it goes by.")
@option("--max-tokens", type=click.IntRange(min=1), help="A cross-encoder's limit, instead of its profile's.")
@option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint.")
@codec_option
@option("--compression-ratio", type=click.IntRange(min=1), help="fbnl: tokens per state.  [default: the checkpoint's]")
@control_tokens_option
@compute_options
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    against: str,
    pairs_file: Path | None,
    json_file: Path | None,
    runtime: str,
    profile: str | None,
    max_tokens: int | None,
    trust_remote_code: bool,
    codec: str | None,
    compression_ratio: int | None,
    read_control_tokens: bool,
    device: str,
    dtype: str,
    threads: int | None,
) -> None:
    """Check whether a model's scores are the right ones.

    A model served in the wrong way usually still returns numbers. This compares them with a plain float32
    pass over the same weights and with published scores, looks for the marks of known faults, and names the
    likely cause. Without DIR, checks the checkpoint that comes with preread.

    \b
    Examples:
      preread check
      preread check BAAI/bge-reranker-v2-m3 --dtype bfloat16
      preread check ./ctxl-1b --against ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b
      preread check ./my-model --pairs pairs.jsonl --json health.json

    \b
    Exit codes: 0 healthy, 1 not, 2 bad input.
    """
    from checkpoint.compute import tune_process
    from preread_edge.outputs import is_stdout, write_output
    from tuning.health import check, read_pairs
    from tuning.health.report import print_health
    from tuning.progress import TerminalProgress

    model = model or shipped_model()
    if model is None:
        raise click.UsageError("Name a directory or a hub id; none came with this installation.")
    tune_process(threads)
    pairs = read_pairs(pairs_file) if pairs_file is not None else None
    if json_file is not None:  # now, not after minutes
        json_file.parent.mkdir(parents=True, exist_ok=True)
    with TerminalProgress() as progress:
        report = check(
            model,
            against=against,
            pairs=pairs,
            device=device,
            dtype=dtype,
            runtime=runtime,
            profile=profile,
            codec=codec,
            ratio=compression_ratio,
            max_tokens=max_tokens,
            trust_remote_code=trust_remote_code,
            read_control_tokens=read_control_tokens,
            progress=progress,
        )
    if json_file is None or not is_stdout(json_file):
        print_health(report)
    if json_file is not None:
        write_output(json_file, report.to_json())
    if not report.passed:
        ctx.exit(BAD_ITEMS)
