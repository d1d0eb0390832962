"""`preread doctor` and `preread health`: whether serving would work here, and whether a server is ready."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

import preread
from cache.errors import CacheError
from decoder_server.config import DecoderConfig, KvCacheConfig, ModelConfig
from preread.arguments import Argument
from preread_cli import flags
from preread_cli.config_file import masked
from preread_cli.failures import BAD_ITEMS, UNAVAILABLE, CommandFailed
from preread_cli.flags import option
from preread_cli.models import compute_options, models_option, parse_models
from preread_cli.terminal import print_json, print_result
from preread_edge.outputs import human_bytes
from preread_edge.tables import TEXT, WHOLE, Column, Table, print_parts

if TYPE_CHECKING:
    from checkpoint import Checkpoint, EncoderIdentity

# Python, torch and a loaded server without its weights: measured on a small model.
PROCESS_BYTES = 400 << 20
STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
_Finding = tuple[str, str, str]  # name, state, message; the state is ok, warn, or FAIL: serving will not work


_KNOBS = (
    "store", "max_store_cache_bytes", "max_inline_cache_bytes", "encoder_tls_ca_file", "encoder_tls_cert_file",
    "encoder_tls_key_file", *(one.name for one in KvCacheConfig.knobs()),
)  # fmt: skip


@click.command()
@models_option
@compute_options
@flags.knob_options(ModelConfig, only=["max_passage_tokens", "encoder_address", "encoder_api_key"])
@flags.no_encoder
@flags.knob_options(DecoderConfig, KvCacheConfig, only=_KNOBS)
@flags.as_json
@click.pass_context
def doctor(ctx: click.Context, /, **options: Any) -> None:
    """Check whether this machine, checkpoint and store can serve.

    \b
    Takes the settings of `preread serve`, every model too, also from --config. Changes nothing, and makes no store.

    \b
    Exit codes: 0 ready to serve (warnings are allowed), 1 a problem that would stop or spoil serving.
    """
    findings = list(_findings(options))
    if options["as_json"]:
        print_json([{"name": name, "state": state.lower(), "message": message} for name, state, message in findings])
    else:
        table = Table([Column("", WHOLE), Column("", TEXT), Column("", TEXT)], num_keys=2)
        for name, state, message in findings:
            table.add((state, STYLES[state]), name, message)
        print_parts(table)
    if any(state == "FAIL" for _, state, _ in findings):
        ctx.exit(BAD_ITEMS)


class _Model(NamedTuple):
    """A model to serve."""

    config: ModelConfig
    path: Path | None = None  # of files that can be served
    checkpoint: Checkpoint | None = None  # where it reads states

    @property
    def identity(self) -> EncoderIdentity | None:
        return self.checkpoint.identity if self.checkpoint is not None else None


def _findings(options: Mapping[str, Any]) -> Iterator[_Finding]:
    from cache.open import open_store

    yield from _machine(options)
    configs = parse_models(options, kv_caches=flags.from_options(KvCacheConfig, options))
    models: list[_Model] = []
    for config in configs:
        model, finding = _model(config, "checkpoint" if len(configs) == 1 else f"model {config.served_name}")
        yield finding
        models.append(model)
    yield from _memory(options, models)
    shown = masked(options["store"], "store")
    try:
        with closing(open_store(options["store"], read_budget_seconds=flags.ADMIN_READ_SECONDS)) as opened:
            yield from _store(opened, shown, [model.identity for model in models if model.identity is not None])
    except CacheError as exc:
        yield "store", "FAIL", f"{shown}: {exc}"
    elsewhere = options["encoder_address"]
    yield from _proxy([*(config.encoder_address for config in configs), elsewhere])
    for model in models:  # every worker that is named: by a model, or for the first that names none
        address = model.config.encoder_address
        if not address and elsewhere and (model.identity is not None or len(models) == 1):
            address, elsewhere = elsewhere, None
        if address:
            yield _worker(options, address, model.identity)


def _machine(options: Mapping[str, Any]) -> Iterator[_Finding]:
    """Instruction sets that decide how fast a forward pass is, torch, the device that would be taken, and threads."""
    import torch

    from checkpoint import compute

    has = {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    wanted = ("avx2", "avx512", "avx512_bf16", "amx_bf16", "asimd", "sve")
    there = ", ".join(name for name in wanted if any(one.startswith(name) for one in has)) or "none of the known ones"
    emulated = "float32 only: bfloat16 would be emulated"
    bfloat16 = "multiplies bfloat16" if compute.cpu_multiplies_bfloat16() else emulated
    good = has & {"avx2", "asimd"} or any("avx512" in name for name in has)
    yield "processor", "ok" if good else "warn", f"{there}; {bfloat16}"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield "torch", "ok", f"{torch.__version__} ({cuda}), Python {sys.version.split()[0]}"
    try:
        device, dtype = compute.choose_device(options["device"], options["dtype"])
        yield "device", "ok", f"{device}, {compute.dtype_name(dtype)}"
        if device.type == "cpu":
            compiler = compute.cpp_compiler()
            unfused = "no C++ compiler (g++): unfused, a few percent slower"
            yield "fused steps", "ok", f"{compiler} compiles them at load" if compiler else unfused
    except ValueError as exc:
        yield "device", "FAIL", str(exc)
    usable, quota = compute.usable_cores(), compute.cpu_quota()
    threads = options["threads"] or min(torch.get_num_threads(), usable)
    paid = f" (a quota of {quota:g})" if quota < math.inf else ""
    many = f"{threads} threads on {usable} processors{paid}: they wait for each other; set --threads {usable}"
    few = f"{threads} of {usable} processors{paid}"
    yield ("threads", "ok", few) if threads <= usable else ("threads", "warn", many)


def _model(config: ModelConfig, name: str) -> tuple[_Model, _Finding]:
    """Whether it can be served, by its files; weights are not loaded."""
    from checkpoint import Checkpoint, CheckpointError
    from checkpoint.files import resolve
    from decoder_server.models.loading import is_fbnl

    try:
        if not is_fbnl(config):
            path = resolve(config.checkpoint)
            return _Model(config, path), (name, "ok", f"{path}, a cross-encoder: reads text, needs no store")
        limit, reads_control = config.max_passage_tokens, config.read_control_tokens
        found = Checkpoint.open(config.checkpoint, max_passage_tokens=limit, neutralise=not reads_control)
        identity = found.identity
        _ = found.text
    except (CheckpointError, OSError, ValueError) as exc:
        return _Model(config), (name, "FAIL", str(exc))
    message = f"{identity.checkpoint}, encoder {identity.fingerprint[:12]}, dim {identity.dim}"
    return _Model(config, found.path, found), (name, "ok", message)


def _memory(options: Mapping[str, Any], models: Sequence[_Model]) -> Iterator[_Finding]:
    """Whether weights and full caches fit, into the machine's memory and a GPU's. Reads /proc, so on Linux only."""
    from checkpoint.compute import memory_left

    for device, parts in _needed(options, models).items():
        name = "memory" if device == "cpu" else f"memory of {device}"
        if device == "cpu":
            try:
                with open("/proc/meminfo") as lines:
                    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
                # The kernel's estimate, or what the container may still use.
                available = min(sizes["MemAvailable"], memory_left())
            except (OSError, KeyError):
                yield name, "warn", "cannot be told on this system"
                continue
        else:
            import torch

            available, _ = torch.cuda.mem_get_info(device)
        needed, at_start = parts.total(), parts["weights"] + parts["process"]
        listed = ", ".join(f"{part} {human_bytes(size)}" for part, size in parts.items() if size)
        sums = f"{human_bytes(needed)} needed of {human_bytes(available)} available: {listed}"
        if at_start > available:
            yield name, "FAIL", f"does not fit, with empty caches either; {sums}"
        elif needed > available:
            yield name, "warn", f"does not fit once the caches are full; {sums}"
        else:
            yield name, "ok", f"fits; {sums}"


def _needed(options: Mapping[str, Any], models: Sequence[_Model]) -> dict[str, Counter[str]]:
    """Device -> part -> most bytes that `preread serve` takes for it; beside these there is the batch at hand."""
    from checkpoint.compute import choose_device
    from checkpoint.cost import num_parameters

    needed: defaultdict[str, Counter[str]] = defaultdict(Counter)
    read_cache, inline = options["cache_bytes"], options["inline_cache_bytes"]
    elsewhere = options["encoder_address"]
    for config, path, opened in models:
        with suppress(ValueError):  # a device that is not there has its own finding
            device, dtype = choose_device(config.device, config.dtype)
            own, number_bytes = needed[str(device)], dtype.itemsize
            if opened is None:
                number_bytes = {"onnx": 4, "onnx-int8": 1}.get(config.runtime, number_bytes)
                own["weights"] += number_bytes * _num_stored(path)
                continue
            is_here = not (config.encoder_address or options["encoder_address"] or options["no_encoder"])
            own["weights"] += number_bytes * num_parameters("decoder", opened.decoder_config)
            own["weights"] += number_bytes * num_parameters("encoder", opened.encoder_config) * is_here
            own["KV cache"] += config.kv_caches.max_keys_bytes
            own["prefix cache"] += config.kv_caches.max_prefix_bytes
            if is_here or config.encoder_address or elsewhere:
                needed["cpu"]["states of texts"] += read_cache if inline is None else inline
            elsewhere = elsewhere if config.encoder_address else None  # the worker of the first that names none
    needed["cpu"] += Counter({"read cache": read_cache, "process": PROCESS_BYTES})
    return needed


def _num_stored(path: Path | None) -> int:
    """Numbers in a checkpoint's files; 0 of files that cannot be read, which loading will name."""
    from checkpoint import CheckpointError
    from checkpoint.tensors import StoredTensors

    with suppress(CheckpointError):
        return sum(prod(one.shape) for one in StoredTensors(path).weights.values()) if path is not None else 0
    return 0


def _store(opened: Any, shown: str, identities: Sequence[EncoderIdentity]) -> Iterator[_Finding]:
    """Whether it answers, and whether its collections were written by an encoder of these."""
    from decoder_server.engine.collections import describe

    unreadable: dict[str, str] = {}
    described = describe(opened, unreadable)
    yield "store", "ok", f"{shown}, {len(described)} collections"
    for name, reason in unreadable.items():
        yield f"collection {name}", "FAIL", f"cannot be read: {reason}"
    ours = {identity.fingerprint for identity in identities}
    here = " or ".join(sorted(fingerprint[:12] for fingerprint in ours))
    for one in described:
        manifest = one.manifest
        name, about = f"collection {manifest.collection}", f"{one.stats.num_passages:,} passages, {manifest.codec}"
        if not ours:
            yield name, "warn", f"{about}; nothing to compare its encoder with"
        elif manifest.fingerprint in ours:
            yield name, "ok", f"{about}, ratio {manifest.compression_ratio}, of this encoder"
        else:
            writer = f"{manifest.checkpoint} ({manifest.fingerprint[:12]}), the encoder here is {here}"
            advice = "requests for it are rejected; index it again into a new collection"
            yield name, "FAIL", f"{about}; written by {writer}: {advice}"


def _proxy(addresses: Sequence[str | None]) -> Iterator[_Finding]:
    """Whether the environment puts one between the server and its encoders elsewhere."""
    from preread.channel import proxy_variable

    name = proxy_variable()
    through = ", ".join(address for address in dict.fromkeys(addresses) if address and proxy_variable(address))
    if name and through:
        yield "proxy", "warn", f"{name} is set: {through} is reached through that proxy; no_proxy takes hosts out of it"
    elif name:
        yield "proxy", "ok", f"{name} is set; nothing of ours is reached through it"


def _worker(options: Mapping[str, Any], address: str, identity: EncoderIdentity | None) -> _Finding:
    from preread.channel import proxy_variable

    tls = flags.from_options(DecoderConfig, options, models=(ModelConfig("any"),)).encoder_tls
    retry = preread.RetryPolicy(budget_seconds=0)
    once = preread.ClientOptions(timeout_seconds=5.0, retry=retry, tls=tls, api_key=options["encoder_api_key"])
    try:
        with preread.Client(address, encoder_address=address, options=once) as client:
            theirs = client.describe().encoder.fingerprint
    except preread.PrereadError as exc:
        through = f" (through the proxy of {proxy})" if (proxy := proxy_variable(address)) else ""
        return "worker", "FAIL", f"{'' if address in str(exc) else f'{address}: '}{exc}{through}"
    if identity is not None and theirs != identity.fingerprint:
        here = f"this checkpoint's encoder is {identity.fingerprint[:12]}"
        return "worker", "FAIL", f"{address} encodes with {theirs[:12]}, {here}"
    return "worker", "ok", f"{address}, encoder {theirs[:12]}"


@click.command()
@option("--timeout-seconds", type=flags.SECONDS, default=5.0, help="Time to wait for the answer.")
@option("--service", metavar="NAME", default="", help="Instead of readiness: live, or a reranking server's encoder.")
@flags.as_json
@flags.client
def health(**given: Any) -> None:
    """Ask a server, of either kind, whether it is ready.

    Of several addresses each must be ready. Exit codes: 0 ready, 2 no such service, 3 not ready or unreachable.
    """
    answers = [_asked(one, given) for one in Argument("address", flags.addresses(given)).addresses()]
    state = {"": "ready", "live": "live"}.get(given["service"], f"ready ({given['service']})")
    late = [one for one in answers if one["status"] != "SERVING"]
    if not late or given["as_json"]:
        lines = "\n".join(f"{one['address']} is {state}" for one in answers)
        print_result(answers if len(answers) > 1 else answers[0], lines, as_json=given["as_json"])
    if late:
        address, status = late[0]["address"], late[0]["status"]
        message = f"the server at {address} says: {given['service'] or 'it'} is not ready ({status})"
        raise CommandFailed(message, UNAVAILABLE)


def _asked(address: str, given: Mapping[str, Any]) -> dict[str, str]:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from preread.wire import translate

    request = health_pb2.HealthCheckRequest(service=given["service"])
    with flags.client_settings(given).channel(grpc, address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=given["timeout_seconds"])
        except grpc.RpcError as exc:
            if exc.code() is not grpc.StatusCode.NOT_FOUND:
                raise translate(exc, address, "")[0] from exc
            message = f"--service is {given['service']!r}, which {address} does not have; expected live, or encoder"
            raise CommandFailed(f"{message}, of a reranking server that has one") from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return {"address": address, "service": given["service"], "status": status}
