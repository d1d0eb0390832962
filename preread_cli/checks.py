"""What `preread doctor` looks at. Each check is a function that gives its findings; none of them changes anything."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache.store import Store
    from checkpoint import EncoderIdentity
    from decoder_server.config import ModelConfig

GIB = 1 << 30


class State(Enum):
    """How bad it is. Only FAIL means that serving will not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    message: str


def processor() -> Iterator[Finding]:
    """Instruction sets that decide how fast a pass is."""
    import torch

    from checkpoint.compute import cpu_multiplies_bfloat16

    has = {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    wanted = ("avx2", "avx512", "avx512_bf16", "amx_bf16", "asimd", "sve")
    there = ", ".join(name for name in wanted if any(one.startswith(name) for one in has)) or "none of the known ones"
    bfloat16 = "multiplies bfloat16" if cpu_multiplies_bfloat16() else "float32 only: bfloat16 would be emulated"
    state = State.OK if has & {"avx2", "asimd"} or any("avx512" in name for name in has) else State.WARN
    yield Finding("processor", state, f"{there}; {bfloat16}")


def torch_build(options: Mapping[str, Any]) -> Iterator[Finding]:
    """The build, the device that would be taken, and the number format."""
    import torch

    from checkpoint.compute import choose_device, choose_dtype, cpp_compiler, dtype_name

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch", State.OK, f"{torch.__version__} ({cuda}), Python {sys.version.split()[0]}")
    try:
        device = choose_device(options["device"])
        dtype = choose_dtype(options["dtype"], device)
    except ValueError as exc:
        yield Finding("device", State.FAIL, str(exc))
        return
    yield Finding("device", State.OK, f"{device}, {dtype_name(dtype)}")
    if device.type == "cpu":
        compiler = cpp_compiler()
        fused = (
            f"{compiler} compiles them at load" if compiler else "no C++ compiler (g++): unfused, a few percent slower"
        )
        yield Finding("fused steps", State.OK, fused)


def threads(options: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the threads fit the processors this process may use."""
    import torch

    from checkpoint.compute import cpu_quota, usable_cores

    usable, quota = usable_cores(), cpu_quota()
    wanted = options["threads"] or min(torch.get_num_threads(), usable)
    paid = f" (a quota of {quota:g})" if quota < math.inf else ""
    if wanted > usable:
        message = f"{wanted} threads on {usable} processors{paid}: they wait for each other; set --threads {usable}"
        yield Finding("threads", State.WARN, message)
    else:
        yield Finding("threads", State.OK, f"{wanted} of {usable} processors{paid}")


def memory(options: Mapping[str, Any], paths: Sequence[Path]) -> Iterator[Finding]:
    """Whether weights and tiers fit. Knows Linux only; says so elsewhere."""
    available = _available_bytes()
    if available is None:
        yield Finding("memory", State.WARN, "cannot be told on this system")
        return
    weights = sum(file.stat().st_size for path in paths for file in path.glob("*.safetensors"))
    needed = weights + 2 * options["cache_bytes"]
    message = f"{available / GIB:.1f} GiB available; weights and tiers take up to {needed / GIB:.1f} GiB"
    yield Finding("memory", State.OK if needed < available else State.WARN, message)


def _available_bytes() -> int | None:
    """The kernel's estimate, or what the container may still use, whichever is less."""
    from checkpoint.compute import memory_left

    try:
        with open("/proc/meminfo") as lines:
            kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return int(min(kib * 1024, memory_left()))


def proxy(addresses: Sequence[str]) -> Iterator[Finding]:
    """Whether the environment puts a proxy between the server and its encoders elsewhere."""
    from preread.channel import proxy_variable

    name = proxy_variable()
    if not name:
        return
    through = [address for address in addresses if proxy_variable(address)]
    if through:
        message = f"{name} is set: {', '.join(through)} is reached through that proxy; no_proxy takes hosts out of it"
        yield Finding("proxy", State.WARN, message)
    else:
        yield Finding("proxy", State.OK, f"{name} is set; nothing of ours is reached through it")


@dataclass(frozen=True)
class Model:
    """A model that could be served: where its files are, and its encoder where it has one."""

    path: Path
    identity: EncoderIdentity | None


def checkpoint(model: ModelConfig, name: str) -> tuple[Model | None, Finding]:
    """Whether the files are there and are a reranker we can serve; weights are not loaded."""
    from checkpoint import Checkpoint, CheckpointError
    from checkpoint.files import resolve
    from decoder_server.models.loading import is_fbnl

    try:
        if not is_fbnl(model):
            path = resolve(model.checkpoint)
            return Model(path, None), Finding(name, State.OK, f"{path}, a cross-encoder: reads text, needs no store")
        found = Checkpoint.open(
            model.checkpoint, max_passage_tokens=model.max_passage_tokens, neutralise=not model.read_control_tokens
        )
        identity = found.identity()
        _ = found.text
    except (CheckpointError, OSError, ValueError) as exc:
        return None, Finding(name, State.FAIL, str(exc))
    message = f"{identity.checkpoint}, encoder {identity.fingerprint[:12]}, dim {identity.dim}"
    return Model(found.path, identity), Finding(name, State.OK, message)


def store(opened: Store, shown: str, identities: Sequence[EncoderIdentity]) -> Iterator[Finding]:
    """Whether the store answers, and whether its collections were written by an encoder of these."""
    from cache.errors import CacheError
    from decoder_server.engine.collections import survey

    try:
        described, unreadable = survey(opened)
    except CacheError as exc:
        yield Finding("store", State.FAIL, f"{shown}: {exc}")
        return
    yield Finding("store", State.OK, f"{shown}, {len(described)} collections")
    for name, reason in unreadable.items():
        yield Finding(f"collection {name}", State.FAIL, f"cannot be read: {reason}")
    ours = {identity.fingerprint for identity in identities}
    for one in described:
        manifest = one.manifest
        name, about = f"collection {manifest.collection}", f"{one.stats.num_passages:,} passages, {manifest.codec}"
        if not ours:
            yield Finding(name, State.WARN, f"{about}; nothing to compare its encoder with")
        elif manifest.fingerprint in ours:
            yield Finding(name, State.OK, f"{about}, ratio {manifest.compression_ratio}, of this encoder")
        else:
            here = " or ".join(sorted(fingerprint[:12] for fingerprint in ours))
            message = (
                f"{about}; written by {manifest.checkpoint} ({manifest.fingerprint[:12]}), the encoder here is {here}: "
                "requests for it are refused; index it again into a new collection"
            )
            yield Finding(name, State.FAIL, message)
