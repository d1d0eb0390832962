"""A random model is the same model in every process and on every processor: what a test says of it holds elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from benchmarks.synthetic import KINDS, make_cross_encoder
from checkpoint.synthetic import make_checkpoint

ROOT = Path(__file__).parents[1]
FBNL = "an encoder-decoder"
# One for each way of making a tokenizer, and the one with weights that transformers does not make.
SOME = (FBNL, "BertForSequenceClassification", "XLMRobertaForSequenceClassification", "JinaForRanking")
ELSEWHERE = """
import json, sys
from pathlib import Path
from test_synthetic import made
print(json.dumps({name: made(name, Path(sys.argv[1]) / name) for name in sys.argv[2:]}))
"""


def made(name: str, directory: Path) -> dict[str, str]:
    """A digest of every file."""
    if name == FBNL:
        make_checkpoint(directory)
    else:
        make_cross_encoder(directory, name)
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("name", [FBNL, *KINDS])
def test_the_same_arguments_give_the_same_bytes_whatever_was_drawn_before(name: str, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    first = made(name, tmp_path / "first")
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are not touched"
    torch.randn(100)
    assert made(name, tmp_path / "second") == first


def test_another_process_without_vector_units_makes_the_same(tmp_path: Path) -> None:
    here = {name: made(name, tmp_path / "here" / name) for name in SOME}
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "PYTHONHASHSEED": "7",
        "RAYON_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "default",
    }
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "there"), *SOME]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here
