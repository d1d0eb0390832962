"""Measuring a checkpoint: judged collections in, quality with its uncertainty out.

Knows both halves of the model and the store; knows no server, and nothing but preread_cli imports it.

Every error that tuning raises on purpose.

EvaluationError (a ValueError)   a file or setting that cannot be evaluated; the message names it
└── MissingExtra                 an optional package that is not installed
"""

from __future__ import annotations


class EvaluationError(ValueError):
    """A file or setting that cannot be evaluated."""


class MissingExtra(EvaluationError):  # noqa: N818 - it says what is wrong
    """An optional package is not installed."""

    def __init__(self, what: str, extra: str, exc: ImportError) -> None:
        super().__init__(f"{what} needs a package that is not installed ({exc}): pip install 'preread[{extra}]'")
        self.extra = extra
