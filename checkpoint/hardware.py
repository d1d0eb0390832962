"""The machine: what this process may use of it, and what explains a measured figure. Does not know models."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch


def usable_cores(root: Path = Path("/")) -> int:
    """Processors that this process may use: its affinity, and no more than the quotas of its control groups pay for.

    A quota of 2.5 processors is 2: a third thread would have the kernel stop all of them for part of every period.
    At least 1.

    Args:
        root: where the file system begins; of another tree in tests.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(affinity, cpu_quota(root))))


def cpu_quota(root: Path = Path("/")) -> float:
    """Processors that the control groups of this process allow, the strictest of those it is in; infinite without any.

    cgroup v2's cpu.max and v1's cpu.cfs_quota_us, in every group from the process's own up to the mounted one.
    """
    quotas = [math.inf]
    for group in control_groups("cpu", root):
        words = _words(group / "cpu.max")  # v2: quota or max, then the period
        if not words:  # v1
            words = _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        try:
            quota, period = map(int, words)
        except ValueError:  # max, or nothing to read
            continue
        if quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas)


def memory_left(root: Path = Path("/")) -> float:
    """Bytes that the control groups of this process still allow; infinite without a limit."""
    left = [math.inf]
    for group in control_groups("memory", root):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            try:
                most, now = map(int, _words(group / limit) + _words(group / used))
            except ValueError:
                continue
            left.append(max(0, most - now))
    return min(left)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Directories of the groups that this process is in, its own first, then those around it, of cgroup v1 and v2."""
    own: dict[str, PurePosixPath] = {}  # by controller; "": v2, which has one tree for all
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        own |= dict.fromkeys(names.split(","), PurePosixPath(path))
    for line in _lines(root / "proc/self/mountinfo"):
        mounted, _, kind = line.partition(" - ")
        fields, kinds = mounted.split(), kind.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        key = {"cgroup": controller, "cgroup2": ""}.get(kinds[0])
        if key is None or key not in own or (key and key not in kinds[2].split(",")):
            continue
        top = root / _unescaped(fields[4]).lstrip("/")
        # The mount may be a group itself (a container without a namespace for groups): paths begin there. A path
        # outside of it cannot be looked at; the mounted group is around it, or is it.
        inside, begin = own[key], PurePosixPath(_unescaped(fields[3]))
        relative = inside.relative_to(begin) if inside.is_relative_to(begin) and ".." not in inside.parts else None
        for group in (relative, *relative.parents) if relative is not None else ():
            if group.parts:
                yield top / group
        yield top


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _words(file: Path) -> list[str]:
    return [word for line in _lines(file)[:1] for word in line.split()]


def _unescaped(path: str) -> str:
    """A path of mountinfo, where a space is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def hardware() -> dict[str, Any]:
    """Processor, cores, threads, number formats in hardware, memory, and the GPU where there is one."""
    capabilities = torch.cpu.get_capabilities()
    features = [name for name in ("avx512_f", "avx512_bf16", "amx_bf16", "amx_int8") if capabilities.get(name)]
    line: dict[str, Any] = {
        "processor": capabilities.get("cpu_name") or platform.processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "features": ", ".join(features),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        line["gpu"] = torch.cuda.get_device_name()
    return line
