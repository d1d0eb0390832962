"""`preread doctor`: would serving work here, and if not, what to do. Knows the checks' order and the exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from preread_cli.checks import Finding, State
from preread_cli.config_file import config_option, masked
from preread_cli.failures import BAD_ITEMS
from preread_cli.model_specs import models_option, parse_models
from preread_cli.options import (
    ADMIN_READ_SECONDS,
    compute_options,
    control_tokens_option,
    json_option,
    option,
    store_option,
)

if TYPE_CHECKING:
    from checkpoint import EncoderIdentity
    from decoder_server.config import ModelConfig

_FILE = click.Path(exists=True, dir_okay=False)


@click.command()
@config_option
@store_option
@models_option
@compute_options
@control_tokens_option
@option("--max-passage-tokens", type=click.IntRange(min=1), help="Passage limit, as the server is given it.")
@option("--cache-bytes", type=click.IntRange(min=0), default=256 << 20, help="As the server is given it.")
@option("--encoder-address", metavar="HOST:PORT", help="The encoder worker that the server would ask.")
@option("--encoder-api-key", metavar="KEY", help="Shown to that worker.")
@option("--encoder-tls-ca-file", type=_FILE, help="Reach it with TLS, trusting this certificate (PEM).")
@option("--encoder-tls-cert-file", type=_FILE, help="Show it this certificate (PEM), for mutual TLS.")
@option("--encoder-tls-key-file", type=_FILE, help="The key of --encoder-tls-cert-file (PEM).")
@json_option
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Check whether this machine, checkpoint and store can serve.

    \b
    Takes the settings of `preread serve`, every model too, also from --config. Changes nothing, and makes no store.

    \b
    Exit codes: 0 nothing in the way (warnings are allowed), 1 something that serving will stumble over.
    """
    findings = list(_findings(options))
    if options["as_json"]:
        rows = [{"name": one.name, "state": one.state.value.lower(), "message": one.message} for one in findings]
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        for one in findings:
            click.echo(f"{one.state.value:<5} {one.name:<12} {one.message}")
    if any(one.state is State.FAIL for one in findings):
        ctx.exit(BAD_ITEMS)


def _findings(options: Mapping[str, Any]) -> Iterator[Finding]:
    from cache.errors import CacheError
    from cache.open import open_store
    from preread_cli import checks

    yield from checks.processor()
    yield from checks.torch_build(options)
    yield from checks.threads(options)
    models = parse_models({**options, "served_model_name": ""})
    found: list[tuple[ModelConfig, checks.Model]] = []
    for model in models:
        own, finding = checks.checkpoint(model, "checkpoint" if len(models) == 1 else f"model {model.served_name}")
        yield finding
        if own is not None:
            found.append((model, own))
    if found:
        yield from checks.memory(options, [own.path for _, own in found])
    identities = [own.identity for _, own in found if own.identity is not None]
    shown = masked("store", options["store"])
    try:
        with closing(open_store(options["store"], read_budget_seconds=ADMIN_READ_SECONDS)) as opened:
            yield from checks.store(opened, shown, identities)
    except CacheError as exc:
        yield Finding("store", State.FAIL, f"{shown}: {exc}")
    named = [model.encoder_address for model in models] + [options["encoder_address"] or ""]
    yield from checks.proxy([address for address in dict.fromkeys(named) if address])
    yield from _workers(options, models, {id(model): own.identity for model, own in found})


def _workers(
    options: Mapping[str, Any], models: Sequence[ModelConfig], identities: Mapping[int, EncoderIdentity | None]
) -> Iterator[Finding]:
    """Every worker that is named: by a model, or for the first that names none."""
    address, key = options["encoder_address"], options["encoder_api_key"]
    for model in models:
        identity = identities.get(id(model))
        fingerprint = identity.fingerprint if identity is not None else None
        if model.encoder_address:
            yield _worker(options, model.encoder_address, model.encoder_api_key or None, fingerprint)
        elif address and (identity is not None or len(models) == 1):
            yield _worker(options, address, key, fingerprint)
            address = None


def _worker(options: Mapping[str, Any], address: str, key: str | None, fingerprint: str | None) -> Finding:
    """Asks the worker who it is, as the server would."""
    from preread import Client, ClientOptions, PrereadError, RetryPolicy, TlsFiles
    from preread.channel import proxy_variable

    files = [options[f"encoder_tls_{name}_file"] for name in ("ca", "cert", "key")]
    once = ClientOptions(
        timeout_seconds=5.0,
        retry=RetryPolicy(max_attempts=1),
        tls=TlsFiles(*files) if any(files) else None,
        api_key=key,
    )
    try:
        with Client(address, encoder_address=address, options=once) as client:
            described = client.describe()
    except PrereadError as exc:
        proxy = proxy_variable(address)
        through = f" (asked through the proxy of {proxy})" if proxy else ""
        return Finding("worker", State.FAIL, f"{address}: {exc}{through}")
    theirs = described.encoder.fingerprint
    if fingerprint is not None and theirs != fingerprint:
        message = f"{address} encodes with {theirs[:12]}, this checkpoint's encoder is {fingerprint[:12]}"
        return Finding("worker", State.FAIL, message)
    return Finding("worker", State.OK, f"{address}, encoder {theirs[:12]}")
