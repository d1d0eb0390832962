"""Which error ends the command with which exit code.

0  done
1  done, with refused or damaged items (commands say so themselves)
2  usage or bad input: the caller can mend it
3  a service or store could not be reached, or was too busy
70 an unexpected error, a fault of this code (EX_SOFTWARE of sysexits.h); 130 interrupted
"""

import sys
import traceback
from typing import IO, Any, Self

import click

from cache.errors import CacheError, StoreDamaged, StoreFull, StoreLocked, StoreUnavailable
from preread.errors import PrereadError, Unavailable

BAD_ITEMS = 1
BAD_INPUT = 2
UNAVAILABLE = 3
INTERNAL = 70
INTERRUPTED = 130

_CALLERS_FAULT = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAUTHENTICATED"}


class CommandFailed(click.ClickException):
    """Ends a command with one line on standard error."""

    def __init__(self, message: str, exit_code: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click says ClassVar and reads it from the instance

    @classmethod
    def of(cls, error: BaseException, *, debug: bool) -> Self:
        """The one line and the exit code for an error; with `debug` its traceback is printed first."""
        if debug:
            click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        text = str(error).strip() or type(error).__name__
        match error:
            case KeyboardInterrupt():
                return cls("interrupted", INTERRUPTED)
            case Unavailable():
                return cls(f"{text}; is `preread serve` running there?", UNAVAILABLE)
            case PrereadError():
                return cls(text, BAD_INPUT if error.status in _CALLERS_FAULT else UNAVAILABLE)
            case StoreUnavailable() | StoreLocked() | StoreFull() | StoreDamaged():
                return cls(text, UNAVAILABLE)
            case CacheError() | OSError() | ValueError():
                return cls(text)
        if "grpc" in sys.modules and isinstance(error, sys.modules["grpc"].RpcError):  # a help text does not load it
            status = error.code().name if hasattr(error, "code") and error.code() is not None else "UNKNOWN"
            details = error.details() if hasattr(error, "details") else str(error)
            return cls(f"{details} ({status})", BAD_INPUT if status in _CALLERS_FAULT else UNAVAILABLE)
        hint = "" if debug else " (--debug shows where)"
        return cls(f"unexpected {type(error).__name__}: {text}{hint}", INTERNAL)

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"preread: error: {self.format_message()}", file=file, err=file is None)
