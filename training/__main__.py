"""`python -m training`: data, start, train, make, opposed. Evaluation is `preread evaluate`'s."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from training.trainer import Recipe, read_recipe


def _flag_type(default: Any) -> Any:
    if isinstance(default, tuple):
        return lambda text: tuple(int(part) for part in text.split(",") if part)
    if isinstance(default, bool):
        return lambda text: {"true": True, "false": False}[text]
    return type(default)


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="raw collections and Debian descriptions -> training groups")
    data.add_argument(
        "--collections", type=Path, required=True, help="folder of BEIR folders, with medquad and scifact"
    )
    data.add_argument(
        "--debian",
        type=Path,
        required=True,
        help="private folder for the description lists; filled by apt-get when empty",
    )
    data.add_argument("--out", type=Path, required=True)
    data.add_argument("--max-debian", type=int, help="take only so many Debian queries")
    start = commands.add_parser("start", help="training texts -> vocabulary and starting weights")
    start.add_argument("--data", type=Path, required=True)
    start.add_argument("--out", type=Path, required=True)
    start.add_argument("--vocab-size", type=int, default=15000)
    train = commands.add_parser("train", help="groups + a checkpoint -> a checkpoint")
    train.add_argument("--data", type=Path, required=True, help="a .jsonl of groups, or the folder `data` wrote")
    train.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        help="checkpoint directory to start from (ours, or a KaLM one)",
    )
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--recipe", type=Path, help="TOML; flags below override it")
    train.add_argument(
        "--heldout",
        type=Path,
        help="folder of BEIR folders evaluated while training; default DATA/select where it exists",
    )
    train.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    train.add_argument("--device", default="auto")
    for field in dataclasses.fields(Recipe):
        train.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_flag_type(field.default),
            default=None,
            help=f"default {field.default}",
        )
    make = commands.add_parser("make", help="data, start and train in one go")
    make.add_argument("--collections", type=Path, required=True)
    make.add_argument("--work", type=Path, required=True, help="folder for everything in between")
    make.add_argument("--out", type=Path, required=True)
    recipes = Path(__file__).parent / "recipes"
    make.add_argument(
        "--recipe",
        type=Path,
        nargs="+",
        default=[recipes / "mini.toml", recipes / "mini-more.toml"],
        help="one after the other, each from what the one before made; default: preread-mini's",
    )
    opposed = commands.add_parser("opposed", help="measure opposed instructions on held-out MedQuAD")
    opposed.add_argument("checkpoint", type=Path)
    opposed.add_argument("medquad", type=Path, help="the held-out MedQuAD folder")
    return top


def _train(args: argparse.Namespace) -> None:
    from training.evaluation import HeldOut
    from training.groups import GroupSet, read_groups, read_vectors, vectors_path
    from training.model import load
    from training.trainer import Trainer, pick_device

    recipe = read_recipe(args.recipe, {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe)})
    checkpoint = load(args.source)
    groups = args.data / "train.jsonl" if args.data.is_dir() else args.data
    data = GroupSet(read_groups(groups), checkpoint, read_vectors(vectors_path(groups)))
    trainer = Trainer(checkpoint, data, recipe, args.out, pick_device(args.device))
    if args.resume:
        trainer.resume()
    folder = args.heldout or args.data / "select"
    held_out = HeldOut(folder, recipe.evaluate_queries) if folder.is_dir() else None
    print(f"{len(data)} groups, {trainer.sampler.steps_per_epoch} steps an epoch, on {trainer.device}", flush=True)
    trainer.run((lambda: held_out.report(checkpoint, (1, 4, 32))) if held_out else None)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if args.command == "data":
        from training.data import build

        build(args.collections, args.debian, args.out, max_debian=args.max_debian)
    elif args.command == "start":
        from training.start import start

        start(args.data, args.out, args.vocab_size)
    elif args.command == "train":
        _train(args)
    elif args.command == "make":
        work, out = str(args.work), str(args.out)
        main(["data", "--collections", str(args.collections), "--debian", f"{work}/debian", "--out", f"{work}/data"])
        main(["start", "--data", f"{work}/data", "--out", f"{work}/start"])
        made = [f"{work}/start", *(f"{work}/after-{recipe.stem}" for recipe in args.recipe[:-1]), out]
        for recipe, (begin, end) in zip(args.recipe, pairwise(made), strict=True):
            main(["train", "--data", f"{work}/data", "--from", begin, "--out", end, "--recipe", str(recipe)])
    elif args.command == "opposed":
        from training.evaluation import report

        report(args.checkpoint, args.medquad)


if __name__ == "__main__":
    main()
