"""Products with packed weights are the plain ones, for any number of rows.

Fused steps compute what they are made of, and are compiled once whatever the number of rows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from checkpoint.compute import choose_fused, cpp_compiler
from checkpoint.layers import GatedLinear, Linear, Pointwise

# Of float32: what summing in another order moves; of bfloat16: half a unit in the last place of the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 257])
def test_products_are_the_plain_ones(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 64, generator=generator).to(dtype)
    gate, up = (torch.randn(2, 128, 64, generator=generator) / 8).to(dtype)
    torch.testing.assert_close(Linear(up)(x).float(), x.float() @ up.float().T, atol=TOLERANCE[dtype], rtol=0.01)
    exact = F.gelu(x.float() @ gate.float().T, approximate="tanh") * (x.float() @ up.float().T)
    found = GatedLinear(gate, up)(x).float()
    plain = (F.gelu(F.linear(x, gate), approximate="tanh") * F.linear(x, up)).float()
    assert (found - exact).abs().max() <= max(1.5 * (plain - exact).abs().max().item(), TOLERANCE[torch.float32])


def test_leading_axes_are_rows() -> None:
    x, weight = (torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in ((2, 5, 16), (8, 16)))
    torch.testing.assert_close(Linear(weight)(x).shape, (2, 5, 8))


ROOT = Path(__file__).parents[2]
EPS = 1e-6


@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler: fused steps NOT checked")
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch's own, from inside its compiler
@pytest.mark.slow
def test_fused_steps_are_the_plain_ones_and_never_compile_again() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    fused, plain = Pointwise(EPS, compiled=True), Pointwise(EPS)
    weight, head = random(64), random(16)
    compilations = []
    for rows, keys in ((5, 7), (2, 3), (40, 19), (1, 7), (3, 1)):
        x, update, heads = random(rows, 64), random(rows, 64), random(rows, 4, 16)
        cos, sin = random(rows, 1, 16), random(rows, 1, 16)
        logits, mask = random(rows, 4, keys), random(rows, 1, keys)
        torch.testing.assert_close(fused.rms_norm(x, weight), plain.rms_norm(x, weight))
        torch.testing.assert_close(fused.add_norm(x, update, weight, weight), plain.add_norm(x, update, weight, weight))
        rotated = plain.norm_rotate(heads, head, cos, sin)
        torch.testing.assert_close(fused.norm_rotate(heads, head, cos, sin), rotated)
        torch.testing.assert_close(fused.masked_softmax(logits, mask), plain.masked_softmax(logits, mask))
        compilations.append(fused.num_compilations)
    assert fused.compiled
    assert compilations == [4] * len(compilations)


NORM = """
import torch
from checkpoint.layers import Pointwise
x, weight = (torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in ((40, 64), (64,)))
fused = Pointwise(1e-6, compiled=True)
torch.testing.assert_close(fused.rms_norm(x, weight), Pointwise(1e-6).rms_norm(x, weight))
assert fused.compiled
"""


@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler: fused steps NOT checked")
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch's own, from inside its compiler
@pytest.mark.slow
def test_code_that_was_compiled_for_other_vector_units_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a folder of compiled code is kept, and the processor or what it may use changes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", NORM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    exec(NORM, {})


def test_a_processor_has_one_folder_of_compiled_code_wherever_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "given"))

    def folder() -> Path:
        Pointwise(EPS, compiled=True)
        return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])

    first = folder()
    assert first.parent == tmp_path / "given"
    assert folder() == first
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # no vector units at all
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX"):
        assert folder() != first


@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler: fused steps NOT checked")
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch's own, from inside its compiler
@pytest.mark.slow
def test_many_stacks_of_one_process_are_all_fused() -> None:
    x, weight = (torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in ((5, 8), (8,)))
    for _ in range(12):  # more than torch compiles one function by itself
        fused = Pointwise(EPS, compiled=True)
        fused.rms_norm(x, weight)
        assert (fused.compiled, fused.num_compilations) == (True, 1)


def test_small_models_and_machines_without_a_compiler_compute_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert not choose_fused(64, cpu)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert not choose_fused(4096, cpu)


def test_a_compiler_that_does_not_work_costs_speed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Pointwise, graph: object, inputs: object) -> object:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(Pointwise, "_inductor", broken)
    fused = Pointwise(EPS, compiled=True)
    x, weight = (torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in ((5, 8), (8,)))
    torch.testing.assert_close(fused.rms_norm(x, weight), Pointwise(EPS).rms_norm(x, weight))
    assert not fused.compiled
