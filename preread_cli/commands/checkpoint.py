"""`preread checkpoint`, `convert-ctxl`: describe a checkpoint, convert one to another."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preread_cli import flags
from preread_cli.failures import BAD_ITEMS
from preread_cli.flags import option
from preread_cli.models import model_argument
from preread_cli.terminal import ProgressDisplay, print_json
from preread_edge.outputs import human_bytes
from preread_edge.settings import LoadConfig
from preread_edge.tables import WHOLE, Column, Table, print_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from checkpoint import Checkpoint
    from tuning.health.parity import ParityRow

SHAPES = ("tiny", "nano")
PASSAGE_TOKENS, QUERY_TOKENS = 1000, 20  # that costs are told of
_FORMATS = click.Choice(["both", "float32", "bfloat16"])  # of numbers


@click.command()
@model_argument
@flags.knob_options(LoadConfig, only=["max_passage_tokens", "read_control_tokens"])
@option("--make-random", metavar="|".join(SHAPES), type=click.Choice(SHAPES), help="Write random weights to DIR first.")
@option("--seed", metavar="N", default=0, help="Seed for --make-random.")
@flags.as_json
def checkpoint(model: str, make_random: str | None, seed: int, as_json: bool, **options: Any) -> None:
    """Describe a checkpoint, or make a random one.

    Shows what each half loads, limits, templates, answer tokens, and the fingerprint that binds
    collections to it. Fails, saying why, if it cannot be served. Without DIR, describes the
    checkpoint that comes with preread.

    \b
    --make-random writes weights that load like real ones and rank at random, to measure speed and
    memory before downloading anything. nano has the shape of KaLM-Reranker-V1-Nano (0.9 GB in bfloat16).
    """
    import torch

    from checkpoint import Checkpoint
    from checkpoint.synthetic import make_checkpoint

    if make_random is not None:
        if Path(model).exists():
            raise click.UsageError("--make-random writes a new directory: name one that does not exist yet.")
        make_checkpoint(model, make_random, seed=seed, dtype=torch.bfloat16 if make_random == "nano" else torch.float32)
    limit, reads_control = options["max_passage_tokens"], options["read_control_tokens"]
    facts = _facts(Checkpoint.open(model, max_passage_tokens=limit, neutralise=not reads_control))
    if as_json:
        print_json(facts)
        return
    sizes = {}
    for half in ("encoder", "decoder"):
        count, num_layers = facts[f"{half}_parameters"], facts[f"{half}_layers"]
        memory = f"{human_bytes(2 * count)} in bfloat16, {human_bytes(4 * count)} in float32"
        sizes[f"{half} half"] = f"{count / 1e6:,.1f} million parameters, {num_layers} layers ({memory})"
    cost, ratio = facts["cost"], facts["default_compression_ratio"]
    stored = f"{human_bytes(cost['stored_bytes'])} stored at r = {ratio} as {cost['codec']}"
    encoder, decoder, cached = (cost[f"{name}_flops"] / 1e9 for name in ("encoder", "decoder", "decoder_cached"))
    shown = {
        **{name: facts[name] for name in ("checkpoint", "fingerprint")},
        **sizes,
        "passages": f"up to {facts['max_passage_tokens']:,} tokens",
        f"{cost['passage_tokens']:,} tokens": f"take {stored}, {human_bytes(cost['kv_cache_bytes'])} of KV cache "
        f"in {cost['kv_cache_format']}",
        "their encoding": f"{encoder:,.3g} GFLOP, once",
        "their scoring": f"{decoder:,.3g} GFLOP a query of {cost['query_tokens']} tokens; {cached:,.3g} with their KV "
        "cache",
        "queries": f"up to {facts['max_query_tokens']:,} tokens, in a prompt of {facts['prompt_tokens']}",
        "answers": ", ".join(f"{facts[one]['token']!r} is token {facts[one]['id']}" for one in ("yes", "no")),
        "instruction": facts["default_instruction"],
        "passage template": repr(facts["passage_template"]),
        "prompt template": repr(facts["prompt_template"]),
    }
    print_parts(Table.facts(shown))


def _facts(opened: Checkpoint) -> dict[str, Any]:
    from checkpoint.cost import num_parameters

    opened.check_decoder()  # the fingerprint reads every encoder tensor; the decoder's are looked for
    settings, prompt = opened.settings, opened.text.prompt("a")
    halves: dict[str, Any] = {}
    for half, config in (("encoder", opened.encoder_config), ("decoder", opened.decoder_config)):
        halves[f"{half}_parameters"] = num_parameters(half, config)
        halves[f"{half}_layers"] = config.num_hidden_layers
    plain = (
        "max_passage_tokens", "max_query_tokens", "default_compression_ratio", "passage_template", "prompt_template",
        "default_instruction",
    )  # fmt: skip
    return {
        "checkpoint": opened.name,
        "fingerprint": opened.identity.fingerprint,
        "dim": opened.dim,
        **halves,
        "vocab_size": opened.decoder_config.vocab_size,
        **{name: getattr(settings, name) for name in plain},
        "prompt_tokens": (num_prompt_tokens := len(prompt.ids) - prompt.num_query_tokens),
        "cost": _cost(opened, num_prompt_tokens + QUERY_TOKENS),
        "yes": {"token": settings.yes_token, "id": opened.text.yes_id},
        "no": {"token": settings.no_token, "id": opened.text.no_id},
    }


def _cost(opened: Checkpoint, num_tokens: int) -> dict[str, Any]:
    """What a machine is sized by: a passage of 1,000 tokens, stored and cached by default; a prompt of `num_tokens`."""
    from cache import DEFAULT_CODEC
    from cache.codecs import Codec
    from cache.record import Record
    from checkpoint.cost import decoder_flops, encoder_flops, kv_bytes

    num_states = -(-PASSAGE_TOKENS // opened.settings.default_compression_ratio)
    decoder = opened.decoder_config
    return {
        "passage_tokens": PASSAGE_TOKENS,
        "query_tokens": QUERY_TOKENS,
        "codec": DEFAULT_CODEC,
        "stored_bytes": Record.num_bytes(num_states, Codec(DEFAULT_CODEC, opened.dim).code_size_bytes, 1),
        "kv_cache_format": "bfloat16",
        "kv_cache_bytes": kv_bytes(decoder, num_states, 2),
        "encoder_flops": encoder_flops(opened.encoder_config, PASSAGE_TOKENS),
        "decoder_flops": decoder_flops(decoder, num_states, num_tokens),
        "decoder_cached_flops": decoder_flops(decoder, num_states, num_tokens, cached=True),
    }


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@flags.pairs
@option("--parity", "formats", type=_FORMATS, default="both", help="Number formats; float32 needs 4 bytes a parameter.")
@flags.threads
@flags.as_json
@click.pass_context
def convert_ctxl(ctx: click.Context, /, source: str, target: Path, formats: str, **options: Any) -> None:
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
    from tuning.progress import counted

    tune_process(options["threads"])
    say = partial(print_parts, err=options["as_json"])
    compared, opened = PairSet.read(options["pairs"]), CausalSource.open(source)
    told = {"source": f"{opened.name}, {opened.architecture} to {opened.target}"}
    told["score"] = f"row 0 of {opened.head}{' (tied)' if opened.tied else ''}"
    told["padding"] = f"left, with {opened.pad_token!r} ({opened.pad_token_id})"
    say(Table.facts(told))
    dtypes = ("float32", "bfloat16") if formats == "both" else (formats,)
    with staged(target) as folder:
        with ProgressDisplay() as progress:
            with counted(progress, "convert", len(opened.sizes), "tensors") as advance:
                opened.convert(folder, advance)
            rows = parity(opened, folder, compared, dtypes, progress)
        say(f"{rows[0].num_pairs} pairs ({compared.name}), the original against the conversion:", _parities(rows))
        record = {"source": source, "head": opened.head, "pairs": compared.name, "parity": [*map(asdict, rows)]}
        is_same = all(row.passed for row in rows)
        if options["as_json"]:
            print_json({"target": str(target) if is_same else None} | record)
        if not is_same:
            print_parts(f"FAILED: the scores differ by more than rounding; {target} was not made", err=True)
            ctx.exit(BAD_ITEMS)  # raises, and so the folder goes
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        (folder / "conversion.json").write_text(text, encoding="utf-8")
    license = opened.files.profile.license
    say(Table.facts({"converted": str(target), "licence": license and f"{license}, as the source's"}))


def _parities(rows: Sequence[ParityRow]) -> Table:
    numbers = ("max |delta|", "allowed", "Kendall tau", "rank agreement")
    table = Table([Column("parity", WHOLE), Column("", WHOLE), *map(Column, numbers)], num_keys=2, indent=2)
    for row in rows:
        deltas, verdict = (f"{row.max_delta:.2e}", f"{row.allowed_delta:.2e}"), "pass" if row.passed else "FAIL"
        table.add(row.dtype, verdict, *deltas, f"{row.tau:.4f}", f"{row.rank_agreement:.0%}")
    return table
