"""Two distributions from one tree: `preread`, which a search backend installs, and `preread-server` on top of it."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SERVER, CLIENT = (
    tomllib.loads((folder / "pyproject.toml").read_text())["project"] for folder in (ROOT, ROOT / "preread")
)
# A caller's PYTHONPATH would be in front of what is installed here.
run = functools.partial(subprocess.run, check=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
PACKAGES = {
    "preread_cli", "preread_local", "preread_edge", "cache", "checkpoint", "encoder_worker", "decoder_server", "tuning",
}  # fmt: skip
NO_FRAMEWORK = {"__init__", "fields", "functions", "ranker"}
INTEGRATIONS = {path.stem for path in (ROOT / "preread" / "integrations").glob("*.py")} - NO_FRAMEWORK
RERANK = """
import json, os, sys
from preread import Client, Passage
with Client(sys.argv[1], encoder_address=sys.argv[2]) as client:
    stored = [one.status for one in client.upsert([Passage("sky", "The sky is blue.")], collection="wheel")]
    results = client.rerank("why is the sky blue", ["sky"], collection="wheel")
results = [(one.passage_id, one.status) for one in results]
import preread
print(json.dumps([stored, results, os.path.dirname(preread.__file__), sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both, by the name of their distribution."""
    folder = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run([*build, "--wheel-dir", folder, "./preread", "."], cwd=ROOT)
    return {file.name.split("-")[0]: file for file in folder.glob("*.whl")}


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_clients_wheel_holds_the_clients(wheels: dict[str, Path]) -> None:
    names = contents(wheels["preread"])
    assert {"preread/__init__.py", "preread/v1/rerank_pb2.py", "preread/py.typed"} <= names
    assert {f"preread/integrations/{name}.py" for name in NO_FRAMEWORK | INTEGRATIONS} <= names
    assert {name.split("/")[0] for name in names} == {"preread"}
    assert {Path(name).suffix for name in names} == {".py", ".pyi", ".typed"}


def test_the_servers_wheel_holds_the_rest_and_its_model(wheels: dict[str, Path]) -> None:
    names = contents(wheels["preread_server"])
    assert {name.split("/")[0] for name in names} == {*PACKAGES, "preread"}
    assert {name.split("/")[1] for name in names if name.startswith("preread/")} == {"models"}
    committed = run(["git", "ls-files", *PACKAGES, "preread/models"], cwd=ROOT, capture_output=True, text=True)
    assert set(committed.stdout.split()) - names == set()
    assert not names & contents(wheels["preread"])


def test_both_are_of_one_version_and_say_so() -> None:
    version = SERVER["version"]
    assert CLIENT["version"] == version
    assert f"preread=={version}" in SERVER["dependencies"]
    for extra, requirements in CLIENT["optional-dependencies"].items():
        if extra in INTEGRATIONS:
            continue
        one = Requirement(*requirements)
        assert (one.name, str(one.specifier)) == ("preread-server", f"=={version}")
        assert one.extras == ({extra} - {"server"})
        assert one.extras <= set(SERVER["optional-dependencies"])


def test_every_integration_has_an_extra_that_the_tested_versions_meet() -> None:
    files = (ROOT / "tests" / "conformance" / name for name in ("constraints.txt", "mteb.txt"))
    lines = [line for file in files for line in file.read_text().splitlines() if "==" in line]
    tested = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    extras = CLIENT["optional-dependencies"]
    assert set(extras) >= INTEGRATIONS
    for one in map(Requirement, (line for name in INTEGRATIONS for line in extras[name])):
        assert tested[canonicalize_name(one.name)] in one.specifier, one


def test_the_servers_requirements_include_the_clients() -> None:
    assert set(CLIENT["dependencies"]) <= set(SERVER["dependencies"])


def test_the_clients_wheel_alone_reranks(wheels: dict[str, Path], tmp_path: Path, server_pair) -> None:
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / "bin" / "python"
    (site,) = tmp_path.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run([*install, wheels["preread"]])
    assert {path.name for path in site.iterdir()} == {"preread", f"preread-{CLIENT['version']}.dist-info"}
    link_requirements(site)

    call = [python, "-c", RERANK, server_pair.address, server_pair.encoder_address]
    said = run(call, capture_output=True, text=True, cwd=tmp_path)

    stored, results, folder, modules = json.loads(said.stdout)
    assert stored == ["stored"]
    assert results == [["sky", "hit"]]
    assert Path(folder) == site / "preread"
    assert not {"torch", "transformers", "faiss", "starlette", "numpy", "redis", "click", "cache"} & set(modules)


def link_requirements(site: Path) -> None:
    """What the clients require, and no other package, from the environment of the tests."""
    todo, seen = [Requirement(line).name for line in CLIENT["dependencies"]], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        todo += [Requirement(line).name for line in found.requires or () if "extra ==" not in line]
        for top in {file.parts[0] for file in found.files or () if not re.match(r"\.\.|__pycache__", file.parts[0])}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
