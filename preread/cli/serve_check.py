"""`preread serve --check`: a model whose scores are wrong is not served. Knows when to check, not what."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from decoder_server.backend import Backend
    from decoder_server.model_config import ModelConfig

    Load = Callable[[ModelConfig], Backend]


def checked(load: Load) -> Load:
    """`load`, and then the health check of what it loaded, on the thread that will score."""

    def load_and_check(model: ModelConfig) -> Backend:
        from rich.console import Console

        from checkpoint import CheckpointError
        from tuning.health import health_gate
        from tuning.health.table import print_health

        backend = load(model)
        report = health_gate(backend)
        if not report.passed:
            print_health(report, Console(stderr=True))
            raise CheckpointError(report.summary())
        click.echo(f"checked      {model.served_name}: scores are healthy, {report.seconds:.0f} s")
        return backend

    return load_and_check
