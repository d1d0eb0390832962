"""Every block of docs/integrations.md whose framework is in this environment runs, against a real server."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from preread.integrations.ranker import Settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "integrations.md").read_text()
FIRST, *BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
FRAMEWORKS = {
    "langchain": "langchain_core", "llamaindex": "llama_index", "haystack": "haystack", "lancedb": "lancedb",
    "pyterrier": "pyterrier", "mteb": "mteb", "functions": "preread",
}  # fmt: skip


@pytest.fixture
def here(server, tmp_path, monkeypatch):
    """A folder that has what the page names; here(text) has the addresses of the running server."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    named = {"127.0.0.1:50051": server.grpc_address, "127.0.0.1:50052": server.encoder_address}
    return lambda text: re.sub("|".join(map(re.escape, named)), lambda match: named[match[0]], text)


def module(block: str) -> str:
    return re.search(r"preread\.integrations\.(\w+)", block)[1]


def skip_without(name: str) -> None:
    if importlib.util.find_spec(FRAMEWORKS[name]) is None:
        pytest.skip(f"{FRAMEWORKS[name]} is not in this environment")


def test_the_page_has_a_block_for_each() -> None:
    assert sorted(map(module, BLOCKS)) == sorted(FRAMEWORKS)


@pytest.mark.parametrize("block", BLOCKS, ids=module)
def test_a_block_runs(block: str, here, capsys) -> None:
    skip_without(module(block))
    known: dict[str, object] = {"__name__": "page"}
    for text in (FIRST, block):
        exec(compile(here(text), "integrations.md", "exec"), known)
    assert re.search(r"0\.\d", capsys.readouterr().out)


def test_the_command_runs_on_local_files(here) -> None:
    skip_without("mteb")
    (line,) = re.findall(r"^python (.* examples/scifact .*)$", PAGE, re.MULTILINE)
    said = subprocess.run([sys.executable, *shlex.split(here(line))], capture_output=True, text=True)
    assert re.match(r"scifact\tndcg_at_10\t0\.\d{4}\nmean of 1\t\t0\.\d{4}\n", said.stdout), said.stderr


def test_the_commands_flags_exist() -> None:
    skip_without("mteb")
    lines = re.findall(r"^python -m preread\.integrations\.mteb (.*)$", PAGE, re.MULTILINE)
    shown = {word for line in lines for word in shlex.split(line) if word.startswith("--")}
    usage = subprocess.run(
        [sys.executable, "-m", "preread.integrations.mteb", "--help"], capture_output=True, text=True
    )
    assert shown <= set(re.findall(r"--[\w-]+", usage.stdout))


def test_the_table_lists_every_setting() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.split("## Plain functions")[0], re.MULTILINE)
    assert sorted(rows) == sorted(Settings.__optional_keys__)
