"""Which error ends the command with which exit code. Knows errors by name only, so that it imports none of them.

0  done
1  done, with refused or damaged items (commands say so themselves)
2  usage or bad input: the caller can mend it
3  a service or store could not be reached, or was too busy
70 an unexpected error, of this code (EX_SOFTWARE of sysexits.h)
130 interrupted
"""

from __future__ import annotations

import traceback
from typing import IO, Any

import click

BAD_ITEMS = 1
BAD_INPUT = 2
UNAVAILABLE = 3
INTERNAL = 70
INTERRUPTED = 130

# The first class of an error's ancestry that is listed here decides.
_EXIT_CODES = {
    "cache.errors.StoreUnavailable": UNAVAILABLE,
    "cache.errors.StoreLocked": UNAVAILABLE,
    "cache.errors.StoreFull": UNAVAILABLE,
    "cache.errors.StoreDamaged": UNAVAILABLE,
    "cache.errors.CacheError": BAD_INPUT,
    "checkpoint.files.CheckpointError": BAD_INPUT,
    "preread.errors.InvalidRequest": BAD_INPUT,
    "preread.errors.NotFound": BAD_INPUT,
    "preread.errors.FailedPrecondition": BAD_INPUT,
    "preread.errors.PermissionDenied": BAD_INPUT,
    "preread.errors.Unauthenticated": BAD_INPUT,
    "preread.errors.PrereadError": UNAVAILABLE,
    "builtins.OSError": BAD_INPUT,
    "builtins.ValueError": BAD_INPUT,
}
_CALLERS_FAULT = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAUTHENTICATED"}


class CommandFailed(click.ClickException):
    """Ends a command with one line on standard error."""

    def __init__(self, message: str, exit_code: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click says ClassVar and reads it from the instance

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"preread: error: {self.format_message()}", file=file, err=file is None)


def explain(error: BaseException, *, debug: bool) -> CommandFailed:
    """The one line and the exit code for an error; with `debug` its traceback is printed first."""
    if debug:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if isinstance(error, KeyboardInterrupt):
        return CommandFailed("interrupted", INTERRUPTED)
    text = str(error).strip() or type(error).__name__
    for ancestor in type(error).__mro__:
        name = f"{ancestor.__module__}.{ancestor.__qualname__}"
        if name == "grpc.RpcError":
            return _explain_rpc(error)
        if name in _EXIT_CODES:
            return CommandFailed(text, _EXIT_CODES[name])
    hint = "" if debug else " (--debug shows where)"
    return CommandFailed(f"unexpected {type(error).__name__}: {text}{hint}", INTERNAL)


def _explain_rpc(error: Any) -> CommandFailed:
    code = error.code().name if hasattr(error, "code") and error.code() is not None else "UNKNOWN"
    details = error.details() if hasattr(error, "details") else str(error)
    return CommandFailed(f"{details} ({code})", BAD_INPUT if code in _CALLERS_FAULT else UNAVAILABLE)
