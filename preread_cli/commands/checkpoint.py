"""`preread checkpoint`, `check`, `convert-ctxl`: describe a checkpoint, check its scores, convert one to another."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encoder_worker.config import CollectionSettings
from preread_cli.failures import BAD_ITEMS
from preread_cli.models import compute_options, shipped_model
from preread_cli.options import FILE, from_options, json_file_option, json_option, knob_options, option, threads_option
from preread_cli.terminal import human_bytes, print_facts, print_json, print_report
from preread_edge.settings import LoadConfig

if TYPE_CHECKING:
    from tuning.health.parity import ParityRow

SHAPES = ("tiny", "nano")
RECORD = "conversion.json"

_model_argument = click.argument("model", metavar="[DIR|HUB_ID]", required=False)
_pairs_option = option(
    "--pairs", type=FILE, help="JSON lines with query, passage and maybe instruction.  [default: 100 built-in pairs]"
)


@click.command()
@_model_argument
@knob_options(LoadConfig, only=["max_passage_tokens", "read_control_tokens"])
@option("--make-random", metavar="|".join(SHAPES), type=click.Choice(SHAPES), help="Write random weights to DIR first.")
@option("--seed", metavar="N", default=0, help="With --make-random.")
@json_option
def checkpoint(model: str | None, make_random: str | None, seed: int, as_json: bool, **options: Any) -> None:
    """Describe a checkpoint, or make a random one.

    Shows what each half loads, limits, templates, answer tokens, and the fingerprint that binds
    collections to it. Fails with the reason where it cannot be served. Without DIR, describes the
    checkpoint that comes with preread.

    \b
    --make-random writes weights that load like real ones and rank like dice, to measure speed and
    memory before downloading anything. nano has the shape of KaLM-Reranker-V1-Nano (0.9 GB in bfloat16).
    """
    import torch

    from checkpoint import Checkpoint
    from checkpoint.synthetic import make_checkpoint

    if make_random is not None:
        if model is None or Path(model).exists():
            raise click.UsageError("--make-random writes a new directory: name one that does not exist yet.")
        make_checkpoint(model, make_random, seed=seed, dtype=torch.bfloat16 if make_random == "nano" else torch.float32)
    opened = Checkpoint.open(
        model or shipped_model(),
        max_passage_tokens=options["max_passage_tokens"],
        neutralise=not options["read_control_tokens"],
    )
    facts = _facts(opened)
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _facts(checkpoint: Any) -> dict[str, Any]:
    from checkpoint.model import tensor_shapes

    def count(half: str, config: Any) -> int:
        return sum(prod(shape) for shape in tensor_shapes(half, config).values())

    checkpoint.check_decoder()  # the fingerprint reads every encoder tensor; the decoder's are looked for
    settings = checkpoint.settings
    encoder, decoder = checkpoint.encoder_config, checkpoint.decoder_config
    prompt = checkpoint.text.prompt("a")
    return {
        "checkpoint": checkpoint.name,
        "fingerprint": checkpoint.identity().fingerprint,
        "dim": checkpoint.dim,
        "encoder_parameters": count("encoder", encoder),
        "encoder_layers": encoder.num_hidden_layers,
        "decoder_parameters": count("decoder", decoder),
        "decoder_layers": decoder.num_hidden_layers,
        "vocab_size": decoder.vocab_size,
        "max_passage_tokens": settings.max_passage_tokens,
        "max_query_tokens": settings.max_query_tokens,
        "default_compression_ratio": settings.default_compression_ratio,
        "passage_template": settings.passage_template,
        "prompt_template": settings.prompt_template,
        "default_instruction": settings.default_instruction,
        "prompt_tokens": len(prompt.ids) - prompt.num_query_tokens,
        "yes": {"token": settings.yes_token, "id": checkpoint.text.yes_id},
        "no": {"token": settings.no_token, "id": checkpoint.text.no_id},
    }


def _print(facts: dict[str, Any]) -> None:
    def half(name: str) -> str:
        count = facts[f"{name}_parameters"]
        sizes = f"{human_bytes(2 * count)} in bfloat16, {human_bytes(4 * count)} in float32"
        return f"{count / 1e6:,.1f} million parameters, {facts[f'{name}_layers']} layers ({sizes})"

    answers = ", ".join(f"{facts[name]['token']!r} is token {facts[name]['id']}" for name in ("yes", "no"))
    ratio = facts["default_compression_ratio"]
    thousand = human_bytes(-(-1000 // ratio) * facts["dim"] * 2)
    print_facts(
        {
            "checkpoint": facts["checkpoint"],
            "fingerprint": facts["fingerprint"],
            "encoder half": half("encoder"),
            "decoder half": half("decoder"),
            "passages": f"up to {facts['max_passage_tokens']:,} tokens; 1,000 take {thousand} at ratio {ratio}",
            "queries": f"up to {facts['max_query_tokens']:,} tokens, in a prompt of {facts['prompt_tokens']}",
            "answers": answers,
            "instruction": facts["default_instruction"],
            "passage template": repr(facts["passage_template"]),
            "prompt template": repr(facts["prompt_template"]),
        }
    )


@click.command()
@_model_argument
@option(
    "--against",
    metavar="fp32|DIR|HUB_ID",
    default="fp32",
    help="Whose scores to expect: fp32, a plain float32 pass over the same weights; or another model.",
)
@_pairs_option
@json_file_option
@option("--runtime", metavar="NAME", default="torch", help="Runtime of a cross-encoder, as serve is given it.")
@option("--profile", metavar="NAME|TOML", default="", help="A cross-encoder's recipe, instead of the one it goes by.")
@option("--max-tokens", type=click.IntRange(min=1), help="A cross-encoder's limit, instead of its profile's.")
@option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint.")
@knob_options(CollectionSettings, only=["codec"])
@option("--compression-ratio", type=click.IntRange(min=1), help="fbnl: tokens per state.  [default: the checkpoint's]")
@compute_options
@click.pass_context
def check(ctx: click.Context, /, model: str | None, **options: Any) -> None:
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
    from decoder_server.config import ModelConfig
    from tuning.health import PairSet
    from tuning.health import check as run
    from tuning.progress import TerminalProgress

    config = from_options(
        ModelConfig, options, checkpoint=model or shipped_model(), max_passage_tokens=options["max_tokens"]
    )
    tune_process(options["threads"])
    pairs_file, json_file = options["pairs"], options["json_file"]
    pairs = PairSet.read(pairs_file)
    if json_file is not None:  # now, not after minutes
        json_file.parent.mkdir(parents=True, exist_ok=True)
    with TerminalProgress() as progress:
        report = run(
            config,
            against=options["against"],
            pairs=pairs,
            codec=options["codec"],
            ratio=options["compression_ratio"],
            progress=progress,
        )
    print_report(report, json_file)
    if not report.passed:
        ctx.exit(BAD_ITEMS)


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@_pairs_option
@option(
    "--parity",
    "formats",
    type=click.Choice(["both", "float32", "bfloat16"]),
    default="both",
    help="Number formats to compare in; float32 needs 4 bytes of memory a parameter.",
)
@threads_option
@click.pass_context
def convert_ctxl(
    ctx: click.Context, /, source: str, target: Path, pairs: Path | None, formats: str, threads: int | None
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
    from decoder_server.models.cross_encoder.conversion import CausalSource, staged
    from tuning.health import PairSet
    from tuning.health.parity import parity
    from tuning.progress import TerminalProgress, counted

    tune_process(threads)
    compared = PairSet.read(pairs)
    opened = CausalSource.open(source)
    click.echo(f"source       {opened.name}, {opened.architecture} to {opened.target}")
    click.echo(f"score        row 0 of {opened.head}{' (tied)' if opened.tied else ''}")
    click.echo(f"padding      left, with {opened.pad_token!r} ({opened.pad_token_id})")
    dtypes = ("float32", "bfloat16") if formats == "both" else (formats,)
    with staged(target) as folder:
        with TerminalProgress() as progress:
            with counted(progress, "convert", opened.num_tensors) as advance:
                opened.convert(folder, advance)
            rows = parity(opened, folder, compared, dtypes, progress)
        _print_parity(rows, compared.name)
        if not all(row.passed for row in rows):
            click.echo(f"FAILED: the scores differ by more than rounding; {target} was not made", err=True)
            ctx.exit(BAD_ITEMS)  # raises, and so the folder goes
        record = {
            "source": source,
            "head": opened.head,
            "pairs": compared.name,
            "parity": [row.as_json() for row in rows],
        }
        (folder / RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    click.echo(f"converted    {target}")
    if opened.profile.license:
        click.echo(f"licence      {opened.profile.license}, as the source's")


def _print_parity(rows: list[ParityRow], name: str) -> None:
    from tuning.report import plain_table, print_parts

    table = plain_table("parity", "max |delta|", "allowed", "Kendall tau", "rank agreement", "result")
    for row in rows:
        result = "[green]pass[/green]" if row.passed else "[bold red]FAIL[/bold red]"
        table.add_row(
            row.dtype, f"{row.max_delta:.2e}", f"{row.allowed_delta:.2e}", f"{row.tau:.4f}",
            f"{row.rank_agreement:.0%}", result,
        )  # fmt: skip
    title = f"{rows[0].num_pairs} pairs ({name}), the original against the conversion, batch by batch"
    print_parts(0, title, table)
