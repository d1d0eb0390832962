"""Measures a checkpoint: judged collections in, quality with its uncertainty out.

Imports both halves of the model and the store, and no server; only preread_cli imports it.
"""


class EvaluationError(ValueError):
    """A file or setting that cannot be evaluated; the message names it."""


class MissingExtra(EvaluationError):  # noqa: N818 - it says what is wrong
    """An optional package that is not installed."""

    def __init__(self, feature: str, extra: str, exc: ImportError) -> None:
        super().__init__(f"{feature} needs a package that is not installed ({exc}): pip install 'preread[{extra}]'")
        self.extra = extra
