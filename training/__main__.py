"""`python -m training`: data, start, train, make, opposed. `preread evaluate` measures a checkpoint."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from training import data
from training.evaluation import HeldOut, report_opposed
from training.groups import TeacherVectors, TrainingGroup
from training.model import TrainableCheckpoint
from training.recipe import Recipe
from training.start import start
from training.trainer import Trainer

_RECIPES = Path(__file__).parent / "recipes"
_COMMANDS = {  # name -> (help, paths that it requires)
    "data": ("raw collections and Debian descriptions -> training groups", ("--collections", "--debian", "--out")),
    "start": ("training texts -> vocabulary and starting weights", ("--data", "--out")),
    "train": ("groups + a checkpoint -> a checkpoint", ("--data", "--from", "--out")),
    "make": ("data, start and train in one go", ("--collections", "--work", "--out")),
    "opposed": ("measure opposed instructions on held-out MedQuAD", ()),
}
_PATHS = {
    "--collections": "folder of BEIR folders, with medquad and scifact",
    "--debian": "private folder for the description lists; filled by apt-get when empty",
    "--data": "the folder `data` wrote; to `train` also a .jsonl of groups",
    "--from": "checkpoint directory to start from (ours, or a KaLM one)",
    "--work": "folder for everything in between",
}
_KINDS: dict[type, Callable[[str], Any]] = {  # how a flag's text is read, where its type does not do it
    tuple: lambda text: tuple(int(part) for part in text.split(",") if part),
    bool: {"true": True, "false": False}.__getitem__,
}


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    made = {name: commands.add_parser(name, help=text) for name, (text, _) in _COMMANDS.items()}
    for name, (_, flags) in _COMMANDS.items():
        for flag in flags:
            made[name].add_argument(flag, type=Path, required=True, help=_PATHS.get(flag))
    made["data"].add_argument("--max-debian", type=int, help="take only so many Debian queries")
    made["start"].add_argument("--vocab-size", type=int, default=15000)
    train = made["train"]
    train.add_argument("--recipe", type=Path, help="TOML; flags below override it")
    train.add_argument("--heldout", type=Path, help="BEIR folders to evaluate; default DATA/select where it exists")
    train.add_argument("--resume", action="store_true", help="continue from OUT/state.pt")
    train.add_argument("--device", default="auto")
    for field in dataclasses.fields(Recipe):
        kind = _KINDS.get(type(field.default), type(field.default))
        train.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help=f"default {field.default}")
    text = "one after the other, each from what the one before made; default: preread-mini's"
    default = [_RECIPES / "mini.toml", _RECIPES / "mini-more.toml"]
    made["make"].add_argument("--recipe", type=Path, nargs="+", default=default, help=text)
    made["opposed"].add_argument("checkpoint", type=Path)
    made["opposed"].add_argument("medquad", type=Path, help="the held-out MedQuAD folder")
    return top


def _main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if args.command == "data":
        data.build(args.collections, args.debian, args.out, max_debian=args.max_debian)
    elif args.command == "start":
        start(args.data, args.out, args.vocab_size)
    elif args.command == "train":
        recipe = Recipe.read(args.recipe, {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe)})
        checkpoint = TrainableCheckpoint.load(getattr(args, "from"), args.device)
        path = args.data / "train.jsonl" if args.data.is_dir() else args.data
        trainer = Trainer(checkpoint, TrainingGroup.read(path), recipe, args.out, TeacherVectors.read(path))
        if args.resume:
            trainer.resume()
        folder = args.heldout or args.data / "select"
        held_out = HeldOut(folder, recipe.evaluate_queries) if folder.is_dir() else None
        counts = f"{len(trainer.sampler.groups)} groups, {trainer.sampler.steps_per_epoch} steps an epoch"
        print(f"{counts}, on {trainer.device}", flush=True)
        trainer.run((lambda: held_out.report(checkpoint, (1, 4, 32))) if held_out else None)
    elif args.command == "make":
        work, out = str(args.work), str(args.out)
        _main(["data", "--collections", str(args.collections), "--debian", f"{work}/debian", "--out", f"{work}/data"])
        _main(["start", "--data", f"{work}/data", "--out", f"{work}/start"])
        made = [f"{work}/start", *(f"{work}/after-{recipe.stem}" for recipe in args.recipe[:-1]), out]
        for recipe, (begin, end) in zip(args.recipe, pairwise(made), strict=True):
            _main(["train", "--data", f"{work}/data", "--from", begin, "--out", end, "--recipe", str(recipe)])
    elif args.command == "opposed":
        report_opposed(args.checkpoint, args.medquad)


if __name__ == "__main__":
    _main()
