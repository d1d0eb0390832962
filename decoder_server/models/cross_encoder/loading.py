"""A name to a loaded cross-encoder: finds the files, chooses the profile, checks both, loads."""

import logging
from pathlib import Path

import torch

from checkpoint.compute import choose_device, cpu_multiplies_bfloat16
from checkpoint.files import read_json, resolve
from decoder_server.models.cross_encoder.backend import CrossEncoder, Runner
from decoder_server.models.cross_encoder.files import CheckpointFiles
from decoder_server.models.cross_encoder.onnx_runtime import load_onnx
from decoder_server.models.cross_encoder.profiles import Profile
from decoder_server.models.cross_encoder.torch_runtime import ListwiseRunner, TorchRunner

log = logging.getLogger(__name__)
RUNTIMES = ("torch", "onnx", "onnx-int8")


def open_cross_encoder(
    name: str | Path,  # directory or hub id
    *,
    device: str | None = None,  # auto, cpu or cuda[:N]; None is auto
    dtype: str | None = None,  # auto, float32 or bfloat16; None is auto
    runtime: str = "torch",  # or onnx (float32) or onnx-int8, with ONNX Runtime on the CPU
    # A model id whose recipe to use, a TOML file, `generic`, or a Profile; None: by exact id, by the checkpoint's own
    # file, or from its configuration.
    profile: str | Profile | None = None,
    max_tokens: int | None = None,  # a lower or higher limit than the profile's
    trust_remote_code: bool = False,  # run Python that comes with the checkpoint
    cache_dir: Path | None = None,  # where ONNX graphs are kept; None: ~/.cache/preread/onnx
) -> CrossEncoder:
    """Loads a reranker that reads query and passage together.
    Raises CheckpointError for files that cannot be served, ValueError for a device, dtype or runtime not to be had.
    """
    where, number_format = _placed(runtime, device, dtype)
    name = str(name)
    chosen = Profile.named(name, profile)
    if chosen is not None:  # before anything is downloaded
        chosen.check_allowed(name, trust_remote_code)
    directory = resolve(name, with_code=trust_remote_code)
    config = read_json(directory / "config.json")
    chosen = chosen or Profile.named(name, profile, directory) or Profile.generic(name, config, directory)
    chosen.check_allowed(name, trust_remote_code)
    chosen.check_architecture(config, name)
    limited = chosen.limited(config, max_tokens)
    source = CheckpointFiles.open(directory, config, limited, trust_remote_code=trust_remote_code)
    if runtime == "torch":
        runner: Runner = (ListwiseRunner if limited.listwise else TorchRunner)(source, where, number_format)
    else:
        runner = load_onnx(source, quantized=runtime == "onnx-int8", cache_dir=cache_dir)
    model = CrossEncoder(source, runner, checkpoint_name=name, runtime=runtime)
    model.first_pass()  # a config.json may make a model that loads and cannot compute
    log.info("%s: profile %s, %s on %s", name, model.profile.model, model.dtype_name, model.device_name)
    if model.notice:
        free = model.profile.license in ("Apache-2.0", "MIT")
        log.log(logging.INFO if free else logging.WARNING, "%s", model.notice)
    return model


def _placed(runtime: str, device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime is {runtime!r}; expected {' or '.join(RUNTIMES)}")
    if runtime != "torch":
        if device not in (None, "auto", "cpu"):
            raise ValueError(f"device is {device!r}; the runtime {runtime!r} computes on the CPU")
        if dtype not in (None, "auto", "float32"):
            raise ValueError(f"dtype is {dtype!r}; the runtime {runtime!r} computes in float32 around int8 products")
        device, dtype = "cpu", "float32"
    where, number_format = choose_device(device, dtype)
    if where.type == "cpu" and not cpu_multiplies_bfloat16():
        emulated = number_format is torch.bfloat16
        then = "they are emulated, slower than float32" if emulated else "computing in float32"
        log.log(logging.WARNING if emulated else logging.INFO, "this processor has no bfloat16 instructions: %s", then)
    return where, number_format
