"""`preread doctor`: would serving work here, and if not, what to do. Knows the checks' order and the exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import click

from preread.cli.checks import Finding, State
from preread.cli.config_file import config_option
from preread.cli.effective import masked
from preread.cli.failures import BAD_ITEMS
from preread.cli.options import compute_options, json_option, model_option, option, store_option

_FILE = click.Path(exists=True, dir_okay=False)


@click.command()
@config_option
@store_option
@model_option
@compute_options
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
    Takes the settings of `preread serve`, also from --config. Changes nothing, and makes no store.

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
    from cache.store import open_store
    from preread.cli import checks

    yield from checks.processor()
    yield from checks.torch_build(options)
    yield from checks.threads(options)
    found, findings = checks.checkpoint(options)
    yield from findings
    if found is not None:
        yield from checks.memory(options)
    shown = masked("store", options["store"])
    try:
        with closing(open_store(options["store"])) as opened:
            yield from checks.store(opened, shown, found)
    except CacheError as exc:
        yield Finding("store", State.FAIL, f"{shown}: {exc}")
    if options["encoder_address"]:
        yield _worker(options, found.identity().fingerprint if found is not None else None)


def _worker(options: Mapping[str, Any], fingerprint: str | None) -> Finding:
    """Asks the worker who it is, as the server would."""
    from preread.client import Client, ClientOptions, PrereadError, RetryPolicy, TlsFiles

    address = options["encoder_address"]
    files = [options[f"encoder_tls_{name}_file"] for name in ("ca", "cert", "key")]
    once = ClientOptions(
        timeout_seconds=5.0,
        retry=RetryPolicy(max_attempts=1),
        tls=TlsFiles(*files) if any(files) else None,
        api_key=options["encoder_api_key"],
    )
    try:
        with Client(address, encoder_address=address, options=once) as client:
            described = client.describe()
    except PrereadError as exc:
        return Finding("worker", State.FAIL, f"{address}: {exc}")
    theirs = described.encoder.fingerprint
    if fingerprint is not None and theirs != fingerprint:
        message = f"{address} encodes with {theirs[:12]}, this checkpoint's encoder is {fingerprint[:12]}"
        return Finding("worker", State.FAIL, message)
    return Finding("worker", State.OK, f"{address}, encoder {theirs[:12]}")
