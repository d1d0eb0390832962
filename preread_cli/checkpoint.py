"""`preread checkpoint`: what a checkpoint is and whether it can be served. Reads its files; runs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from preread_cli.options import control_tokens_option, json_option, option, shipped_model

SHAPES = ("tiny", "nano")


@click.command()
@click.argument("model", metavar="[DIR|HUB_ID]", required=False)
@control_tokens_option
@option("--max-passage-tokens", type=click.IntRange(min=1), help="As it would be with this passage limit.")
@option("--make-random", metavar="|".join(SHAPES), type=click.Choice(SHAPES), help="Write random weights to DIR first.")
@option("--seed", metavar="N", default=0, help="With --make-random.")
@json_option
def command(
    model: str | None,
    read_control_tokens: bool,
    max_passage_tokens: int | None,
    make_random: str | None,
    seed: int,
    as_json: bool,
) -> None:
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
    model = model or shipped_model()
    if model is None:
        raise click.UsageError("Name a directory or a hub id; none came with this installation.")
    opened = Checkpoint.open(model, max_passage_tokens=max_passage_tokens, neutralise=not read_control_tokens)
    facts = _facts(opened)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        _print(facts)


def _facts(checkpoint: Any) -> dict[str, Any]:
    from checkpoint.model import tensor_shapes

    checkpoint.check_decoder()  # the fingerprint reads every encoder tensor; the decoder's are looked for
    settings = checkpoint.settings
    encoder, decoder = checkpoint.encoder_config, checkpoint.decoder_config
    prompt = checkpoint.text.prompt("a")
    identity = checkpoint.identity()
    return {
        "checkpoint": checkpoint.name,
        "fingerprint": identity.fingerprint,
        "dim": checkpoint.dim,
        "encoder_parameters": _count(tensor_shapes("encoder", encoder)),
        "encoder_layers": encoder.num_hidden_layers,
        "decoder_parameters": _count(tensor_shapes("decoder", decoder)),
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


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    from math import prod

    return sum(prod(shape) for shape in shapes.values())


def _print(facts: dict[str, Any]) -> None:
    from preread_cli.tables import human_bytes, print_facts

    def half(name: str) -> str:
        count = facts[f"{name}_parameters"]
        sizes = f"{human_bytes(2 * count)} in bfloat16, {human_bytes(4 * count)} in float32"
        return f"{count / 1e6:,.1f} million parameters, {facts[f'{name}_layers']} layers ({sizes})"

    def answer(name: str) -> str:
        return f"{facts[name]['token']!r} is token {facts[name]['id']}"

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
            "answers": f"{answer('yes')}, {answer('no')}",
            "instruction": facts["default_instruction"],
            "passage template": repr(facts["passage_template"]),
            "prompt template": repr(facts["prompt_template"]),
        }
    )
