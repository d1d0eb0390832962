"""The machine, as far as it explains a measured figure. Does not know models."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch


def hardware() -> dict[str, Any]:
    """Processor, cores, threads, number formats in hardware, memory, and the GPU where there is one."""
    capabilities = torch.cpu.get_capabilities()
    features = [name for name in ("avx512_f", "avx512_bf16", "amx_bf16", "amx_int8") if capabilities.get(name)]
    line: dict[str, Any] = {
        "processor": capabilities.get("cpu_name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": ", ".join(features),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        line["gpu"] = torch.cuda.get_device_name()
    return line
