"""constraints.txt pins what both distributions require, what that needs in turn, and nothing else."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLIENT = tomllib.loads((ROOT / "preread" / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
BUILDING = {"hatchling", "editables"}  # scripts/environment installs them first
OLDER_PYTHON = {"async-timeout"}  # redis asks for it before Python 3.11.3, which Debian 12 has
CUDA = re.compile(r"nvidia-|cuda-|triton$")  # what other builds of torch need; this file is for all of them


def required() -> list[Requirement]:
    """By both distributions, each other left out."""
    lines = map(Requirement, (*PROJECT["dependencies"], *CLIENT["dependencies"]))
    return [one for one in lines if one.name != CLIENT["name"]]


def asked_for(extra: str) -> list[Requirement]:
    """What an extra means, extras of ours within it included."""
    wanted = [Requirement(line) for line in PROJECT["optional-dependencies"][extra]]
    own = [inner for one in wanted if one.name == PROJECT["name"] for inner in one.extras]
    return [one for one in wanted if one.name != PROJECT["name"]] + [r for inner in own for r in asked_for(inner)]


def everything() -> set[str]:
    """Names of all packages of a development environment, from what is installed here."""
    found: set[str] = set()
    todo = [(one.name, tuple(one.extras)) for one in required()]
    todo += [(one.name, tuple(one.extras)) for one in asked_for("dev")] + [(name, ()) for name in BUILDING]
    seen = set(todo)
    while todo:
        name, extras = todo.pop()
        found.add(canonicalize_name(name))
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for one in map(Requirement, lines):
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                further = (one.name, tuple(sorted(one.extras)))
                if further not in seen and not CUDA.match(canonicalize_name(one.name)):
                    seen.add(further)
                    todo.append(further)
    return found


def test_pins_are_what_is_needed_and_no_more() -> None:
    needed = everything()
    assert needed - set(PINS) == set(), "not pinned: run scripts/pin"
    assert set(PINS) - needed - OLDER_PYTHON == set(), "pinned and not needed: run scripts/pin"


def test_pins_are_within_the_ranges() -> None:
    for one in [*required(), *asked_for("dev")]:
        assert one.specifier.contains(PINS[canonicalize_name(one.name)]), one
