"""The machine: cores and memory that this process may use, device, number format, and settings for steady inference."""

import ctypes
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

# Matrix products that oneDNN keeps prepared, one for every number of rows: two caches, a thousand each by default,
# which every batch of another size fills up to a gigabyte, in our measurements without saving any time.
PREPARED_PRODUCTS = {"LRU_CACHE_CAPACITY": "32", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A narrower model computes a pass in less time than its steps take to compile.
MIN_FUSED_DIM = 512


def usable_cores(root: Path = Path("/")) -> int:
    """Processors that this process may use, at least 1: its affinity, within the quotas of its control groups.
    A quota of 2.5 processors is 2: a third thread would have the kernel stop all of them for part of every period.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(affinity, cpu_quota(root))))


def cpu_quota(root: Path = Path("/")) -> float:
    """Processors that the strictest control group of this process allows; infinite without any."""
    quotas = _group_numbers("cpu", root, ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return min((quota / period for quota, period in quotas if quota > 0 and period > 0), default=math.inf)


def memory_left(root: Path = Path("/")) -> float:
    """Bytes that the control groups of this process still allow; infinite without a limit."""
    v1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
    limits = _group_numbers("memory", root, ("memory.max", "memory.current"), v1)
    return min((max(0, limit - used) for limit, used in limits), default=math.inf)


def _group_numbers(controller: str, root: Path, *alternatives: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Two numbers of each control group, from its own up to the mounted one: from one file or two, of v2 or v1."""
    for group in _control_groups(controller, root):
        for files in alternatives:
            words = [word for file in files for line in _lines(group / file)[:1] for word in line.split()]
            if len(words) == 2 and all(word.removeprefix("-").isdecimal() for word in words):  # not max
                yield int(words[0]), int(words[1])


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Directories of the groups that this process is in, its own first, then those around it, of cgroup v1 and v2."""
    own: dict[str, PurePosixPath] = {}  # by controller; "": v2, which has one tree for all
    for line in _lines(root / "proc/self/cgroup"):
        names, _, path = line.partition(":")[2].partition(":")
        own |= dict.fromkeys(names.split(","), PurePosixPath(path))
    for line in _lines(root / "proc/self/mountinfo"):
        mounted, _, kind = line.partition(" - ")
        fields, kinds = mounted.split(), kind.split()
        key = {"cgroup": controller, "cgroup2": ""}.get(kinds[0]) if len(fields) > 4 and len(kinds) > 2 else None
        if key is None or key not in own or (key and key not in kinds[2].split(",")):
            continue
        # In mountinfo a space is \040.
        begin, mount = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field) for field in fields[3:5])
        top = root / mount.lstrip("/")
        # The mount may be a group itself (a container without a namespace for groups): paths begin there. A path
        # outside of it cannot be looked at; the mounted group is around it, or is it.
        if own[key].is_relative_to(begin) and ".." not in own[key].parts:
            relative = own[key].relative_to(begin)
            yield from (top / group for group in (relative, *relative.parents) if group.parts)
        yield top


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def hardware() -> dict[str, Any]:
    """Processor, cores, threads, number formats in hardware, memory, and the GPU where there is one."""
    capabilities = torch.cpu.get_capabilities()
    features = [name for name in ("avx512_f", "avx512_bf16", "amx_bf16", "amx_int8") if capabilities.get(name)]
    return {
        "processor": capabilities.get("cpu_name") or platform.processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "features": ", ".join(features),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    } | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def choose_device(name: str | None = None, dtype: str | None = None) -> tuple[torch.device, torch.dtype]:
    """The named device and number format; None or auto: CUDA where there is one, bfloat16 where it is native.
    float16 is never offered: this model family overflows it. ValueError where one is not to be had.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected auto, cpu or cuda[:N]")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}; this torch build or machine has no CUDA device")
    if dtype is None or dtype == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_multiplies_bfloat16()
        dtype = "bfloat16" if native else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected auto, {' or '.join(DTYPES)}")
    return device, DTYPES[dtype]


def cpu_multiplies_bfloat16() -> bool:
    """AMX or AVX512-BF16; without them bfloat16 is emulated and several times slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def choose_fused(dim: int, device: torch.device) -> bool:
    """Whether the steps between matrix products are worth compiling, and can be.
    On a CPU that needs a C++ compiler, some ten seconds once per machine, whose results torch keeps, and a few at every
    start. TORCH_COMPILE_DISABLE=1 is torch's own switch.
    """
    return device.type == "cpu" and dim >= MIN_FUSED_DIM and cpp_compiler() is not None


def cpp_compiler() -> str | None:
    """Path of the compiler that torch would call."""
    from torch._inductor import config

    names = [config.cpp.cxx] if isinstance(config.cpp.cxx, str) else [name for name in config.cpp.cxx if name]
    return next((path for name in names if (path := shutil.which(name))), None)


def tune_process(num_threads: int | None = None, *, one_heap: bool = False) -> None:
    """Process-wide settings for steady inference; called once by the owner of the process.
    `one_heap`: what a thread frees serves the others, for processes with few threads: each would keep its own most.
    torch counts processors, and does not know that a container's quota pays for fewer of them; more threads than that
    are stopped together for part of every period. So without a number there are at most as many as the quota allows.
    """
    cores = usable_cores()
    # Read at the first product, and only from there; a value that is set already wins. A compile thread is a process.
    for name, value in (PREPARED_PRODUCTS | {"TORCHINDUCTOR_COMPILE_THREADS": str(min(32, cores))}).items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(num_threads or min(torch.get_num_threads(), cores))
    # glibc hands activation-sized blocks back to the kernel on every free and pages them in again on the next batch,
    # which costs more than the arithmetic on them: keep them. Other C libraries have no mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, (1 << 31) - 1)
        if one_heap:
            mallopt(m_arena_max, 1)
