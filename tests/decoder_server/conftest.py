"""A tiny random checkpoint, its real backend, and that backend behind a gate."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from checkpoint import Checkpoint, EncoderIdentity, TokenizedPrompt
from checkpoint.synthetic import make_checkpoint
from decoder_server.backend import Pair
from decoder_server.fbnl import FbnlBackend


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "tiny")


@pytest.fixture(scope="session")
def fbnl(tiny: Path) -> FbnlBackend:
    return FbnlBackend.load(Checkpoint.open(tiny), device="cpu", dtype="float32")


class GatedBackend:
    """A real backend whose passes can be held up; remembers every pass it made."""

    name = "fbnl"

    def __init__(self, real: FbnlBackend) -> None:
        self.real = real
        self.settings, self.dtype_name, self.device_name = real.settings, real.dtype_name, real.device_name
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.passes: list[list[Pair]] = []
        self.seconds_per_pass = 0.0

    def identity(self) -> EncoderIdentity:
        return self.real.identity()

    def prompt(self, query: str, instruction: str | None = None) -> TokenizedPrompt:
        return self.real.prompt(query, instruction)

    def score(self, pairs: Sequence[Pair]) -> NDArray[np.float32]:
        self.passes.append(list(pairs))
        self.entered.set()
        assert self.gate.wait(30)
        time.sleep(self.seconds_per_pass)
        return self.real.score(pairs)

    def warm_up(self) -> None:
        self.real.warm_up()


@pytest.fixture
def gated(fbnl: FbnlBackend) -> GatedBackend:
    return GatedBackend(fbnl)
