"""Laws of the process settings: batches of ever new sizes do not make the process grow.

Laws of what a process may use: quotas of control groups in trees of files as kernels lay them out.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint.compute import cpu_multiplies_bfloat16, cpu_quota, hardware, memory_left, usable_cores

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


V2 = "31 23 0:28 {root} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {root} {point} rw,nosuid shared:9 - cgroup cgroup rw,{names}"
OTHER = "24 1 0:22 / /proc rw - proc proc rw\n\nnonsense"


@pytest.fixture
def tree(tmp_path: Path):
    """tree(groups, mounts, **files): a root. Files are named by their path under it, `/` written as it is."""

    def make(groups: str, mounts: str, files: dict[str, str]) -> Path:
        content = {"proc/self/cgroup": groups, "proc/self/mountinfo": f"{OTHER}\n{mounts}\n"} | files
        for name, text in content.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        return tmp_path

    return make


def v2(root: str = "/", point: str = "/sys/fs/cgroup") -> str:
    return V2.format(root=root, point=point)


def v1(names: str, root: str = "/", point: str = "/sys/fs/cgroup/cpu,cpuacct") -> str:
    return V1.format(names=names, root=root, point=point)


CPU = "sys/fs/cgroup/cpu,cpuacct"
CASES = {
    "v2, in a namespace": ("0::/", v2(), {"sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
    "v2, fractions": ("0::/", v2(), {"sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
    "v2, below one": ("0::/", v2(), {"sys/fs/cgroup/cpu.max": "10000 100000"}, 0.1),
    "v2, another period": ("0::/", v2(), {"sys/fs/cgroup/cpu.max": "30000 10000"}, 3.0),
    "v2, none": ("0::/", v2(), {"sys/fs/cgroup/cpu.max": "max 100000"}, math.inf),
    "v2, no such file, as in the root group": ("0::/", v2(), {}, math.inf),
    "v2, the strictest is around it": (
        "0::/slice/unit",
        v2(),
        {"sys/fs/cgroup/slice/unit/cpu.max": "400000 100000", "sys/fs/cgroup/slice/cpu.max": "100000 100000"},
        1.0,
    ),
    "v2, the strictest is its own": (
        "0::/slice/unit",
        v2(),
        {"sys/fs/cgroup/slice/unit/cpu.max": "50000 100000", "sys/fs/cgroup/slice/cpu.max": "max 100000"},
        0.5,
    ),
    "v2, a group beside it does not count": ("0::/a", v2(), {"sys/fs/cgroup/b/cpu.max": "100000 100000"}, math.inf),
    "v2, mounted without a namespace": (
        "0::/docker/abc",
        v2("/docker/abc"),
        {"sys/fs/cgroup/cpu.max": "250000 100000"},
        2.5,
    ),
    "v2, outside of what is mounted": ("0::/../other", v2(), {"sys/fs/cgroup/cpu.max": "300000 100000"}, 3.0),
    "v2, a path with a space": ("0::/a b", v2(point="/mnt/c\\040g"), {"mnt/c g/a b/cpu.max": "100000 100000"}, 1.0),
    "v2, not as it should be": ("0::/", v2(), {"sys/fs/cgroup/cpu.max": "many 0 0"}, math.inf),
    "v2, a period of zero": ("0::/", v2(), {"sys/fs/cgroup/cpu.max": "100000 0"}, math.inf),
    "v1": (
        "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc",
        v1("cpu,cpuacct", "/docker/abc"),
        {f"{CPU}/cpu.cfs_quota_us": "150000", f"{CPU}/cpu.cfs_period_us": "100000"},
        1.5,
    ),
    "v1, none": (
        "4:cpu,cpuacct:/",
        v1("cpu,cpuacct"),
        {f"{CPU}/cpu.cfs_quota_us": "-1", f"{CPU}/cpu.cfs_period_us": "100000"},
        math.inf,
    ),
    "v1, nested": (
        "4:cpu,cpuacct:/a/b",
        v1("cpu,cpuacct"),
        {
            f"{CPU}/a/b/cpu.cfs_quota_us": "-1",
            f"{CPU}/a/b/cpu.cfs_period_us": "100000",
            f"{CPU}/a/cpu.cfs_quota_us": "100000",
            f"{CPU}/a/cpu.cfs_period_us": "50000",
        },
        2.0,
    ),
    "v1, cpuacct alone has no quota": (
        "5:cpuacct:/",
        v1("cpuacct"),
        {f"{CPU}/cpu.cfs_quota_us": "100000", f"{CPU}/cpu.cfs_period_us": "100000"},
        math.inf,
    ),
    "both": (
        "4:cpu,cpuacct:/\n0::/",
        v1("cpu,cpuacct") + "\n" + v2(point="/sys/fs/cgroup/unified"),
        {f"{CPU}/cpu.cfs_quota_us": "300000", f"{CPU}/cpu.cfs_period_us": "100000"},
        3.0,
    ),
    "no groups": ("", "", {}, math.inf),
}


@pytest.mark.parametrize(("groups", "mounts", "files", "quota"), CASES.values(), ids=CASES)
def test_quotas(tree, groups: str, mounts: str, files: dict[str, str], quota: float) -> None:
    root = tree(groups, mounts, files)
    assert cpu_quota(root) == quota
    affinity = len(os.sched_getaffinity(0))
    assert usable_cores(root) == max(1, int(min(quota, affinity)))


def test_no_files_at_all(tmp_path: Path) -> None:
    assert (cpu_quota(tmp_path), memory_left(tmp_path)) == (math.inf, math.inf)


def test_memory_of_nested_groups(tree) -> None:
    files = {
        "sys/fs/cgroup/a/b/memory.max": "max",
        "sys/fs/cgroup/a/b/memory.current": "100",
        "sys/fs/cgroup/a/memory.max": "1000",
        "sys/fs/cgroup/a/memory.current": "400",
    }
    assert memory_left(tree("0::/a/b", v2(), files)) == 600
    memory = "sys/fs/cgroup/memory"
    old = {f"{memory}/memory.limit_in_bytes": "1000", f"{memory}/memory.usage_in_bytes": "1200"}
    assert memory_left(tree("3:memory:/", v1("memory", point=f"/{memory}"), old)) == 0


def test_a_process_takes_no_more_threads_than_it_may_use() -> None:
    code = "import os; from checkpoint.compute import tune_process; import torch; tune_process()\n"
    code += "print(torch.get_num_threads(), os.environ['TORCHINDUCTOR_COMPILE_THREADS'])"
    environment = os.environ | {"OMP_NUM_THREADS": "64"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(int(number) <= usable_cores() for number in done.stdout.split())
    assert hardware()["cores"] == usable_cores()
