"""Where and in which number format a half computes. Does not know models."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from checkpoint.hardware import usable_cores

# Matrix products that oneDNN keeps prepared, one for every number of rows: two caches, a thousand each by default,
# which every batch of another size fills up to a gigabyte, in our measurements without saving any time.
PREPARED_PRODUCTS = {"LRU_CACHE_CAPACITY": "32", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str | None = None) -> torch.device:
    """The named device, or CUDA where there is one, else the CPU.

    Raises:
        ValueError: a device that this machine or torch build does not have.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ValueError(f"device is {name!r}; expected auto, cpu or cuda[:N]") from exc
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected auto, cpu or cuda[:N]")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}; this torch build or machine has no CUDA device")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named format, or bfloat16 where the processor multiplies it natively, else float32.

    float16 is never offered: this model family overflows it.

    Raises:
        ValueError: an unknown format.
    """
    if name is not None and name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype is {name!r}; expected auto, {' or '.join(DTYPES)}")
        return DTYPES[name]
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_multiplies_bfloat16()
    return torch.bfloat16 if native else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """AMX or AVX512-BF16; without them bfloat16 is emulated and several times slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


_COMPILED = "preread-"  # begins the name of a processor's folder

# A model narrower than that computes a pass in less time than its steps take to compile.
MIN_FUSED_DIM = 512


def choose_fused(dim: int, device: torch.device) -> bool:
    """Whether the steps between matrix products are worth compiling, and can be.

    On a CPU that needs a C++ compiler, some ten seconds once per machine (torch keeps what it compiled) and
    a few at every start. TORCH_COMPILE_DISABLE=1 is torch's own switch.
    """
    return device.type == "cpu" and dim >= MIN_FUSED_DIM and cpp_compiler() is not None


def cpp_compiler() -> str | None:
    """Path of the compiler that torch would call, if there is one."""
    from torch._inductor import config

    wanted = config.cpp.cxx
    names = [wanted] if isinstance(wanted, str) else [name for name in wanted if name]
    return next((path for name in names if (path := shutil.which(name))), None)


def separate_compiled_code() -> Path:
    """Point torch's cache of compiled code at a folder for this processor, and return it.

    torch names what it keeps by source and options, not by the vector units it was generated for: code of another
    processor (a folder that moved, an image, ATEN_CPU_CAPABILITY) gives wrong numbers or ends the process.
    TORCHINDUCTOR_CACHE_DIR still says where; what lies there belongs to the folder inside.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    units = {name: value for name, value in torch.cpu.get_capabilities().items() if isinstance(value, bool)}
    described = f"{platform.machine()} {pick_vec_isa()} {sorted(units.items())} {torch.__version__}"
    given = Path(cache_dir())
    above = given.parent if given.name.startswith(_COMPILED) else given  # this process, or its parent, was here before
    folder = above / (_COMPILED + hashlib.sha256(described.encode()).hexdigest()[:16])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return folder


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tune_process(num_threads: int | None = None) -> None:
    """Process-wide settings for steady inference; called once by whoever owns the process.

    glibc hands activation-sized blocks back to the kernel on every free and pages them in again on
    the next batch, which costs more than the arithmetic on them: keep them. What oneDNN prepares for
    one batch size is mostly of no use to the next: keep less of it. It reads that from the environment
    at the first product and offers no other way; what is set there already wins.

    torch counts processors, and does not know that a container's quota pays for fewer of them; more threads than that
    are stopped together for part of every period. So without a number there are at most as many as the quota allows.
    """
    for name, value in PREPARED_PRODUCTS.items():
        os.environ.setdefault(name, value)
    cores = usable_cores()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, cores)))  # a process each
    torch.set_num_threads(num_threads or min(torch.get_num_threads(), cores))
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries
        if mallopt is not None:
            m_trim_threshold, m_mmap_threshold = -1, -3
            mallopt(m_mmap_threshold, 1 << 30)
            mallopt(m_trim_threshold, (1 << 31) - 1)


def keep_loaded() -> None:
    """Leave loaded objects out of garbage collections; called once a server is ready.

    A full collection goes through half a million objects of models and libraries and stops every thread for up to a
    second. A body of 125,000 lists sets one off.
    """
    gc.collect()
    gc.freeze()
