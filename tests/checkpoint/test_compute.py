"""Laws of the process settings: batches of ever new sizes do not make the process grow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint.compute import cpu_multiplies_bfloat16

MEASURE = """
import ctypes, threading
import torch
from checkpoint.compute import tune_process
from checkpoint.layers import GatedLinear, Linear

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
tune_process(1)
gate = torch.ones(96, 64, dtype=torch.bfloat16)
gated, down = GatedLinear(gate, gate), Linear(gate.T.contiguous())

def multiply(sizes):
    for rows in sizes:
        x = torch.ones(rows, 64, dtype=torch.bfloat16)
        down(gated(x))

multiply(range(1, 101))
before = mallinfo().uordblks
multiply(range(101, 401))
print(mallinfo().uordblks - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
@pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="only bfloat16 products are prepared")
def test_batches_of_ever_new_sizes_take_no_more_memory() -> None:
    """Three hundred more sizes after the first hundred: less than a hundredth of what keeping them all would take."""
    assert torch.backends.mkldnn.is_available()
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1 << 20
