"""Which error ends the command with which exit code.

0  done
1  done, with refused or damaged items (commands say so themselves)
2  usage or bad input: the caller can mend it
3  a service or store could not be reached, or was too busy
70 an unexpected error, a fault of this code (EX_SOFTWARE of sysexits.h); 130 interrupted
"""

import traceback
from typing import IO, Any, Self

import click

from cache.errors import CacheError, CollectionGone, StoreDamaged, StoreFull, StoreLocked, StoreUnavailable
from preread.errors import PrereadError
from preread_edge.tables import print_parts

BAD_ITEMS = 1
BAD_INPUT = 2
UNAVAILABLE = 3
INTERNAL = 70
INTERRUPTED = 130

_CALLERS_FAULT = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAUTHENTICATED"}
# What to try where no server answered, by the reason that preread.wire gives.
_ADVICE = {
    "UNREACHABLE": "; is `preread serve` running there?",
    "NO_ANSWER": "; is `preread serve` running there, or too busy for --timeout-seconds?",
    "NOT_GRPC": "; --address takes the port of gRPC, not that of HTTP",
    "NOT_TLS": "; leave out --tls and the --tls-... files",
    "CLOSED": "; it may expect TLS (--tls, --tls-ca-file) or a client's certificate (--tls-cert-file)",
    "UNTRUSTED": "; name its certificate, or its authority's, with --tls-ca-file",
}


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
            case PrereadError():
                return cls(told(error), BAD_INPUT if error.status in _CALLERS_FAULT else UNAVAILABLE)
            case StoreUnavailable() | StoreLocked() | StoreFull() | StoreDamaged() | CollectionGone():
                return cls(text, UNAVAILABLE)
            case CacheError() | OSError() | ValueError():
                return cls(text)
        hint = "" if debug else " (--debug shows where)"
        return cls(f"unexpected {type(error).__name__}: {text}{hint}", INTERNAL)

    def show(self, file: IO[Any] | None = None) -> None:
        if file is None:
            print_parts(f"preread: error: {self.format_message()}", err=True)
        else:
            click.echo(f"preread: error: {self.format_message()}", file=file)


def told(error: PrereadError) -> str:
    """The line for a failed call: which server said so, or what to try where none answered; its id for the log."""
    text = error.message
    if not error.address:  # raised here
        return text
    request = f" (request {error.request_id})" if error.request_id else ""
    if not text.startswith(f"the server at {error.address} "):
        return f"the server at {error.address} says: {text.removeprefix(f'{error.address}: ')}{request}"
    from preread.channel import proxy_variable

    proxy = proxy_variable(error.address)
    through = f" ({proxy} is set, so it is called through that proxy; no_proxy exempts hosts)" if proxy else ""
    return f"{text}{through}{_ADVICE.get(error.reason, '')}{request}"
